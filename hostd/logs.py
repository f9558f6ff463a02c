"""A sandbox's recorded output: complete, resumable, bounded.

    log, log.1     records: u64 time_ns | u8 stream (1 out, 2 err) | u64 offset in that stream | u32 length | bytes
                   (big endian). When `log` passes half of the bound it becomes `log.1`; a new `log` begins with one
                   empty record a stream, which keeps the offsets of a stream whose own records are gone.

The offsets make hostd's restart exact: what the last record says is what the agent is asked to go on from.
A torn last record (a crash or a full disk while writing) is cut off, so that every record in the middle is whole.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct(">QBQI")
DEFAULT_BOUND_BYTES = 32 << 20
READ_BYTES = 1 << 20
STREAMS = (1, 2)


@dataclass(frozen=True)
class LogEntry:
    """One piece of output; `offset` counts bytes of its stream from the start of the process."""

    time_ns: int
    stream: int
    offset: int
    data: bytes


def entries(data: bytes) -> Iterator[tuple[int, LogEntry]]:
    """Whole records in `data` as (end position, entry); stops at a torn one. Pure."""
    position = 0
    while position + HEADER.size <= len(data):
        time_ns, stream, offset, length = HEADER.unpack_from(data, position)
        end = position + HEADER.size + length
        if stream not in STREAMS or end > len(data):
            return
        yield end, LogEntry(time_ns, stream, offset, data[position + HEADER.size : end])
        position = end


def last_lines(kept: Sequence[LogEntry], lines: int) -> list[LogEntry]:
    """The entries that hold the last `lines` lines (all when 0), the first one cut where they begin. Pure."""
    if lines <= 0:
        return list(kept)
    found: list[LogEntry] = []
    missing = lines + (1 if kept and kept[-1].data.endswith(b"\n") else 0)
    for entry in reversed(kept):
        count = entry.data.count(b"\n")
        if count < missing:
            found.append(entry)
            missing -= count
            continue
        at = len(entry.data)
        for _ in range(missing):
            at = entry.data.rfind(b"\n", 0, at)
        rest = entry.data[at + 1 :]
        if rest:
            found.append(LogEntry(entry.time_ns, entry.stream, entry.offset + at + 1, rest))
        break
    return found[::-1]


def read(path: Path, position: int = 0) -> Iterator[tuple[int, LogEntry]]:
    """Whole records of a file from `position` on, as (end position, entry). Holds READ_BYTES and one record."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        want_bytes = READ_BYTES
        while True:
            file.seek(position)
            data = file.read(want_bytes)
            end = 0
            for end, entry in entries(data):
                yield position + end, entry
            position += end
            if end:
                want_bytes = READ_BYTES
            elif len(data) == want_bytes and want_bytes < DEFAULT_BOUND_BYTES:
                want_bytes *= 2  # one record larger than that
            else:
                return


class OutputLog:
    """Appends, and serves any number of followers. Owned by its sandbox; close() ends the followers."""

    def __init__(self, folder: Path, bound_bytes: int = DEFAULT_BOUND_BYTES) -> None:
        self._path, self._old = folder / "log", folder / "log.1"
        self._half_bytes = bound_bytes // 2
        self.offsets = dict.fromkeys(STREAMS, 0)
        for path in (self._old, self._path):
            self._recover(path)
        self._file = self._path.open("ab", buffering=0)
        self._generation = 0  # how often `log` was turned over since open
        self._closed = False
        self._changed = asyncio.Event()

    def _recover(self, path: Path) -> None:
        if not path.exists():
            return
        good = 0
        for end, entry in read(path):
            good = end
            self.offsets[entry.stream] = entry.offset + len(entry.data)
        if good != path.stat().st_size:
            os.truncate(path, good)

    def begin_at(self, time_ns: int, offsets: Mapping[int, int]) -> None:
        """A new log whose streams begin at these offsets: what was before is in another sandbox's log. OSError."""
        for stream in STREAMS:
            self._put(HEADER.pack(time_ns, stream, offsets.get(stream, 0), 0))
            self.offsets[stream] = offsets.get(stream, 0)

    def append(self, time_ns: int, stream: int, data: bytes) -> None:
        """Records `data` as the next bytes of `stream`. OSError when the disk takes no more: then nothing of it is
        recorded, and it may be tried again."""
        if self._file.tell() > self._half_bytes:
            self._turn_over(time_ns)
        self._put(HEADER.pack(time_ns, stream, self.offsets[stream], len(data)) + data)
        self.offsets[stream] += len(data)
        self._changed.set()
        self._changed = asyncio.Event()

    def _turn_over(self, time_ns: int) -> None:
        self._file.close()
        self._path.rename(self._old)
        self._file = self._path.open("ab", buffering=0)
        self._generation += 1
        for stream, offset in self.offsets.items():
            self._put(HEADER.pack(time_ns, stream, offset, 0))

    def _put(self, record: bytes) -> None:
        position = self._file.tell()
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError(28, f"the disk took {written} of {len(record)} bytes of the log")
        except OSError:
            self._file.truncate(position)
            raise

    def close(self) -> None:
        """No more output will come. Idempotent."""
        self._closed = True
        self._file.close()
        self._changed.set()

    def kept(self) -> list[LogEntry]:
        """All that is kept, oldest first."""
        return [entry for path in (self._old, self._path) for _, entry in read(path) if entry.data]

    async def follow(self, *, from_start: bool = True, tail_lines: int = 0) -> AsyncIterator[LogEntry]:
        """Entries from the oldest kept one (or the last `tail_lines` lines, or from now), until close(). A slow
        reader may lose rotated ones."""
        generation, position = self._generation - 1, 0  # `log.1`, which need not be there
        if not from_start or tail_lines > 0:
            generation, position = self._generation, self._path.stat().st_size if self._path.exists() else 0
        if from_start and tail_lines > 0:
            for entry in last_lines(self.kept(), tail_lines):  # all of it from before `position`: no await since
                yield entry
        while True:
            changed, closed = self._changed, self._closed
            if generation < self._generation - 1:  # turned over twice meanwhile: what was between is lost
                generation, position = self._generation - 1, 0
            current = generation == self._generation
            # The file stays open while it is read, so that turning it over in between loses nothing.
            for end, entry in read(self._path if current else self._old, position):
                position = end
                if entry.data:
                    yield entry
            if not current:
                generation, position = generation + 1, 0
            elif closed:
                return
            else:
                await changed.wait()
