"""A second reading of EROFS images, written from the kernel's rules and sharing no code with the writer.

It is stricter than any kernel: every rule that some Linux since 6.1 enforces is checked, above all those that the
kernel of the machine that runs the tests does not enforce. ImageError names the rule that was broken.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
HUGE = 2 << 20
FLAT_PLAIN, FLAT_INLINE, CHUNKED = 0, 2, 4
XATTR_PREFIXES = {
    1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security.",
}  # fmt: skip
DIRENT_TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7,
}  # fmt: skip


class ImageError(AssertionError):
    """The image breaks a rule."""


@dataclass
class Inode:
    """One inode as it is on disk. `extents`: (offset in the file, offset in the image, bytes) of its data."""

    nid: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int
    size: int
    layout: int
    device: int
    xattrs: dict[str, bytes]
    extents: list[tuple[int, int, int]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # every path that leads here


class Image:
    """All of an image, checked while it is read. `paths` maps every path (b"" for the root) to its inode."""

    def __init__(self, path: Path) -> None:
        self._data = _Sparse(path)
        self.paths: dict[bytes, Inode] = {}
        self.inodes: dict[int, Inode] = {}
        head = self._data.at(1024, 128)
        (magic, crc, compat, bits, ext, root, count, _, _, blocks, meta, xattr_block, self.uuid, _, incompat) = (
            struct.unpack("<IIIBBHQQIIII16s16sI44x", head)
        )
        _rule(magic == 0xE0F5E1E2 and bits == 12 and ext == 0 and xattr_block == 0, "superblock")
        body = bytearray(self._data.at(1024, BLOCK - 1024))
        body[4:8] = bytes(4)
        _rule(crc32c_slow(bytes(body)) == crc, "superblock checksum")
        _rule(blocks * BLOCK == self._data.size and self._data.size % HUGE == 0, "size in the superblock")
        _rule(compat == 3 and incompat in (0, 4), "features")
        self._meta = meta * BLOCK
        self._walk(root)
        _rule(len(self.inodes) == count, f"inode count {count}, found {len(self.inodes)}")
        self._check_links(root)
        self._check_overlaps()

    def content(self, path: bytes) -> bytes:
        """The bytes of a regular file or of a link's target."""
        inode = self.paths[path]
        data = bytearray(inode.size)
        for at, offset, n_bytes in inode.extents:
            data[at : at + n_bytes] = self._data.at(offset, n_bytes)
        return bytes(data)

    # ── reading ──

    def _walk(self, root: int) -> None:
        pending = [(b"", root, root)]
        while pending:
            path, nid, parent = pending.pop()
            inode = self._inode(nid)
            self.paths[path] = inode
            inode.names.append(path)
            if stat.S_ISDIR(inode.mode):
                _rule(len(inode.names) == 1, f"{path!r}: a folder with two names")
                pending.extend(self._folder(path, inode, parent))

    def _inode(self, nid: int) -> Inode:
        if nid in self.inodes:
            return self.inodes[nid]
        at = self._meta + nid * 32
        (form, xslots, mode, _, size, union, ino, uid, gid, mtime_s, mtime_ns, nlink) = struct.unpack(
            "<HHHHQIIIIqII16x", self._data.at(at, 64)
        )
        _rule(form & 1 == 1 and mtime_ns < 10**9 and nlink > 0 and ino > -1, f"inode {nid}")
        xbytes = 12 + 4 * (xslots - 1) if xslots else 0
        layout = form >> 1 & 7
        inode = Inode(nid, mode, uid, gid, mtime_s * 10**9 + mtime_ns, nlink, size, layout, 0, {})
        inode.xattrs = self._xattrs(at + 64, xbytes)
        kind = stat.S_IFMT(mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            inode.device = os.makedev(union >> 8 & 0xFFF, union & 0xFF | union >> 12 & 0xFFF00)
        elif kind != stat.S_IFIFO:
            inode.extents = self._extents(inode, at, xbytes, union)
        self.inodes[nid] = inode
        return inode

    def _extents(self, inode: Inode, at: int, xbytes: int, union: int) -> list[tuple[int, int, int]]:
        tail_at = at + 64 + xbytes
        if inode.layout == CHUNKED:
            return list(self._chunks(inode, tail_at, union))
        whole, tail = inode.size, 0
        if inode.layout == FLAT_INLINE:
            tail = (inode.size - 1) % BLOCK + 1
            whole = inode.size - tail
            _rule(tail_at % BLOCK + tail <= BLOCK, f"inode {inode.nid}: inline data crosses a block")
            if stat.S_ISLNK(inode.mode) and inode.size < BLOCK:  # before Linux 6.12's relaxation
                in_page = (at + 63) % BLOCK + 1 + xbytes
                _rule(in_page + inode.size <= BLOCK, f"inode {inode.nid}: link is not in its inode's block")
        else:
            _rule(inode.layout == FLAT_PLAIN, f"inode {inode.nid}: layout {inode.layout}")
        if whole >= HUGE and stat.S_ISREG(inode.mode):
            _rule(union * BLOCK % HUGE == 0, f"inode {inode.nid}: a large file is not aligned to 2 MiB")
        extents = [(0, union * BLOCK, whole)] if whole else []
        return [*extents, (whole, tail_at, tail)] if tail else extents

    def _chunks(self, inode: Inode, at: int, union: int) -> Iterator[tuple[int, int, int]]:
        _rule(union & ~0x1F == 0 and at % 4 == 0, f"inode {inode.nid}: chunk format {union:x}")
        chunk = BLOCK << (union & 0x1F)
        count = -(-inode.size // chunk)
        for number, (block,) in enumerate(struct.iter_unpack("<I", self._data.at(at, 4 * count))):
            if block != 0xFFFFFFFF:
                yield number * chunk, block * BLOCK, min(chunk, inode.size - number * chunk)

    def _xattrs(self, at: int, n_bytes: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        area = self._data.at(at, n_bytes)
        _rule(not any(area[:12]), "shared attributes")
        pos = 12
        while pos < n_bytes:
            name_bytes, index, value_bytes = struct.unpack_from("<BBH", area, pos)
            name = XATTR_PREFIXES[index] + area[pos + 4 : pos + 4 + name_bytes].decode("utf-8", "surrogateescape")
            _rule(name not in found, f"attribute {name} twice")
            found[name] = area[pos + 4 + name_bytes : pos + 4 + name_bytes + value_bytes]
            pos = -(-(pos + 4 + name_bytes + value_bytes) // 4) * 4
        _rule(pos == n_bytes or not n_bytes, "attributes go over their area")
        return found

    def _folder(self, path: bytes, inode: Inode, parent: int) -> Iterator[tuple[bytes, int, int]]:
        self.paths[path] = inode
        data = self.content(path)
        last = b""
        seen = set()
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            _rule(count > 0, f"{path!r}: empty folder block")
            heads = [struct.unpack_from("<QHB", block, 12 * number) for number in range(count)]
            for number, (nid, at, kind) in enumerate(heads):
                end = heads[number + 1][1] if number + 1 < count else len(block)
                name = block[at:end] if number + 1 < count else block[at:end].rstrip(b"\0")
                _rule(last < name and 0 < len(name) <= 255 and not {0, 47} & set(name), f"{path!r}: name {name!r}")
                last = name
                _rule(DIRENT_TYPES[stat.S_IFMT(self._inode(nid).mode)] == kind, f"{path!r}/{name!r}: type")
                if name in (b".", b".."):
                    _rule(nid == (inode.nid if name == b"." else parent), f"{path!r}: {name!r} leads elsewhere")
                    seen.add(name)
                else:
                    yield (path + b"/" + name if path else name), nid, inode.nid
        _rule(seen == {b".", b".."}, f"{path!r}: no . or ..")

    # ── rules over all of it ──

    def _check_links(self, root: int) -> None:
        below: dict[int, int] = {}
        for path, inode in self.paths.items():
            if stat.S_ISDIR(inode.mode) and path:
                parent = self.paths[path.rpartition(b"/")[0]].nid
                below[parent] = below.get(parent, 0) + 1
        for nid, inode in self.inodes.items():
            wanted = 2 + below.get(nid, 0) if stat.S_ISDIR(inode.mode) else len(inode.names)
            _rule(inode.nlink == wanted, f"{inode.names[0]!r}: {inode.nlink} links, {wanted} are there")

    def _check_overlaps(self) -> None:
        spans = sorted(
            (offset, offset + n_bytes, inode.names[0])
            for inode in self.inodes.values()
            for _, offset, n_bytes in inode.extents
        )
        end, owner = BLOCK, b"the superblock"
        for first, stop, name in spans:
            _rule(first >= end, f"data of {name!r} and {owner!r} overlap")
            _rule(stop <= self._data.size, f"data of {name!r} is behind the end")
            end, owner = stop, name


class _Sparse:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def at(self, offset: int, n_bytes: int) -> bytes:
        data = os.pread(self._file.fileno(), n_bytes, offset)
        _rule(len(data) == n_bytes, f"read of {n_bytes} bytes at {offset}, behind the end")
        return data


def crc32c_slow(data: bytes) -> int:
    """CRC-32C, bit by bit, without the final inversion."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def _rule(kept: bool, what: str) -> None:
    if not kept:
        raise ImageError(what)
