"""What the fake driver's sandboxes are: a machine in memory, its processes, and hostd's links to them.

Machines and processes live on while nobody is linked to them; a link is what one attached engine gives out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from controlplane.api.services import ALL_KERNEL, ServicePolicy
from hostd.drivers.contract import Exit, Loss, OutputPiece
from hostd.drivers.fakeprograms import Killed, Program, Terminal
from hostd.errors import AgentLost, InvalidSpec
from hostd.journal import Handle
from hostd.memory.events import MemoryEvents
from hostd.memory.values import MemorySignals
from hostd.spec import Resources

MAIN = 1
LAST_SIGNAL, SIGKILL, SIGWINCH = 64, 9, 28
IGNORED = frozenset({17, 18, 23, SIGWINCH})  # what Linux does with them when they are not caught (signal(7))


@dataclass
class FakeProcess:
    """A process of a machine. Lives on while nobody is linked to it."""

    number: int
    terminal: Terminal
    ended: asyncio.Future[Exit]
    task: asyncio.Task[None] | None = None

    def signal(self, signo: int) -> None:
        if self.ended.done():
            return
        if signo in self.terminal.caught and signo != SIGKILL:
            self.terminal.catch(signo)
        elif signo not in IGNORED:
            self.end(Exit(128 + signo, signo))

    def end(self, how: Exit) -> None:
        if not self.ended.done():
            self.ended.set_result(how)
            self.terminal.tell()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


@dataclass
class Machine:
    """One sandbox's kernel, as far as there is one."""

    uid: str
    handle: Handle
    resources: Resources
    lost: asyncio.Future[Loss]
    processes: dict[int, FakeProcess] = field(default_factory=dict)
    services: ServicePolicy = ALL_KERNEL
    actual_mib: int = 0
    used_mib: int = 0
    asked_at_s: float = 0.0
    signals: MemorySignals = field(default_factory=MemorySignals)
    memory_events: MemoryEvents = field(default_factory=MemoryEvents)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(MAIN + 1))

    def lose(self, loss: Loss) -> None:
        """It is gone, and everything in it."""
        if not self.lost.done():
            self.lost.set_result(loss)
        self.memory_events.close()
        for process in self.processes.values():
            if process.task is not None:
                process.task.cancel()
            process.terminal.tell()


class FakeLink:
    """Implements hostd.drivers.contract.ProcessLink."""

    def __init__(self, machine: Machine, process: FakeProcess) -> None:
        self._machine, self._process, self._terminal = machine, process, process.terminal
        self._cut = False

    def cut(self) -> None:
        """The engine is let go of: whoever waits here is told, the process runs on."""
        self._cut = True
        self._terminal.tell()

    async def output(self) -> AsyncIterator[OutputPiece]:
        """See ProcessLink.output."""
        terminal = self._terminal
        while not self._cut and not self._machine.lost.done():
            changed = terminal.changed
            if terminal.written:
                stream, offset, data = terminal.written[0]
                yield OutputPiece(stream, data)
                acknowledge(terminal, {stream: offset + len(data)})
            elif self._process.ended.done():
                return
            else:
                await changed.wait()

    async def wait(self) -> Exit:
        """See ProcessLink.wait."""
        while not self._process.ended.done():
            if self._cut or self._machine.lost.done():
                raise AgentLost(self._machine.lost.result().message if self._machine.lost.done() else "let go of")
            await self._terminal.changed.wait()
        return self._process.ended.result()

    async def write(self, data: bytes) -> None:
        """See ProcessLink.write."""
        view = memoryview(data)
        while view and not self._process.ended.done() and not self._cut and not self._machine.lost.done():
            room = min(self._terminal.input_room, len(view))
            if room:
                self._terminal.give(bytes(view[:room]))
                view = view[room:]
            else:
                await self._terminal.changed.wait()

    async def close_stdin(self) -> None:
        """See ProcessLink.close_stdin."""
        self._terminal.give(b"", eof=True)

    async def signal(self, signo: int) -> None:
        """See ProcessLink.signal."""
        if not 1 <= signo <= LAST_SIGNAL:
            raise InvalidSpec(f"signal {signo} is outside 1..{LAST_SIGNAL}")
        if self._machine.lost.done():
            raise AgentLost(self._machine.lost.result().message)
        self._process.signal(signo)

    async def resize_tty(self, rows: int, cols: int) -> None:
        """See ProcessLink.resize_tty."""
        self._terminal.rows, self._terminal.cols = rows, cols
        self._process.signal(SIGWINCH)

    async def release(self) -> None:
        """See ProcessLink.release."""
        self._machine.processes.pop(self._process.number, None)


async def run(machine: Machine, process: FakeProcess, program: Program) -> None:
    try:
        how = Exit(await program(process.terminal))
    except Killed as killed:
        how = Exit(128 + killed.signo, killed.signo)
    process.end(how)
    if process.number == MAIN:  # its PID namespace goes with it
        for other in machine.processes.values():
            other.end(Exit(128 + SIGKILL, SIGKILL))


def acknowledge(terminal: Terminal, offsets: Mapping[int, int]) -> None:
    """The host holds each stream's bytes before its offset: they are forgotten here."""
    kept = [
        (stream, max(offset, offsets.get(stream, 0)), data[max(0, offsets.get(stream, 0) - offset) :])
        for stream, offset, data in terminal.written
    ]
    terminal.written.clear()
    terminal.written.extend(piece for piece in kept if piece[2])
    terminal.tell()
