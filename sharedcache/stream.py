"""The input: one thread reads (and with it decompresses) ahead, one digests, the consumer looks at windows in place.

Owns two threads, from `with` to its end, and at most four windows of 2 MiB. A window's first 512 bytes are kept
free: what is left of the window before moves there, so that `need` finds its bytes in one piece.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import BinaryIO, Protocol, Self, cast

from sharedcache.errors import LimitExceeded

WINDOW_BYTES = 2 << 20
HEAD_BYTES = 512
_WINDOWS = 4


class _ReadsInto(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


class _Window:
    """`buf[HEAD_BYTES:end]` came from the stream; `error` ended it there. `hashed`: the digest has taken it in."""

    __slots__ = ("buf", "end", "error", "hashed")

    def __init__(self) -> None:
        self.buf = bytearray(HEAD_BYTES + WINDOW_BYTES)
        self.end = HEAD_BYTES
        self.error: BaseException | None = None
        self.hashed: Future[None] | None = None


class _Feeder(threading.Thread):
    """Fills windows in order. The one that is not full is the last."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__(name="layer-input", daemon=True)
        self.filled: SimpleQueue[_Window] = SimpleQueue()
        self.sha256 = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "layer-digest")
        self._used: SimpleQueue[_Window | None] = SimpleQueue()
        self._made = 0
        self._stopped = False
        self._readinto = _reader_of(source)

    def run(self) -> None:
        with self._hasher:
            while (window := self._next()) is not None:
                try:
                    self._fill(window)
                except BaseException as error:  # whatever it is belongs to the consumer
                    window.error = error
                view = memoryview(window.buf)[HEAD_BYTES : window.end]
                window.hashed = self._hasher.submit(self.sha256.update, view)
                self.filled.put(window)
                if window.end < len(window.buf):
                    return

    def give_back(self, window: _Window | None) -> None:
        """The consumer is done with `window`; None: it wants no more."""
        self._stopped = self._stopped or window is None
        self._used.put(window)

    def _next(self) -> _Window | None:
        if self._stopped:
            return None
        if self._made < _WINDOWS and self._used.empty():
            self._made += 1
            return _Window()
        return self._used.get()

    def _fill(self, window: _Window) -> None:
        if window.hashed is not None:
            window.hashed.result()
        window.end = HEAD_BYTES
        view = memoryview(window.buf)
        while window.end < len(view) and (n_bytes := self._readinto(view[window.end :])):
            window.end += n_bytes


class HashingInput:
    """A window over `source`; `total` counts the bytes that passed, `digest()` covers exactly those.

    Callers look at `buf[pos:end]` in place; a view of it is valid until the next call of `need`, `skip` or
    `drain`. What reading raises is raised by the call that needs the bytes; LimitExceeded (total_bytes) too.
    Leaving the `with` block waits for the read under way.
    """

    __slots__ = ("_current", "_ended", "_feeder", "_limit_bytes", "_progress", "end", "pos", "total", "view")

    def __init__(self, source: BinaryIO, *, limit_bytes: int, progress: Callable[[int], None] | None = None) -> None:
        self._feeder = _Feeder(source)
        self._limit_bytes = limit_bytes
        self._progress = progress
        self._current: _Window | None = None
        self._ended = False
        self.view = memoryview(b"")
        self.pos = 0
        self.end = 0
        self.total = 0

    def __enter__(self) -> Self:
        self._feeder.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._feeder.give_back(None)
        self._feeder.join()

    def need(self, n_bytes: int) -> bool:
        """Make `n_bytes` (≤ HEAD_BYTES) contiguous at `pos`. False when the stream ends before."""
        return self.end - self.pos >= n_bytes or (self._advance() and self.end - self.pos >= n_bytes)

    def skip(self, n_bytes: int) -> bool:
        """Pass over `n_bytes` of any size. False when the stream ends before."""
        while n_bytes > self.end - self.pos:
            n_bytes -= self.end - self.pos
            self.pos = self.end
            if not self._advance():
                return False
        self.pos += n_bytes
        return True

    def drain(self) -> None:
        """Read to the end of the stream, so that the digest covers all of it."""
        self.pos = self.end
        while self._advance():
            self.pos = self.end

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the stream; call it after `drain`, outside the `with`."""
        return self._feeder.sha256.digest()

    def offset(self) -> int:
        """Offset of `pos` in the stream, for messages."""
        return self.total - (self.end - self.pos)

    def _advance(self) -> bool:
        """Go on to the next window, what is left (< HEAD_BYTES) in front of it. False: there is no more."""
        if self._ended:
            return False
        left = bytes(self.view[self.pos : self.end])
        if self._current is not None:
            self._feeder.give_back(self._current)
        window = self._current = self._feeder.filled.get()
        self.view = memoryview(window.buf)
        self.end = window.end
        self.pos = HEAD_BYTES - len(left)
        self.view[self.pos : HEAD_BYTES] = left
        n_bytes = window.end - HEAD_BYTES
        self._ended = window.end < len(window.buf)
        self.total += n_bytes
        if self.total > self._limit_bytes:
            raise LimitExceeded("total_bytes", allowed=self._limit_bytes, where=f"offset {self._limit_bytes}")
        if window.error is not None:
            raise window.error
        if n_bytes and self._progress is not None:
            self._progress(self.total)
        return n_bytes > 0


def _reader_of(source: BinaryIO) -> Callable[[memoryview], int]:
    """readinto of `source`, or of what stands for it where there is only read. 0 is the end."""
    if hasattr(source, "readinto"):
        readinto = cast(_ReadsInto, source).readinto
        return lambda view: readinto(view) or 0

    def read(view: memoryview) -> int:
        piece = source.read(len(view))
        view[: len(piece)] = piece
        return len(piece)

    return read
