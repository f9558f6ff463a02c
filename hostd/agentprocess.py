"""One process in a guest, as hostd holds it: its output waiting to be taken, its end, its standard input.

Promise: what waits is bounded by the protocol's windows (64 KiB a stream) and by MAX_PIECES, however small the pieces
are that a guest cuts its output into. Output is acknowledged, and so more of it let in, only when it was taken.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from guestagent.errors import GuestRefused
from guestagent.messages import AgentEvent, Exited, Output, ReplyBody, Stream
from guestagent.protocol import AgentSession
from hostd.drivers.contract import Exit, OutputPiece
from hostd.errors import AgentLost

STDIN_STEP_BYTES = 16384
MAX_PIECES = 256
"""Beyond this a piece joins the last one of its stream, past pieces of the other: the order of two pipes is not known
to the byte anyway."""


class Link(Protocol):
    """What a process needs of its link to the agent (hostd/agentlink.py)."""

    async def request(self, build: Callable[[AgentSession], tuple[int, bytes]]) -> ReplyBody: ...
    def acknowledge(self, proc: int, stream: Stream, offset: int) -> None: ...
    def stdin_room(self, proc: int) -> int: ...
    def send_stdin(self, proc: int, data: bytes, *, eof: bool = False) -> None: ...
    def drop(self, proc: int) -> None: ...


@dataclass
class _Waiting:
    """Output that nobody has taken yet; `end` is the stream's offset after it."""

    stream: Stream
    data: bytearray
    end: int


class AgentProcess:
    """Implements hostd.drivers.contract.ProcessLink."""

    def __init__(self, link: Link, proc: int, *, stdin: bool = True) -> None:
        self._link, self.proc, self._stdin_open = link, proc, stdin
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def deliver(self, event: AgentEvent) -> None:
        """Takes an event of this process from the link."""
        if isinstance(event, Output):
            self._put(event)
        elif isinstance(event, Exited) and not self._exit.done():
            code = 128 + event.signal if event.signal else event.code
            self._exit.set_result(Exit(code, event.signal))
        self._changed.set()

    def _put(self, event: Output) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.stream is not event.stream and len(self._waiting) >= MAX_PIECES:
            last = next(piece for piece in reversed(self._waiting) if piece.stream is event.stream)
        if last is not None and last.stream is event.stream:
            last.data += event.data
            last.end = event.offset + len(event.data)
        else:
            self._waiting.append(_Waiting(event.stream, bytearray(event.data), event.offset + len(event.data)))

    @property
    def ended(self) -> bool:
        """Whether its end, or its loss, is known."""
        return self._exit.done()

    def fail(self, why: str) -> None:
        """The link is dead: whoever waits is told."""
        if not self._exit.done():
            self._exit.set_exception(AgentLost(why))
            self._exit.exception()  # mark as seen: not every process has somebody waiting
        self._changed.set()

    async def output(self) -> AsyncIterator[OutputPiece]:
        """See ProcessLink.output."""
        while True:
            while self._waiting:
                piece = self._waiting.popleft()
                yield OutputPiece(int(piece.stream), bytes(piece.data))
                self._link.acknowledge(self.proc, piece.stream, piece.end)
            if self._exit.done():
                return
            self._changed.clear()
            await self._changed.wait()

    async def wait(self) -> Exit:
        """See ProcessLink.wait."""
        return await asyncio.shield(self._exit)

    async def write(self, data: bytes) -> None:
        """See ProcessLink.write."""
        view = memoryview(data)
        while view and self._stdin_open and not self._exit.done():
            step = min(self._link.stdin_room(self.proc), STDIN_STEP_BYTES, len(view))
            if step:
                self._link.send_stdin(self.proc, bytes(view[:step]))
                view = view[step:]
            else:
                self._changed.clear()
                await self._changed.wait()

    async def close_stdin(self) -> None:
        """See ProcessLink.close_stdin."""
        if self._stdin_open and not self._exit.done():
            self._stdin_open = False
            self._link.send_stdin(self.proc, b"", eof=True)

    async def signal(self, signo: int) -> None:
        """See ProcessLink.signal."""
        await self._tolerant(lambda session: session.signal(self.proc, signo))

    async def resize_tty(self, rows: int, cols: int) -> None:
        """See ProcessLink.resize_tty."""
        await self._tolerant(lambda session: session.winsize(self.proc, rows, cols))

    async def release(self) -> None:
        """See ProcessLink.release."""
        self._waiting.clear()
        await self._tolerant(lambda session: session.forget(self.proc))
        self._link.drop(self.proc)

    async def _tolerant(self, request: Callable[[AgentSession], tuple[int, bytes]]) -> None:
        try:
            await self._link.request(request)
        except GuestRefused as refusal:
            if refusal.errno not in (errno.ESRCH, errno.ENOTTY):
                raise AgentLost(str(refusal), reason="AgentRefused") from refusal
