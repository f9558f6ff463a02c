"""What a user's side of a stream has: standard descriptors, raw terminal, keys to detach, signals to pass on.

One Console serves all connections of one command, so that nothing typed and no signal is lost while a broken
connection is made again. Input comes from `next_input`, one message at a time; signals and window sizes go first.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.command import Stdio
from controlplane.cli.terminal import DetachKeys, RawTerminal, read_when_ready, window_size, write_all

PROXIED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
INTERRUPTS_TO_LEAVE = 3


class Console:
    """Async context manager. `left` is set when the user wants out: detach keys, or SIGINT and SIGTERM that were
    not heeded INTERRUPTS_TO_LEAVE times, or once while no process is there (`awaiting`) or no connection to it."""

    def __init__(self, stdio: Stdio, *, stdin: bool, tty: bool, detachable: bool) -> None:
        self._stdio, self._tty = stdio, tty
        self._keys = DetachKeys() if tty and detachable else None
        self._reading = stdin
        self._control: deque[sandboxes_pb2.StreamInput] = deque()
        self._wake = asyncio.Event()
        self._read: asyncio.Task[bytes] | None = None
        self._stack = ExitStack()
        self._interrupts = 0
        self.awaiting = True  # no process has taken signals yet
        self.connected = False  # somebody is there to take signals now
        self.when_begun: Callable[[], None] = lambda: None  # called once, before the first output
        self.left = asyncio.Event()
        self.detached = False
        self.signalled = 0  # the signal that made the user leave
        self.data_sent = False  # standard input went out that a broken connection may have lost
        self._ended = False  # standard input is at its end

    @property
    def size(self) -> tuple[int, int] | None:
        """(rows, columns) of the user's terminal."""
        return window_size(self._stdio.stdin, self._stdio.stdout)

    async def __aenter__(self) -> Console:
        loop = asyncio.get_running_loop()
        for number in PROXIED:
            loop.add_signal_handler(number, self.interrupted, number)
            self._stack.callback(loop.remove_signal_handler, number)
        if self._tty:
            loop.add_signal_handler(signal.SIGWINCH, self.resized)
            self._stack.callback(loop.remove_signal_handler, signal.SIGWINCH)
            if self._reading and os.isatty(self._stdio.stdin):
                self._stack.enter_context(RawTerminal(self._stdio.stdin))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._read is not None:
            self._read.cancel()
            await asyncio.gather(self._read, return_exceptions=True)

    def interrupted(self, number: int) -> None:
        """A signal to pass on; too many of them, or one too early, and the user leaves."""
        self._interrupts += number in (signal.SIGINT, signal.SIGTERM)
        if self.awaiting or not self.connected or self._interrupts >= INTERRUPTS_TO_LEAVE:
            self.signalled = number
            self.left.set()
            return
        self._put(sandboxes_pb2.StreamInput(signal=number))

    def resized(self) -> None:
        """Tells the process the window's size as it is now."""
        size = self.size
        if size is not None:
            self._put(sandboxes_pb2.StreamInput(window=sandboxes_pb2.WindowSize(rows=size[0], cols=size[1])))

    def _put(self, message: sandboxes_pb2.StreamInput) -> None:
        self._control.append(message)
        self._wake.set()

    async def next_input(self) -> sandboxes_pb2.StreamInput:
        """The next message to send. Safe to cancel: what was read meanwhile is kept for the next call."""
        while True:
            if self._control:
                return self._control.popleft()
            if self._reading and self._read is None:
                self._read = asyncio.create_task(read_when_ready(self._stdio.stdin))
            self._wake.clear()
            waker = asyncio.create_task(self._wake.wait())
            try:
                waits = {waker, self._read} if self._read is not None else {waker}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waker.cancel()
            if self._read is not None and self._read.done() and not self._control:
                message = self._typed(self._read.result())
                self._read = None
                if message is not None:
                    return message

    def _typed(self, data: bytes) -> sandboxes_pb2.StreamInput | None:
        if not data:
            self._reading, self._ended = False, True
            return sandboxes_pb2.StreamInput(stdin_eof=True)
        if self._keys is not None:
            data, leave = self._keys.feed(data)
            if leave:
                self.detached = True
                self._reading = False
                self.left.set()
        if not data:
            return None
        self.data_sent = True
        return sandboxes_pb2.StreamInput(stdin=data)

    def again(self) -> None:
        """A new connection begins: says once more what may be said twice (end of input, window size)."""
        if self._ended:
            self._put(sandboxes_pb2.StreamInput(stdin_eof=True))
        if self._tty:
            self.resized()

    def begun(self) -> None:
        """The process is there: signals are for it from now on."""
        if self.awaiting:
            self.awaiting = False
            self.when_begun()

    async def show(self, stream: str, data: bytes) -> None:
        """Writes to standard output or error. BrokenPipeError when nobody reads it."""
        await write_all(self._stdio.stdout if stream == "stdout" else self._stdio.stderr, data)
