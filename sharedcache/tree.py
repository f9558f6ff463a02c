"""The layer as a tree of names, built entry by entry; nothing of it ever exists on the host's file system.

Path and duplicate rules (the outcome of extracting with docker, stated once):
- A path below a symbolic link or a file of this layer is refused, never followed.
- Missing parents appear as root:root 0755, mtime 0; a later entry for the folder replaces that.
- Last wins. A folder over a folder takes the new attributes and keeps the content; anything else replaces
  what was there, a whole subtree if it was one.
- A hard link's target must already be in this layer and must not be a folder; links are not followed.
- `.wh.NAME` becomes a character device 0:0 called NAME, `.wh..wh..opq` marks its folder opaque
  (trusted.overlay.opaque=y); other `.wh..wh.*` names are aufs' own and are dropped, with all below them. A
  folder cannot be called `.wh.*`. Where the same layer has NAME too, NAME stays and, if a folder, becomes
  opaque: whiteouts speak of lower layers only (OCI spec).

Memory: an inode without attributes or payload is 64 bytes in `table` (already in its form on disk, number k
at 64*k) and is referred to by the int `k << 3 | type`; folders, links and inodes with attributes are `Node`s.
"""

from __future__ import annotations

import struct

from sharedcache.entry import BLOCK, CHARACTER, DIRECTORY, HARDLINK, REGULAR, SYMLINK, Entry
from sharedcache.erofs_layout import (
    CHUNK_BASED,
    FLAT_INLINE,
    FLAT_PLAIN,
    INODE,
    INODE_BYTES,
    NLINK_OFFSET,
    encode_device,
    inode_format,
    pack_xattrs,
)
from sharedcache.errors import BadArchive, LimitExceeded, printable
from sharedcache.limits import Limits
from sharedcache.node import NO_DATA, S_IFMT, FileData, Node, Ref
from sharedcache.paths import OPAQUE_MARKER, WHITEOUT_PREFIX, split_path

_PLAIN_FORMAT = inode_format(FLAT_PLAIN)
_NLINK = struct.Struct("<I")
_PARENT_CACHE = 4096
# What is charged against metadata_bytes, measured: a name with its plain inode; what a Node costs beyond it.
_NAME_COST = 250
_NODE_COST = 500
_XATTR_COST = 150


class Tree:
    """Grows by `add`; `erofs.write_metadata` reads it afterwards."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.root = Node(DIRECTORY)
        self.root.parent = self.root
        self.table = bytearray()
        self.inodes = [0] * 8  # live ones, by kind
        self.inodes[DIRECTORY] = 1
        self.hardlinks = 0
        self._parents: dict[bytes, Node] = {}
        self._metadata_bytes = 0
        self._whiteout: int | None = None

    def add(self, entry: Entry, data: FileData = NO_DATA) -> None:
        """Put a member into the tree. BadArchive or LimitExceeded when the rules above forbid it."""
        if WHITEOUT_PREFIX in entry.path and self._is_of_aufs(entry.path):
            return
        parent_path, _, leaf = entry.path.rpartition(b"/")
        parent = self._parents.get(parent_path)
        if parent is None or len(leaf) > self._limits.name_bytes or leaf in (b"", b".", b".."):
            parts = split_path(entry.path, self._limits)
            if not parts:
                self._add_root(entry)
                return
            leaf = parts.pop()
            parent = self._folder(parts, entry.path)
            if len(self._parents) >= _PARENT_CACHE:
                self._parents.clear()
            if entry.path.endswith(leaf):
                self._parents[parent_path] = parent
        elif len(entry.path) > self._limits.path_bytes:
            raise LimitExceeded("path_bytes", allowed=self._limits.path_bytes, where=entry.path)
        self._charge(_NAME_COST + len(leaf), entry.path)
        if leaf.startswith(WHITEOUT_PREFIX):
            self._add_whiteout(parent, leaf, entry)
        elif entry.kind == REGULAR and not entry.xattrs and not data.chunk_map:
            self._put(parent, leaf, self._add_plain(entry, data.size, data.block))
        elif entry.kind == DIRECTORY:
            self._add_folder(parent, leaf, entry)
        elif entry.kind == HARDLINK:
            self._add_hardlink(parent, leaf, entry)
        else:
            self._add_other(parent, leaf, entry, data)

    # ── kinds ──

    def _add_plain(self, entry: Entry, size: int, block_or_device: int) -> int:
        number = len(self.table) >> 6
        kind = entry.kind
        self.table += INODE.pack(
            _PLAIN_FORMAT, 0, S_IFMT[kind] | entry.mode, 0, size, block_or_device, number,
            entry.uid, entry.gid, entry.mtime_s, entry.mtime_ns, 1,
        )  # fmt: skip
        self.inodes[kind] += 1
        return number << 3 | kind

    def _add_root(self, entry: Entry) -> None:
        if entry.kind != DIRECTORY:
            raise BadArchive("the image's root is not a folder", where=entry.path)
        pack_xattrs(entry.xattrs, entry.path)
        self.root.take_attributes(entry)

    def _add_folder(self, parent: Node, leaf: bytes, entry: Entry) -> None:
        self._charge_xattrs(entry)
        node = parent.entries.get(leaf)
        if not isinstance(node, Node) or node.kind != DIRECTORY:
            hides_lower = node is not None and node == self._whiteout
            node = self._new_folder(parent, leaf)
            node.opaque = hides_lower
        node.take_attributes(entry)

    def _add_hardlink(self, parent: Node, leaf: bytes, entry: Entry) -> None:
        where = entry.path
        parts = split_path(entry.link, self._limits)
        target: Ref | None = self.root
        holder: Ref | None = None
        for part in parts:
            holder = target
            target = holder.entries.get(part) if isinstance(holder, Node) else None
        if target is None or target == self._whiteout:
            raise BadArchive(
                f"hard link to {printable(entry.link)!r}, which is not in this layer before it", where=where
            )
        if isinstance(target, Node):
            if target.kind == DIRECTORY:
                raise BadArchive(f"hard link to the folder {printable(entry.link)!r}", where=where)
            target.nlink += 1
        else:
            self._change_nlink(target, 1)
        if holder is parent and parts[-1] == leaf:
            raise BadArchive("hard link to itself", where=where)
        self.hardlinks += 1
        self._put(parent, leaf, target)

    def _add_other(self, parent: Node, leaf: bytes, entry: Entry, data: FileData) -> None:
        """Symbolic links, devices, fifos, and files with attributes or chunks."""
        device_or_block = encode_device(*entry.device) if entry.kind in (CHARACTER, BLOCK) else data.block
        if entry.kind != SYMLINK and not entry.xattrs and not data.chunk_map:
            self._put(parent, leaf, self._add_plain(entry, 0, device_or_block))
            return
        self._charge_xattrs(entry)
        node = Node(entry.kind)
        node.take_attributes(entry)
        node.size, node.device_or_block, node.payload = data.size, device_or_block, data.chunk_map
        if data.chunk_map:
            node.layout, node.device_or_block = CHUNK_BASED, data.chunk_format
        if entry.kind == SYMLINK:
            if not entry.link:
                raise BadArchive("symbolic link without a target", where=entry.path)
            if len(entry.link) > self._limits.path_bytes:
                raise LimitExceeded("path_bytes", allowed=self._limits.path_bytes, where=entry.path)
            node.layout, node.payload, node.size = FLAT_INLINE, entry.link, len(entry.link)
        self._charge(len(node.payload), entry.path)
        self.inodes[entry.kind] += 1
        self._put(parent, leaf, node)

    def _is_of_aufs(self, path: bytes) -> bool:
        """Whether the member lies below one of aufs' own names. BadArchive when it lies below another marker."""
        for part in split_path(path, self._limits)[:-1]:
            if part.startswith(WHITEOUT_PREFIX):
                if part.startswith(WHITEOUT_PREFIX * 2) and part != OPAQUE_MARKER:
                    return True
                raise BadArchive(f"{printable(part)!r} is a whiteout marker, not a folder", where=path)
        return False

    def _add_whiteout(self, parent: Node, leaf: bytes, entry: Entry) -> None:
        name = leaf[len(WHITEOUT_PREFIX) :]
        if leaf == OPAQUE_MARKER:
            parent.opaque = True
            return
        if name.startswith(WHITEOUT_PREFIX):
            return
        if entry.kind == DIRECTORY:
            raise BadArchive("a whiteout marker that is a folder", where=entry.path)
        if name in (b"", b".", b".."):
            raise BadArchive("whiteout of no name", where=entry.path)
        old = parent.entries.get(name)
        if isinstance(old, Node) and old.kind == DIRECTORY:
            old.opaque = True
        elif old is None:
            if self._whiteout is None:
                blank = Entry(CHARACTER, b"", 0, 0, 0, 0, 0, 0, b"", (0, 0), (), None)
                self._whiteout = self._add_plain(blank, 0, 0)
            else:
                self._change_nlink(self._whiteout, 1)
                self.hardlinks += 1
            self._put(parent, name, self._whiteout)

    # ── names ──

    def _put(self, parent: Node, leaf: bytes, ref: Ref) -> None:
        entries = parent.entries
        if leaf in entries:
            self._release(entries[leaf])
        entries[leaf] = ref

    def _new_folder(self, parent: Node, leaf: bytes) -> Node:
        node = Node(DIRECTORY)
        node.parent = parent
        self.inodes[DIRECTORY] += 1
        if self.inodes[DIRECTORY] > self._limits.entries:
            raise LimitExceeded("entries", allowed=self._limits.entries, where=leaf)
        self._put(parent, leaf, node)
        return node

    def _folder(self, parts: list[bytes], path: bytes) -> Node:
        """The folder at `parts`, made where missing. BadArchive when something else is in the way."""
        node = self.root
        for part in parts:
            child = node.entries.get(part)
            if child is None or child == self._whiteout:
                self._charge(_NAME_COST + _NODE_COST + len(part), path)
                made = self._new_folder(node, part)
                made.opaque = child is not None
                child = made
            if not isinstance(child, Node) or child.kind != DIRECTORY:
                what = "symbolic link" if isinstance(child, Node) and child.kind == SYMLINK else "file"
                raise BadArchive(
                    f"the path goes through {printable(part)!r}, a {what} of this layer",
                    where=path,
                    remedy="a link is never followed on import: store the entry under the link's target",
                )
            node = child
        return node

    def _release(self, ref: Ref) -> None:
        """A name went away: drop a link of its inode, and all below it if it is a folder."""
        self._parents.clear()
        pending = [ref]
        while pending:
            ref = pending.pop()
            if isinstance(ref, int):
                kind, left = ref & 7, self._change_nlink(ref, -1)
            else:
                ref.nlink -= 1
                kind, left = ref.kind, ref.nlink
                pending.extend(ref.entries.values())
            if left:
                self.hardlinks -= 1
                continue
            self.inodes[kind] -= 1
            if ref == self._whiteout:
                self._whiteout = None

    def _change_nlink(self, ref: int, by: int) -> int:
        at = (ref >> 3) * INODE_BYTES + NLINK_OFFSET
        count = int(_NLINK.unpack_from(self.table, at)[0]) + by
        _NLINK.pack_into(self.table, at, count)
        return count

    def _charge_xattrs(self, entry: Entry) -> None:
        self._charge(_NODE_COST, entry.path)
        if entry.xattrs:
            self._charge(len(pack_xattrs(entry.xattrs, entry.path)) + _XATTR_COST * len(entry.xattrs), entry.path)

    def _charge(self, n_bytes: int, path: bytes) -> None:
        self._metadata_bytes += n_bytes
        if self._metadata_bytes > self._limits.metadata_bytes:
            raise LimitExceeded("metadata_bytes", allowed=self._limits.metadata_bytes, where=path)
