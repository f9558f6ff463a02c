"""The input window: reads a stream once, in big pieces, and digests every byte on the way.

Owns one fixed buffer. Callers look at `buf[pos:end]` in place; a view of it is valid until the next call
that may refill (`need`, `skip`, `drain`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

from sharedcache.errors import LimitExceeded

WINDOW_BYTES = 1 << 20


class _ReadsInto(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


class HashingInput:
    """A bounded window over `source`; `total` counts the bytes read, `digest()` covers exactly those."""

    __slots__ = (
        "_limit_bytes",
        "_progress",
        "_readinto",
        "_sha256",
        "_source",
        "buf",
        "end",
        "pos",
        "total",
        "view",
    )

    def __init__(
        self, source: BinaryIO, *, limit_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        self._source = source
        self._readinto = cast(_ReadsInto, source).readinto if hasattr(source, "readinto") else None
        self._limit_bytes = limit_bytes
        self._progress = progress
        self._sha256 = hashlib.sha256()
        self.buf = bytearray(WINDOW_BYTES)
        self.view = memoryview(self.buf)
        self.pos = 0
        self.end = 0
        self.total = 0

    def need(self, n_bytes: int) -> bool:
        """Make `n_bytes` (≤ WINDOW_BYTES) contiguous at `pos`. False when the stream ends before."""
        have = self.end - self.pos
        if have >= n_bytes:
            return True
        if have:
            self.view[:have] = bytes(self.view[self.pos : self.end])
        self.pos, self.end = 0, have
        while self.end < n_bytes:
            if not self._read():
                return False
        return True

    def skip(self, n_bytes: int) -> bool:
        """Pass over `n_bytes` of any size. False when the stream ends before."""
        while n_bytes > self.end - self.pos:
            n_bytes -= self.end - self.pos
            self.pos = self.end
            if not self.need(1):
                return False
        self.pos += n_bytes
        return True

    def drain(self) -> None:
        """Read to the end of the stream, so that the digest covers all of it."""
        while True:
            self.pos = self.end = 0
            if not self._read():
                return

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of everything read so far."""
        return self._sha256.digest()

    def offset(self) -> int:
        """Offset of `pos` in the stream, for messages."""
        return self.total - (self.end - self.pos)

    def _read(self) -> int:
        free = self.view[self.end :]
        if self._readinto is not None:
            n_bytes = self._readinto(free) or 0
        else:
            piece = self._source.read(len(free))
            n_bytes = len(piece)
            free[:n_bytes] = piece
        if not n_bytes:
            return 0
        self.total += n_bytes
        if self.total > self._limit_bytes:
            raise LimitExceeded("total_bytes", allowed=self._limit_bytes, where=f"offset {self._limit_bytes}")
        self._sha256.update(free[:n_bytes])
        self.end += n_bytes
        if self._progress is not None:
            self._progress(self.total)
        return n_bytes
