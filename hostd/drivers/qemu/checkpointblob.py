"""A checkpoint's memory: one blob in the store, and the sealed memfds that restored guests map privately.

Blob (numbers little-endian), in the tenant's own sharing domain:

    0 …                      base RAM, `ram_bytes`, sparse: a page of zeros is a hole
    ram_bytes …              the elastic region, `elastic_bytes` (0: the guest has none), sparse likewise
    … `state_bytes`          QEMU's device state, with no page of the two in it (checkpointstream.py)
    … `about_bytes`          what it is a checkpoint of: JSON (hostd/checkpoint.py), opaque here
    last 40 bytes            b"SLCKPT01" | u64 ram_bytes | u64 elastic_bytes | u64 state_bytes | u64 about_bytes

In memory each of ram, elastic and state is a memfd of its own, sealed against writing, growing and shrinking: what one
restored guest does, no other one can see. The store has hashed the blob before it is given to `load`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hostd.drivers.qemu.templateblob import data_extents, held_bytes, is_sealed, reader, seal
from hostd.errors import CheckpointUnusable
from native import _balloon

RAM_NAME, ELASTIC_NAME, STATE_NAME = (f"sandloom-checkpoint-{part}" for part in ("ram", "elastic", "state"))
"""The memfds' names, as they show in /proc/PID/maps: `/memfd:sandloom-checkpoint-ram (deleted)`."""

_TRAILER = struct.Struct("<8sQQQQ")
_MAGIC = b"SLCKPT01"
_RUN = struct.Struct("<QQ")  # first page, pages: native._balloon's form of a list
_PAGE_BYTES = 4096
_COPY_BYTES = 4 << 20
_MOST_SMALL_BYTES = 256 << 20
_ZEROS = bytes(_COPY_BYTES)


@dataclass(frozen=True)
class CheckpointMemory:
    """Sealed memfds; `elastic_fd` is -1 when the guest has no elastic region. One owner, one close()."""

    ram_fd: int
    elastic_fd: int
    state_fd: int
    ram_bytes: int
    elastic_bytes: int

    def close(self) -> None:
        """Lets go of them; mappings of restored guests outlive that."""
        for descriptor in (self.ram_fd, self.elastic_fd, self.state_fd):
            if descriptor >= 0:
                os.close(descriptor)

    def state_reader(self) -> AbstractContextManager[int]:
        """A descriptor of the state with a position of its own, at the start: each guest reads it once."""
        return reader(self.state_fd)

    def held_bytes(self) -> int:
        """How much memory they take."""
        return held_bytes(*(each for each in (self.ram_fd, self.elastic_fd, self.state_fd) if each >= 0))


class DraftMemory:
    """Memfds that are still written. A context manager: what was not sealed is closed."""

    def __init__(self, ram_bytes: int, elastic_bytes: int) -> None:
        self.ram_bytes, self.elastic_bytes = ram_bytes, elastic_bytes
        self._open: list[int] = []
        self.ram_fd = self._new(RAM_NAME, ram_bytes)
        self.elastic_fd = self._new(ELASTIC_NAME, elastic_bytes) if elastic_bytes else -1

    def _new(self, name: str, size_bytes: int) -> int:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._open.append(descriptor)
        os.ftruncate(descriptor, size_bytes)
        return descriptor

    def seal(self, state: bytes) -> CheckpointMemory:
        """The sealed memory, once; the caller owns it."""
        state_fd = self._new(STATE_NAME, 0)
        with open(state_fd, "wb", closefd=False) as file:
            file.write(state)
        for descriptor in self._open:
            seal(descriptor)
        self._open.clear()
        return CheckpointMemory(self.ram_fd, self.elastic_fd, state_fd, self.ram_bytes, self.elastic_bytes)

    def __enter__(self) -> DraftMemory:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.pop())


def copy_data(source: int, target: int, size_bytes: int) -> None:
    """Copies what of the first `size_bytes` is no hole to the same places of `target`, which is all holes. Fast: the
    guest stands still meanwhile; pages of zeros are looked for later. OSError."""
    with mmap.mmap(source, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        for start, end in data_extents(source, size_bytes):
            for at in range(start, end, _COPY_BYTES):
                with view[at : min(end, at + _COPY_BYTES)] as piece:
                    _write(target, piece, at)


def punch_zeros(descriptor: int, size_bytes: int) -> None:
    """Makes holes of the pages of zeros in a file of memory that is not sealed yet."""
    runs = bytearray()
    for start, end in data_extents(descriptor, size_bytes):
        for at in range(start, end, _COPY_BYTES):
            data = os.pread(descriptor, min(_COPY_BYTES, end - at), at)
            for first, last in zero_runs(data):
                runs += _RUN.pack((at + first) // _PAGE_BYTES, (last - first) // _PAGE_BYTES)
    whole_file = _balloon.MemoryMap([(0, size_bytes, 0, 0)])
    _balloon.punch(whole_file.coalesce(runs, _PAGE_BYTES), [descriptor])


def write_blob(memory: CheckpointMemory, about: bytes, out: BinaryIO) -> None:
    """Writes the blob's layout to `out`, a new file at its start."""
    _write_sparse(memory.ram_fd, memory.ram_bytes, out, 0)
    if memory.elastic_fd >= 0:
        _write_sparse(memory.elastic_fd, memory.elastic_bytes, out, memory.ram_bytes)
    state = os.pread(memory.state_fd, os.fstat(memory.state_fd).st_size, 0)
    out.seek(memory.ram_bytes + memory.elastic_bytes)
    out.write(state)
    out.write(about)
    out.write(_TRAILER.pack(_MAGIC, memory.ram_bytes, memory.elastic_bytes, len(state), len(about)))
    out.flush()


def is_blob(path: Path) -> bool:
    """Whether the file ends as a checkpoint of a guest does. OSError."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TRAILER.size))
        return file.read(len(_MAGIC)) == _MAGIC


def read_about(path: Path) -> bytes:
    """What the blob is a checkpoint of. CheckpointUnusable names the blob."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = _parts(descriptor, path)
        return os.pread(descriptor, parts.about_bytes, parts.about_at)
    finally:
        os.close(descriptor)


def load(path: Path) -> CheckpointMemory:
    """Sealed memfds with the content of a blob. Blocks for about 1 ms a MiB held. CheckpointUnusable, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = _parts(descriptor, path)
        with DraftMemory(parts.ram_bytes, parts.elastic_bytes) as draft:
            _copy_part(descriptor, 0, draft.ram_fd, parts.ram_bytes)
            if parts.elastic_bytes:
                _copy_part(descriptor, parts.ram_bytes, draft.elastic_fd, parts.elastic_bytes)
            state = os.pread(descriptor, parts.state_bytes, parts.ram_bytes + parts.elastic_bytes)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # held once, in the memfds, not twice
            return draft.seal(state)
    finally:
        os.close(descriptor)


def from_fork(path: Path, pid: int) -> CheckpointMemory:
    """The memory that guest `pid`, restored from the blob, maps: who is restored next shares pages with it.
    CheckpointUnusable when it maps another, OSError when it is gone."""
    found = _memfds_of(pid)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = _parts(descriptor, path)
        finally:
            os.close(descriptor)
        sizes = {name: os.fstat(each).st_size for name, each in found.items() if is_sealed(each)}
        wanted = {RAM_NAME: parts.ram_bytes, ELASTIC_NAME: parts.elastic_bytes, STATE_NAME: parts.state_bytes}
        if sizes != {name: size for name, size in wanted.items() if size}:
            raise CheckpointUnusable(f"process {pid} maps another checkpoint than {path}")
    except BaseException:
        for each in found.values():
            os.close(each)
        raise
    elastic_fd = found.get(ELASTIC_NAME, -1)
    return CheckpointMemory(found[RAM_NAME], elastic_fd, found[STATE_NAME], parts.ram_bytes, parts.elastic_bytes)


def _memfds_of(pid: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        name = str(entry.readlink()).removeprefix("/memfd:").removesuffix(" (deleted)")
        if name in (RAM_NAME, ELASTIC_NAME, STATE_NAME) and name not in found:
            found[name] = os.open(entry, (os.O_RDONLY if name == STATE_NAME else os.O_RDWR) | os.O_CLOEXEC)
    return found


@dataclass(frozen=True)
class _Parts:
    ram_bytes: int
    elastic_bytes: int
    state_bytes: int
    about_bytes: int

    @property
    def about_at(self) -> int:
        return self.ram_bytes + self.elastic_bytes + self.state_bytes


def _parts(descriptor: int, path: Path) -> _Parts:
    size_bytes = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _TRAILER.size, max(0, size_bytes - _TRAILER.size))
    if len(raw) == _TRAILER.size:
        magic, *sizes = _TRAILER.unpack(raw)
        parts = _Parts(*sizes)
        whole = parts.about_at + parts.about_bytes + _TRAILER.size == size_bytes
        fit = parts.ram_bytes > 0 and parts.ram_bytes % _PAGE_BYTES == parts.elastic_bytes % _PAGE_BYTES == 0
        small = 0 < parts.state_bytes <= _MOST_SMALL_BYTES and parts.about_bytes <= _MOST_SMALL_BYTES
        if magic == _MAGIC and whole and fit and small:
            return parts
    raise CheckpointUnusable(f"{path}: is no checkpoint of this version; make it anew")


def _write(target: int, data: memoryview | bytes, at: int) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            with view[done:] as rest:
                done += os.pwrite(target, rest, at + done)


def _copy_part(source: int, offset: int, target: int, count_bytes: int) -> None:
    for start, end in data_extents(source, offset + count_bytes):
        at = max(start, offset)
        while at < end:
            data = os.pread(source, min(_COPY_BYTES, end - at), at)
            if not data:
                raise CheckpointUnusable("a checkpoint's blob ended early; make it anew")
            _write(target, data, at - offset)
            at += len(data)


def _write_sparse(source: int, size_bytes: int, out: BinaryIO, base: int) -> None:
    for start, end in data_extents(source, size_bytes):
        for at in range(start, end, _COPY_BYTES):
            out.seek(base + at)
            out.write(os.pread(source, min(_COPY_BYTES, end - at), at))


def zero_runs(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of pages of zeros in `data`, whole pages. Pure."""
    if data == _ZEROS[: len(data)]:
        yield 0, len(data)
        return
    zeros, start = _ZEROS[:_PAGE_BYTES], -1
    for at in range(0, len(data), _PAGE_BYTES):
        if data[at : at + _PAGE_BYTES] == zeros:
            start = at if start < 0 else start
        elif start >= 0:
            yield start, at
            start = -1
    if start >= 0:
        yield start, len(data)
