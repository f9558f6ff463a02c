"""Which bytes of a layer's blob are which file of its mount, as tables that QEMU takes (qemu/src/onecopy.c says how).

Only whole files of a page and more whose data lie in one piece: what is smaller, sparse or scattered, and all metadata,
stays the blob's. The largest first, for each takes a mapping of each guest's (0.25 KiB of slab [m]).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
MOST_PIECES = 4096
"""Of a layer. A Debian userland's 225 MiB have 3,544 files of a page and more, 92 % of its bytes [m]."""

PIECES_A_TABLE = 512
"""QEMU's main loop stands still while it takes one: 4 ms on a quiet machine [m], 30 on a crowded one."""

MAGIC = b"SLPIECE1"
_HEADER = struct.Struct("=8sQQII")
_RECORD = struct.Struct("=QQII")
_FS_IOC_FIEMAP = 0xC020660B  # linux/fs.h
_FIEMAP = struct.Struct("=QQIIII")  # linux/fiemap.h: start, length, flags, mapped, room, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_EXTENT_ROOM = 2
_ODD_FLAGS = ~0x1
"""Everything but FIEMAP_EXTENT_LAST: unknown place, encoded, not aligned, inline, shared."""


@dataclass(frozen=True)
class Piece:
    """`length` bytes of the blob from `offset` on, whole pages, are the file `path` of the mount."""

    offset: int
    length: int
    path: bytes


def find(mount: Path) -> list[Piece]:
    """Every piece of a mounted layer, by what the kernel says of its files' extents. OSError. Blocks: some 20 µs a
    file."""
    found: dict[int, Piece] = {}
    root = os.fsencode(mount)
    device = os.lstat(root).st_dev
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 (bytes)
            info = os.lstat(path)
            if not stat.S_ISREG(info.st_mode) or info.st_size < PAGE_BYTES or info.st_dev != device:
                continue
            if info.st_ino not in found:
                offset = _place(path, info.st_size)
                if offset is not None:
                    found[info.st_ino] = Piece(offset, _pages(info.st_size), os.path.relpath(path, root))
    return list(found.values())


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _place(path: bytes, size: int) -> int | None:
    """Where in the blob a file's data begin, when they lie there in one piece and by pages."""
    buffer = bytearray(_FIEMAP.pack(0, (1 << 64) - 1, 0, 0, _EXTENT_ROOM, 0) + bytes(_EXTENT_ROOM * _EXTENT.size))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, buffer)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            return None
        raise
    finally:
        os.close(descriptor)
    if _FIEMAP.unpack_from(buffer)[3] != 1:
        return None
    logical, physical, length, flags = _EXTENT.unpack_from(buffer, _FIEMAP.size)
    if logical or physical % PAGE_BYTES or length < size or flags & _ODD_FLAGS:
        return None
    return int(physical)


def chosen(pieces: Iterable[Piece], at_most: int = MOST_PIECES) -> list[Piece]:
    """The largest, in the order of the blob. Pure."""
    largest = sorted(pieces, key=lambda one: (-one.length, one.offset))[:at_most]
    return sorted(largest, key=lambda one: one.offset)


def tables(blob: tuple[int, int], mount: Path, pieces: Sequence[Piece]) -> list[bytes]:
    """The tables of these pieces; `blob` is its (device, inode). Pure."""
    rounds = range(0, len(pieces), PIECES_A_TABLE)
    return [_table(blob, os.fsencode(mount), pieces[at : at + PIECES_A_TABLE]) for at in rounds]


def _table(blob: tuple[int, int], mount: bytes, pieces: Sequence[Piece]) -> bytes:
    parts = [_HEADER.pack(MAGIC, *blob, len(pieces), len(mount)), _ended(mount)]
    for one in pieces:
        parts += [_RECORD.pack(one.offset, one.length, len(one.path), 0), _ended(one.path)]
    table = b"".join(parts)
    return table + bytes(-len(table) % PAGE_BYTES)


def _ended(path: bytes) -> bytes:
    ended = path + b"\0"
    return ended + bytes(-len(ended) % 8)
