"""A user-kernel checkpoint as a blob in the store, in the tenant's own sharing domain. Numbers are little-endian.

    0 … `image_bytes`        what `runsc checkpoint` wrote: the kernel's state and memory, compressed
    … `upper_bytes`          what the sandbox had written to its root: a pax tar with extended attributes
    … `about_bytes`          what it is a checkpoint of: JSON (hostd/checkpoint.py), opaque here
    last 32 bytes            b"SLRUNSC1" | u64 image_bytes | u64 upper_bytes | u64 about_bytes

Nothing of it is held in memory: what is open are descriptors.
"""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hostd.errors import CheckpointUnusable

_TRAILER = struct.Struct("<8sQQQ")
_MAGIC = b"SLRUNSC1"
_MOST_ABOUT_BYTES = 16 << 20
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A part of an open file."""

    descriptor: int
    offset: int
    size_bytes: int

    def copy_to(self, path: Path) -> None:
        """Makes the file `path` of it. OSError. Blocks."""
        with path.open("xb") as out:
            self.append_to(out)

    def append_to(self, out: BinaryIO) -> None:
        """Writes it to `out` where that stands. OSError. Blocks."""
        at, end = self.offset, self.offset + self.size_bytes
        while at < end:
            data = os.pread(self.descriptor, min(_COPY_BYTES, end - at), at)
            if not data:
                raise OSError(f"it ends {end - at} bytes early")
            out.write(data)
            at += len(data)


@dataclass(frozen=True)
class SavedKernel:
    """Implements hostd.drivers.contract.CheckpointMemory. Owns the pieces' descriptors."""

    image: Piece
    upper: Piece

    def held_bytes(self) -> int:
        """See the contract: what it takes on disk; of the memory it takes nothing."""
        return self.image.size_bytes + self.upper.size_bytes

    def write(self, about: bytes, out: BinaryIO) -> None:
        """See the contract."""
        self.image.append_to(out)
        self.upper.append_to(out)
        out.write(about)
        out.write(_TRAILER.pack(_MAGIC, self.image.size_bytes, self.upper.size_bytes, len(about)))
        out.flush()

    def close(self) -> None:
        """See the contract."""
        for descriptor in {self.image.descriptor, self.upper.descriptor}:
            os.close(descriptor)


def taken_from(folder: Path, *, keep: bool = False) -> SavedKernel:
    """The saved kernel in `folder`/checkpoint.img and `folder`/upper.tar; the folder goes unless it is to be kept, what
    is open stays."""
    pieces: list[Piece] = []
    try:
        for name in ("checkpoint.img", "upper.tar"):
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            pieces.append(Piece(descriptor, 0, os.fstat(descriptor).st_size))
        if not keep:
            shutil.rmtree(folder)
    except BaseException:
        for piece in pieces:
            os.close(piece.descriptor)
        raise
    return SavedKernel(*pieces)


def recognises(path: Path) -> bool:
    """Whether the file ends as such a blob does. OSError."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TRAILER.size))
        return file.read(len(_MAGIC)) == _MAGIC


def _sizes(descriptor: int, path: Path) -> tuple[int, int, int]:
    total = os.fstat(descriptor).st_size
    if total >= _TRAILER.size:
        magic, *sizes = _TRAILER.unpack(os.pread(descriptor, _TRAILER.size, total - _TRAILER.size))
        if magic == _MAGIC and sum(sizes) == total - _TRAILER.size and sizes[2] <= _MOST_ABOUT_BYTES:
            return sizes[0], sizes[1], sizes[2]
    raise CheckpointUnusable(f"{path}: is no checkpoint of a user-space kernel; make it anew")


def read_about(path: Path) -> bytes:
    """What the blob is a checkpoint of. CheckpointUnusable names the blob."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        image, upper, about = _sizes(descriptor, path)
        return os.pread(descriptor, about, image + upper)
    finally:
        os.close(descriptor)


def load(path: Path) -> SavedKernel:
    """The blob, open. CheckpointUnusable names it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        image, upper, _ = _sizes(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return SavedKernel(Piece(descriptor, 0, image), Piece(descriptor, image, upper))
