"""Streams into a sandbox: attach to its main process, run one more, read its log.

Each is a generator of StreamOutput that ends with the process, and whose closing (the client went away) leaves nothing
behind: an attach lets the process run, an exec ends it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol

from controlplane.api.v1 import sandboxes_pb2
from hostd import edge
from hostd.command import resolve_exec
from hostd.drivers.contract import ProcessLink
from hostd.errors import CommandFailed, HostdError, InvalidSpec, StartFailed
from hostd.lifecycle import ENDED, Phase
from hostd.logs import last_lines
from hostd.sandbox import Sandbox
from hostd.spec import Command, ProcessSpec
from hostd.starting import Live
from hostd.tasks import OwnedTasks, to_its_end

Inputs = AsyncIterator[sandboxes_pb2.StreamInput]
Outputs = AsyncIterator[sandboxes_pb2.StreamOutput]

RUNNING_DEADLINE_S = 300.0
"""How long a client that attaches waits for the sandbox to run: many may be starting."""

ENDED_DEADLINE_S = 60.0
FIRST_INPUT_S = 30.0
HANG_UP_S, PUT_AWAY_S = 1.0, 5.0
STARTED_OR_ENDED = frozenset({*ENDED, Phase.RUNNING, Phase.STOPPING, Phase.PARKED})


async def start_of(inputs: Inputs) -> sandboxes_pb2.StreamStart:
    """The first message of a stream. InvalidSpec when it is another one or does not come."""
    try:
        async with asyncio.timeout(FIRST_INPUT_S):
            first = await anext(inputs, None)
    except TimeoutError:
        raise InvalidSpec(f"no `start` came within {FIRST_INPUT_S:.0f} s") from None
    if first is None or first.WhichOneof("input") != "start":
        raise InvalidSpec("the first message of a stream must be `start`")
    return first.start


async def attach(sandbox: Sandbox, start: sandboxes_pb2.StreamStart, inputs: Inputs) -> Outputs:
    """The main process's output as logged, its input if taken over, and how it ended."""
    sandbox.follow_begins()
    try:
        await _wait(sandbox, STARTED_OR_ENDED, RUNNING_DEADLINE_S, "does not run")
        await sandbox.unpark()
        with _session(sandbox, "attach with standard input" if start.stdin else ""):
            async with OwnedTasks() as tasks:
                if sandbox.live is not None:
                    tasks.spawn(feed(_MainOf(sandbox), inputs, stdin=start.stdin), "feed")
                    yield sandboxes_pb2.StreamOutput(started=True)
                async for entry in sandbox.log.follow(from_start=start.from_start):
                    yield render_output(entry.stream, entry.data, entry.time_ns)
        yield await _exit_of(sandbox)
    finally:
        sandbox.follow_ends()


async def execute(
    sandbox: Sandbox, start: sandboxes_pb2.StreamStart, inputs: Inputs, now_ns: Callable[[], int]
) -> Outputs:
    """One more process: its output as it comes, its input, and how it ended."""
    spec = edge.parse_process(start.exec)
    with _executing(sandbox):  # from here on it is not parked
        live = await sandbox.awake()
        command = resolve_exec(spec, live.command)
        with _session(sandbox, _interactive(spec, command.argv[0])):
            async with aclosing(_executed(live, command, inputs, now_ns)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    yield output


async def _executed(live: Live, command: Command, inputs: Inputs, now_ns: Callable[[], int]) -> Outputs:
    try:
        process = await live.engine.spawn(command, main=False)
    except CommandFailed as error:
        failed = sandboxes_pb2.ExitStatus(code=error.exit_code, message=str(error))
        yield sandboxes_pb2.StreamOutput(exit=failed)
        return
    ended = None
    try:
        yield sandboxes_pb2.StreamOutput(started=True)
        async with OwnedTasks() as tasks:
            tasks.spawn(feed(process, inputs, stdin=command.stdin), "feed")
            async for piece in process.output():
                yield render_output(piece.stream, piece.data, now_ns())
        ended = await process.wait()
    finally:
        await to_its_end(_put_away(process, hang_up=ended is None))
    yield sandboxes_pb2.StreamOutput(exit=sandboxes_pb2.ExitStatus(code=ended.code, signal=ended.signal))


class _MainOf:
    """The main process of a sandbox that may be parked meanwhile: what is sent then is dropped, as to one that ended.
    Implements what feed() needs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def write(self, data: bytes) -> None:
        """See ProcessLink.write."""
        if self._sandbox.live is not None:
            await self._sandbox.live.main.write(data)

    async def close_stdin(self) -> None:
        """See ProcessLink.close_stdin."""
        if self._sandbox.live is not None:
            await self._sandbox.live.main.close_stdin()

    async def signal(self, signo: int) -> None:
        """See ProcessLink.signal."""
        if self._sandbox.live is not None:
            await self._sandbox.live.main.signal(signo)

    async def resize_tty(self, rows: int, cols: int) -> None:
        """See ProcessLink.resize_tty."""
        if self._sandbox.live is not None:
            await self._sandbox.live.main.resize_tty(rows, cols)


class Fed(Protocol):
    """What input goes to: a process, or a sandbox's main one."""

    async def write(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...
    async def signal(self, signo: int) -> None: ...
    async def resize_tty(self, rows: int, cols: int) -> None: ...


@contextmanager
def _executing(sandbox: Sandbox) -> Iterator[None]:
    """While a client's program runs in the sandbox: parked, it would be lost."""
    sandbox.exec_begins()
    try:
        yield
    finally:
        sandbox.exec_ends()


@contextmanager
def _session(sandbox: Sandbox, what: str) -> Iterator[None]:
    """While a client types into the sandbox: that cannot be in two sandboxes at once."""
    if what:
        sandbox.session_begins(what)
    try:
        yield
    finally:
        if what:
            sandbox.session_ends(what)


def _interactive(spec: ProcessSpec, name: str) -> str:
    """What of an exec makes it a session that no copy of the sandbox can have; "" when nothing does."""
    if spec.tty:
        return f"exec of {name} on a terminal"
    return f"exec of {name} with standard input" if spec.stdin else ""


async def read_log(sandbox: Sandbox, *, follow: bool, tail_lines: int) -> Outputs:
    """What is kept of the main process's output, and with `follow` what comes."""
    if not follow:
        for entry in last_lines(sandbox.log.kept(), tail_lines):
            yield render_output(entry.stream, entry.data, entry.time_ns)
        return
    sandbox.follow_begins()
    try:
        async for entry in sandbox.log.follow(tail_lines=tail_lines):
            yield render_output(entry.stream, entry.data, entry.time_ns)
    finally:
        sandbox.follow_ends()


async def feed(process: Fed, inputs: Inputs, *, stdin: bool) -> None:
    """Carries a client's input to the process until either ends. A signal that is none is passed over."""
    async for message in inputs:
        kind = message.WhichOneof("input")
        if kind == "stdin" and stdin:
            await process.write(message.stdin)
        elif kind == "stdin_eof" and stdin:
            await process.close_stdin()
        elif kind == "window":
            await process.resize_tty(min(message.window.rows, 65535), min(message.window.cols, 65535))
        elif kind == "signal" and 1 <= message.signal <= 64:
            await process.signal(message.signal)


def render_output(stream: int, data: bytes, time_ns: int) -> sandboxes_pb2.StreamOutput:
    """A piece of output."""
    if stream == 1:
        return sandboxes_pb2.StreamOutput(stdout=data, time_unix_ns=time_ns)
    return sandboxes_pb2.StreamOutput(stderr=data, time_unix_ns=time_ns)


async def _wait(sandbox: Sandbox, phases: frozenset[Phase], deadline_s: float, what: str) -> None:
    try:
        async with asyncio.timeout(deadline_s):
            await sandbox.wait_for(lambda record: record.phase in phases)
    except TimeoutError:
        raise TimeoutError(f"sandbox {sandbox.spec.name} {what} after {deadline_s:.0f} s: look at its status") from None


async def _exit_of(sandbox: Sandbox) -> sandboxes_pb2.StreamOutput:
    await _wait(sandbox, ENDED, ENDED_DEADLINE_S, "has not ended")
    record = sandbox.record
    if record.exit_code is None:
        raise StartFailed(f"sandbox {record.spec.name} failed: {record.message}", reason=record.reason)
    signo = record.exit_code - 128 if 128 < record.exit_code <= 128 + 64 else 0
    status = sandboxes_pb2.ExitStatus(code=record.exit_code, signal=signo, message=record.message)
    return sandboxes_pb2.StreamOutput(exit=status)


async def _put_away(process: ProcessLink, *, hang_up: bool) -> None:
    """Frees what the guest keeps for it. When the client went away the process is told so first, then killed."""
    try:
        async with asyncio.timeout(HANG_UP_S + PUT_AWAY_S):
            if hang_up:
                await _hang_up(process)
            await process.release()
    except (HostdError, TimeoutError):
        pass  # the sandbox is ending, which ends the process too


async def _hang_up(process: ProcessLink) -> None:
    async with OwnedTasks() as tasks:
        drain = tasks.spawn(_drain(process), "drain")  # else it could not end for want of a reader
        for signo in (signal.SIGHUP, signal.SIGKILL):
            await process.signal(signo)
            await asyncio.wait({drain}, timeout=HANG_UP_S if signo == signal.SIGHUP else PUT_AWAY_S)
            if drain.done():
                return


async def _drain(process: ProcessLink) -> None:
    async for _ in process.output():
        pass
