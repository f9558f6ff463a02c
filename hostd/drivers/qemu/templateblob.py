"""A template's memory: one blob in the store, and the sealed memfds that clones are made from.

Blob (all numbers little-endian):

    0 …                    the guest's base RAM, `ram_bytes`, sparse: a page of zeros is a hole
    ram_bytes …            QEMU's device state as migrated with x-ignore-shared, `state_bytes`
    last 24 bytes          b"SLTMPL01" | u64 ram_bytes | u64 state_bytes

In memory the two parts are memfds of their own, sealed against writing, growing and shrinking: nobody, whatever a
clone's devices do, can punch or write what all the other clones map (QEMU's balloon and free page reporting punch
holes into the file behind a private mapping). QEMU opens them by /proc/self/fd/N, which it inherits.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from hostd.errors import TemplateUnusable

RAM_NAME = "sandloom-template"
"""The memfd's name, as it shows in /proc/PID/maps: `/memfd:sandloom-template (deleted)`."""

_TRAILER = struct.Struct("<8sQQ")
_MAGIC = b"SLTMPL01"
_COPY_BYTES = 4 << 20
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MOST_STATE_BYTES = 256 << 20


@dataclass(frozen=True)
class TemplateMemory:
    """Two sealed memfds. The owner closes them; mappings of clones outlive that."""

    ram_fd: int
    state_fd: int
    ram_bytes: int

    def duplicate(self) -> TemplateMemory:
        """The same memory by descriptors of its own, which live as long as their owner wants."""
        ram_fd = os.dup(self.ram_fd)
        try:
            return TemplateMemory(ram_fd, os.dup(self.state_fd), self.ram_bytes)
        except BaseException:
            os.close(ram_fd)
            raise

    def close(self) -> None:
        """Lets go of both. Idempotent it is not: one owner, one close."""
        os.close(self.ram_fd)
        os.close(self.state_fd)

    def state_reader(self) -> AbstractContextManager[int]:
        """A descriptor of the state with a position of its own, at the start: each clone reads it once."""
        return reader(self.state_fd)

    def held_bytes(self) -> int:
        """How much memory the two take."""
        return held_bytes(self.ram_fd, self.state_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FrozenGuest:
    """A stopped guest's memory while nobody owns it yet. A context manager: what was not sealed is closed."""

    def __init__(self, ram_fd: int, ram_bytes: int, state: bytes) -> None:
        self._ram_fd: int | None = ram_fd
        self._ram_bytes, self._state = ram_bytes, state

    def seal(self) -> TemplateMemory:
        """Its sealed memory, once; the caller owns it. OSError (EBUSY) while a QEMU still maps it for writing."""
        assert self._ram_fd is not None, "sealed once already"
        seal(self._ram_fd)
        memory = TemplateMemory(self._ram_fd, sealed_state(self._state), self._ram_bytes)
        self._ram_fd = None
        return memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ram_fd is not None:
            os.close(self._ram_fd)
            self._ram_fd = None


def new_ram(ram_bytes: int) -> int:
    """An empty memfd of `ram_bytes` that can still be written: what a template boots on."""
    descriptor = os.memfd_create(RAM_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, ram_bytes)
    return descriptor


def seal(descriptor: int) -> None:
    """Nothing can change the memfd's content from now on. OSError (EBUSY) while it is mapped for writing."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


def is_sealed(descriptor: int) -> bool:
    """Whether all seals are set."""
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS


@contextmanager
def reader(descriptor: int) -> Iterator[int]:
    """A descriptor of the same memfd, to read, with a position of its own, at the start."""
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def held_bytes(*descriptors: int) -> int:
    """How much memory these memfds take."""
    return sum(os.fstat(descriptor).st_blocks * 512 for descriptor in descriptors)


def data_extents(descriptor: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of the first `size_bytes` that is not a hole."""
    start = 0
    while start < size_bytes:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError:  # ENXIO: holes up to the end
            return
        if start >= size_bytes:
            return
        end = min(size_bytes, os.lseek(descriptor, start, os.SEEK_HOLE))
        yield start, end
        start = end


def write_blob(memory: TemplateMemory, out: BinaryIO) -> None:
    """Writes the blob's layout to `out` (a new file at its start), holes kept, pages of zeros made holes."""
    zeros = bytes(4096)
    for start, end in data_extents(memory.ram_fd, memory.ram_bytes):
        for at in range(start, end, _COPY_BYTES):
            data = os.pread(memory.ram_fd, min(_COPY_BYTES, end - at), at)
            for page in range(0, len(data), 4096):
                if data[page : page + 4096] != zeros:
                    out.seek(at + page)
                    out.write(data[page : page + 4096])
    state = os.pread(memory.state_fd, os.fstat(memory.state_fd).st_size, 0)
    out.seek(memory.ram_bytes)
    out.write(state)
    out.write(_TRAILER.pack(_MAGIC, memory.ram_bytes, len(state)))
    out.flush()


def load(path: Path) -> TemplateMemory:
    """Sealed memfds with the content of a blob. Blocks for tens of milliseconds. TemplateUnusable names the blob."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ram_bytes, state_bytes = _trailer(descriptor, path)
        ram_fd = new_ram(ram_bytes)
        try:
            _copy(descriptor, 0, ram_fd, ram_bytes)
            state_fd = sealed_state(os.pread(descriptor, state_bytes, ram_bytes))
            seal(ram_fd)
        except BaseException:
            os.close(ram_fd)
            raise
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # held once, in the memfd, not twice
        return TemplateMemory(ram_fd, state_fd, ram_bytes)
    finally:
        os.close(descriptor)


def from_clone(path: Path, pid: int) -> TemplateMemory:
    """The RAM that the running clone `pid` maps, with the state from the blob it was made from. TemplateUnusable."""
    ram_fd = _template_of(pid)
    if ram_fd is None:
        raise TemplateUnusable(f"process {pid} maps no template")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ram_bytes, state_bytes = _trailer(descriptor, path)
        if os.fstat(ram_fd).st_size != ram_bytes or not is_sealed(ram_fd):
            raise TemplateUnusable(f"process {pid} maps another template than {path}")
        return TemplateMemory(ram_fd, sealed_state(os.pread(descriptor, state_bytes, ram_bytes)), ram_bytes)
    except BaseException:
        os.close(ram_fd)
        raise
    finally:
        os.close(descriptor)


def _template_of(pid: int) -> int | None:
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if str(entry.readlink()).startswith(f"/memfd:{RAM_NAME} "):
                return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pass  # it ended meanwhile
    return None


def sealed_state(state: bytes) -> int:
    """A sealed memfd that holds QEMU's device state."""
    descriptor = os.memfd_create("sandloom-template-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(state)
        seal(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _trailer(descriptor: int, path: Path) -> tuple[int, int]:
    size_bytes = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _TRAILER.size, max(0, size_bytes - _TRAILER.size))
    if len(raw) == _TRAILER.size:
        magic, ram_bytes, state_bytes = _TRAILER.unpack(raw)
        whole = ram_bytes + state_bytes + _TRAILER.size == size_bytes
        if magic == _MAGIC and whole and ram_bytes % 4096 == 0 and 0 < state_bytes <= _MOST_STATE_BYTES:
            return ram_bytes, state_bytes
    raise TemplateUnusable(f"{path}: is no template of this version; it is made anew")


def _copy(source: int, offset: int, target: int, count_bytes: int) -> None:
    for start, end in data_extents(source, offset + count_bytes):
        at = max(start, offset)
        while at < end:
            data = os.pread(source, min(_COPY_BYTES, end - at), at)
            if not data:
                raise TemplateUnusable("a template's blob ended early; it is made anew")
            os.pwrite(target, data, at - offset)
            at += len(data)
