"""EROFS on disk: constants and pure packing. Values from Linux' fs/erofs/erofs_fs.h; all little endian.

Superblock (128 bytes at 1024): magic, crc32c, feature_compat, block bits, ext slots, root nid (16 bit), inode
count, build time (64+32), blocks, meta block, shared xattr block, uuid 16, name 16, feature_incompat, …
Inode, extended form (64 bytes): format (bit 0: extended, bits 1-3: data layout), xattr slots, mode, reserved,
size 64, union (data block | device | chunk format), ino 32, uid 32, gid 32, mtime 64+32, nlink 32.
Its address is meta block x 4096 + nid x 32.
Directory block: entries (nid 64, name offset 16, type 8, 0) in byte order of their names, then the names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from sharedcache.errors import BadArchive

BLOCK_BITS = 12
BLOCK_BYTES = 1 << BLOCK_BITS
HUGE_BYTES = 2 << 20
SLOT_BYTES = 32
INODE_BYTES = 64
NLINK_OFFSET = 44
NO_BLOCK = 0xFFFF_FFFF

FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = 0, 2, 4
COMPAT_SB_CHECKSUM, COMPAT_MTIME = 1, 2
INCOMPAT_CHUNKED_FILE = 4

INODE = struct.Struct("<HHHHQIIIIqII16x")
DIRENT = struct.Struct("<QHBx")
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
_XATTR_ENTRY = struct.Struct("<BBH")
_XATTR_HEADER_BYTES = 12
_MAGIC = 0xE0F5E1E2
_SUPER_OFFSET = 1024
_XATTR_EXACT = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_XATTR_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))


def inode_format(layout: int) -> int:
    """i_format of an extended inode."""
    return 1 | layout << 1


def encode_device(major: int, minor: int) -> int:
    """Linux' new_encode_dev: 12 bits of major, 20 of minor."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def pack_xattrs(xattrs: Iterable[tuple[bytes, bytes]], where: str | bytes) -> bytes:
    """The inline xattr area behind an inode: 12-byte header, entries padded to 4. Empty without attributes.

    BadArchive for a name EROFS has no index for, or one that is too long.
    """
    entries = [_pack_xattr(name, value, where) for name, value in sorted(xattrs)]
    return bytes(_XATTR_HEADER_BYTES) + b"".join(entries) if entries else b""


def xattr_slots(packed: bytes) -> int:
    """i_xattr_icount for an area made by `pack_xattrs`."""
    return (len(packed) - _XATTR_HEADER_BYTES) // 4 + 1 if packed else 0


def _pack_xattr(name: bytes, value: bytes, where: str | bytes) -> bytes:
    index, rest = _XATTR_EXACT.get(name, 0), b""
    if not index:
        for prefix, number in _XATTR_PREFIXES:
            if name.startswith(prefix):
                index, rest = number, name[len(prefix) :]
                break
        if not rest or 0 in rest or len(name) > 255:
            raise BadArchive(
                f"extended attribute {name[:80]!r} cannot be stored",
                where=where,
                remedy="keep user., trusted., security. and POSIX ACL attributes only (tar --xattrs-exclude)",
            )
    if len(value) > 65535:
        raise BadArchive(f"extended attribute {name[:80]!r} has {len(value)} bytes, over 65535", where=where)
    entry = _XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
    return entry + bytes(-len(entry) % 4)


def split_names(names: Sequence[bytes]) -> list[int]:
    """How many of the sorted `names` each directory block takes, in order."""
    if sum(map(len, names)) + DIRENT.size * len(names) <= BLOCK_BYTES:
        return [len(names)]
    counts = []
    count = used = 0
    for name in names:
        need = DIRENT.size + len(name)
        if used + need > BLOCK_BYTES:
            counts.append(count)
            count = used = 0
        count += 1
        used += need
    return [*counts, count]


def pack_dirents(names: Sequence[bytes], nids: Sequence[int], types: Sequence[int]) -> bytes:
    """One directory block, unpadded: the entries, then the names back to back."""
    heads = bytearray(DIRENT.size * len(names))
    name_offset = len(heads)
    pack_into = DIRENT.pack_into
    at = 0
    for name, nid, kind in zip(names, nids, types, strict=True):
        pack_into(heads, at, nid, name_offset, kind)
        at += 12
        name_offset += len(name)
    return bytes(heads) + b"".join(names)


def pack_superblock(*, root_nid: int, inodes: int, blocks: int, meta_block: int, uuid: bytes, incompat: int) -> bytes:
    """Block 0, 4096 bytes, with its checksum (crc32c from byte 1024, seed ~0, not inverted; super.c)."""
    fields = [_MAGIC, 0, COMPAT_SB_CHECKSUM | COMPAT_MTIME, BLOCK_BITS, 0, root_nid, inodes, 0, 0,
              blocks, meta_block, 0, uuid, b"", incompat]  # fmt: skip
    body = _SUPERBLOCK.pack(*fields).ljust(BLOCK_BYTES - _SUPER_OFFSET, b"\0")
    fields[1] = crc32c(body)
    return (bytes(_SUPER_OFFSET) + _SUPERBLOCK.pack(*fields)).ljust(BLOCK_BYTES, b"\0")


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC32C = _crc32c_table()


def crc32c(data: bytes, crc: int = 0xFFFF_FFFF) -> int:
    """CRC-32C (Castagnoli) without the final inversion, as the kernel's crc32c() gives it."""
    for byte in data:
        crc = (crc >> 8) ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc
