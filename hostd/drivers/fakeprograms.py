"""Programs that the fake driver's sandboxes run: coroutines instead of machine code.

A program reads its stdin, writes its output, looks at the signals it catches, and returns its exit code. Signals that
it does not catch end it as they would a real one.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from hostd.errors import HostdError
from hostd.spec import Command

WINDOW_BYTES = 65536
"""As the agent protocol has it: a process that writes more than this without a reader waits."""

PIECE_BYTES = 32768


class Killed(HostdError):
    """Raised in a program at a signal it does not catch."""

    def __init__(self, signo: int) -> None:
        super().__init__(f"signal {signo}")
        self.signo = signo


class Terminal:
    """What a program sees of the outside. `rows` and `cols` follow the client's window."""

    def __init__(self, command: Command, use_mib: Callable[[int], None]) -> None:
        self.command, self.use_mib = command, use_mib
        self.rows, self.cols = command.rows, command.cols
        self.caught: frozenset[int] = frozenset()
        self.written: deque[tuple[int, int, bytes]] = deque()  # (stream, offset, data) that nobody acknowledged
        self._offsets = {1: 0, 2: 0}
        self._input = bytearray()
        self._input_ended = not command.stdin
        self._signals: deque[int] = deque()
        self.changed = asyncio.Event()

    def begin_at(self, offsets: Mapping[int, int]) -> None:
        """What it writes first is at these offsets: a copy of a machine goes on where that was."""
        self._offsets.update(offsets)

    # The program's side.

    async def write(self, data: bytes, stream: int = 1) -> None:
        """Writes all of it, waiting for room as at a pipe. On a terminal everything is stream 1."""
        stream = 1 if self.command.tty else stream
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            while self.held_bytes(stream) + len(piece) > WINDOW_BYTES:
                await self._next_change()
            self.written.append((stream, self._offsets[stream], piece))
            self._offsets[stream] += len(piece)
            self.tell()

    async def read(self) -> bytes:
        """What came on stdin since the last call; b"" at its end."""
        while not self._input and not self._input_ended:
            await self._next_change()
        data = bytes(self._input)
        self._input.clear()
        self.tell()
        return data

    async def next_signal(self) -> int:
        """The next signal it caught."""
        while not self._signals:
            await self._next_change()
        return self._signals.popleft()

    async def _next_change(self) -> None:
        changed = self.changed
        await changed.wait()

    # The link's side.

    def held_bytes(self, stream: int) -> int:
        """Bytes of a stream that were written and not acknowledged."""
        return sum(len(data) for number, _, data in self.written if number == stream)

    @property
    def input_room(self) -> int:
        """Bytes that stdin takes now."""
        return WINDOW_BYTES - len(self._input)

    def give(self, data: bytes, *, eof: bool = False) -> None:
        """Puts bytes (and perhaps the end) on stdin."""
        if not self._input_ended:
            self._input += data
            self._input_ended = eof
            self.tell()

    def catch(self, signo: int) -> None:
        """A signal that the program catches."""
        self._signals.append(signo)
        self.tell()

    def tell(self) -> None:
        """Wakes whoever waits for anything here."""
        self.changed.set()
        self.changed = asyncio.Event()


Program = Callable[[Terminal], Awaitable[int]]


async def _true(_: Terminal) -> int:
    return 0


async def _false(_: Terminal) -> int:
    return 1


async def _echo(terminal: Terminal) -> int:
    await terminal.write(" ".join(terminal.command.argv[1:]).encode() + b"\n")
    return 0


async def _say(terminal: Terminal) -> int:
    """say OUT ERR CODE"""
    out, err, code = terminal.command.argv[1:4]
    await terminal.write(out.encode(), 1)
    await terminal.write(err.encode(), 2)
    return int(code)


async def _cat(terminal: Terminal) -> int:
    while data := await terminal.read():
        await terminal.write(data)
    return 0


async def _sleep(_: Terminal) -> int:
    await asyncio.Event().wait()
    return 0


async def _deaf(terminal: Terminal) -> int:
    """Takes no notice of SIGTERM, SIGINT and SIGHUP."""
    terminal.caught = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    await terminal.write(b"ready\n")
    await asyncio.Event().wait()
    return 0


async def _polite(terminal: Terminal) -> int:
    """polite CODE: says bye at SIGTERM and ends with CODE"""
    terminal.caught = frozenset({signal.SIGTERM})
    await terminal.write(b"ready\n")
    await terminal.next_signal()
    await terminal.write(b"bye\n")
    return int(terminal.command.argv[1])


async def _env(terminal: Terminal) -> int:
    await terminal.write("".join(f"{key}={value}\n" for key, value in terminal.command.env).encode())
    return 0


async def _pwd(terminal: Terminal) -> int:
    await terminal.write(terminal.command.workdir.encode() + b"\n")
    return 0


async def _size(terminal: Terminal) -> int:
    """The terminal's size, again at each change, until its stdin gives something."""
    terminal.caught = frozenset({signal.SIGWINCH})
    reader = asyncio.ensure_future(terminal.read())
    try:
        while not reader.done():
            await terminal.write(f"{terminal.rows} {terminal.cols}\n".encode())
            resized = asyncio.ensure_future(terminal.next_signal())
            await asyncio.wait({reader, resized}, return_when=asyncio.FIRST_COMPLETED)
            resized.cancel()
    finally:
        reader.cancel()
    return 0


async def _flood(terminal: Terminal) -> int:
    """flood N: N bytes, counted out line by line of 16"""
    left = int(terminal.command.argv[1])
    count = 0
    while left > 0:
        lines = b"".join(b"%015d\n" % number for number in range(count, count + PIECE_BYTES // 16))
        await terminal.write(lines[:left])
        count += PIECE_BYTES // 16
        left -= len(lines)
    return 0


async def _use(terminal: Terminal) -> int:
    """use MIB: touches that much memory and keeps it"""
    terminal.use_mib(int(terminal.command.argv[1]))
    await terminal.write(b"ready\n")
    await asyncio.Event().wait()
    return 0


async def _fault(_: Terminal) -> int:
    raise Killed(signal.SIGSEGV)


async def _exit(terminal: Terminal) -> int:
    return int(terminal.command.argv[1])


PROGRAMS: Mapping[str, Program] = {
    "true": _true, "false": _false, "echo": _echo, "say": _say, "cat": _cat, "sleep": _sleep, "deaf": _deaf,
    "polite": _polite, "env": _env, "pwd": _pwd, "size": _size, "flood": _flood, "use": _use, "fault": _fault,
    "exit": _exit,
}  # fmt: skip
"""By the last part of argv[0]."""
