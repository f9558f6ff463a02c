"""What a layer's tree is made of: folders, links and all that is more than a plain inode, and where file data lies."""

from __future__ import annotations

from dataclasses import dataclass

from sharedcache.entry import BLOCK, CHARACTER, DIRECTORY, FIFO, REGULAR, SYMLINK, Entry, Xattrs
from sharedcache.erofs_layout import FLAT_PLAIN, pack_xattrs

S_IFMT = {
    REGULAR: 0o100000,
    DIRECTORY: 0o040000,
    SYMLINK: 0o120000,
    CHARACTER: 0o020000,
    BLOCK: 0o060000,
    FIFO: 0o010000,
}
_OPAQUE = (b"trusted.overlay.opaque", b"y")


class Node:
    """A folder, link, or an inode with attributes or a chunk map. Mutable until `erofs` lays it out."""

    __slots__ = (
        "device_or_block", "entries", "gid", "kind", "layout", "mode", "mtime_ns", "mtime_s", "nid", "nlink",
        "opaque", "parent", "payload", "size", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.mode = 0o755
        self.uid = self.gid = self.mtime_s = self.mtime_ns = self.size = self.device_or_block = self.nid = 0
        self.nlink = 1
        self.layout = FLAT_PLAIN
        self.opaque = False
        self.parent: Node | None = None
        self.entries: dict[bytes, Ref] = {}
        self.payload = b""  # a link's target, or a chunk map
        self.xattrs: Xattrs = ()

    def take_attributes(self, entry: Entry) -> None:
        """Owner, mode, time and extended attributes from a member."""
        self.mode, self.uid, self.gid = entry.mode, entry.uid, entry.gid
        self.mtime_s, self.mtime_ns, self.xattrs = entry.mtime_s, entry.mtime_ns, entry.xattrs

    def packed_xattrs(self) -> bytes:
        """The inline xattr area, overlayfs's opaque mark included."""
        return pack_xattrs((*self.xattrs, _OPAQUE) if self.opaque else self.xattrs, "")


Ref = int | Node


@dataclass(frozen=True, slots=True)
class FileData:
    """Where a regular file's content lies: a start block, or chunks (format word and packed block map)."""

    block: int
    size: int
    chunk_format: int = 0
    chunk_map: bytes = b""


NO_DATA = FileData(0, 0)
