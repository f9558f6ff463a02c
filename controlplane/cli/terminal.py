"""The local terminal and standard streams: raw mode, window size, detach keys, waiting reads and writes.

Standard descriptors are shared with the shell and never made non-blocking: each read or write waits for
readiness first. Regular files are always ready (epoll refuses them).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import struct
import termios
import tty
from collections.abc import Callable
from types import TracebackType

READ_BYTES = 64 << 10  # what one stdin message may hold
_WRITE_BYTES = select.PIPE_BUF  # what a ready pipe takes without blocking (pipe(7))
DETACH_KEYS = b"\x10\x11"  # ctrl-p ctrl-q, as docker


class RawTerminal:
    """Raw mode on a terminal while the context is open; the old mode comes back on every way out."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._saved: list[object] | None = None

    def __enter__(self) -> RawTerminal:
        self._saved = termios.tcgetattr(self._descriptor)
        tty.setraw(self._descriptor, termios.TCSADRAIN)  # not TCSAFLUSH: typed-ahead input stays
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
            self._saved = None


def window_size(*descriptors: int) -> tuple[int, int] | None:
    """(rows, columns) of the first descriptor that is a terminal and knows them."""
    for descriptor in descriptors:
        try:
            rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8)))
        except OSError:
            continue
        if rows and columns:
            return rows, columns
    return None


class DetachKeys:
    """Looks for DETACH_KEYS in what is typed; a first key is held back until the next byte decides."""

    def __init__(self) -> None:
        self._held = False

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """(what to send on, whether to detach now)."""
        first, second = DETACH_KEYS[:1], DETACH_KEYS[1:]
        data = (first if self._held else b"") + typed
        before, found, _ = data.partition(first + second)
        if found:
            return before, True
        self._held = data.endswith(first)
        return (data[:-1] if self._held else data), False


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _ready(descriptor: int, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        watch(descriptor, _settle, ready)
    except PermissionError:
        return  # a regular file or /dev/null: epoll(7) has no opinion, reads and writes do not wait
    try:
        await ready
    finally:
        unwatch(descriptor)


async def read_when_ready(descriptor: int) -> bytes:
    """At most READ_BYTES; b"" at the end (also when a terminal hung up)."""
    loop = asyncio.get_running_loop()
    await _ready(descriptor, loop.add_reader, loop.remove_reader)
    try:
        return os.read(descriptor, READ_BYTES)
    except OSError:
        return b""


async def write_all(descriptor: int, data: bytes) -> None:
    """All of `data`. BrokenPipeError when nobody reads it, OSError otherwise."""
    loop = asyncio.get_running_loop()
    left = memoryview(data)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    while left:
        if not poll.poll(0):
            await _ready(descriptor, loop.add_writer, loop.remove_writer)
        left = left[os.write(descriptor, left[:_WRITE_BYTES]) :]
