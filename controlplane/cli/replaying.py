"""Drives a workload along a curve and looks at the sandbox meanwhile. The workload is memoryload.py, wherever it runs:
`sandloom replay` has it in a sandbox, by ExecSandbox, and benchmarks elsewhere, too.

    pace     says each step's demand when its time has come
    listen   takes the workload's answers: what it holds, and when it was done
    look     a sample each `every_s` and at each step and answer, until the curve has ended and every step is answered
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from controlplane.api.status import parse_error
from controlplane.api.v1 import sandboxes_pb2
from controlplane.capacity.demand import Curve
from controlplane.capacity.following import Answer, Sample
from controlplane.cli import memoryload
from controlplane.cli.connection import Fabric, explained, open_stream
from controlplane.cli.errors import CliError

READY_S = 300.0
ANSWER_S = 300.0  # how long after the curve's end a last step may take
NOT_FOUND_CODE = 127

Look = Callable[[], Awaitable[tuple[int, int]]]
"""What the host allocated and what the sandbox has, MiB."""


class Load(Protocol):
    """A running memoryload.py."""

    async def say(self, line: str) -> None:
        """One line in."""
        ...

    def heard(self) -> AsyncIterator[str]:
        """Its lines, once. LoadEnded when it ends by itself."""
        ...


class LoadEnded(CliError):
    """The workload ended before its curve did: look at why."""


def program() -> tuple[str, ...]:
    """What is run in the sandbox."""
    return ("python3", "-u", "-c", inspect.getsource(memoryload))


@dataclass
class Replay:
    """A replay on its way, and what came of it: `broken` says why it ended early, "" when it did not."""

    curve: Curve
    passes: int = 0
    samples: list[Sample] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    broken: str = ""
    held_mib: int = 0
    wanted_mib: int = 0
    _sizes: tuple[int, int] = (0, 0)
    _asked_s: list[float] = field(default_factory=list)
    _begun_s: float = 0.0

    @property
    def now_s(self) -> float:
        """Seconds since its beginning."""
        return asyncio.get_running_loop().time() - self._begun_s

    async def run(
        self, workload: Ready, look: Look, every_s: float, tell: Callable[[float], None] = lambda _: None
    ) -> None:
        """Replays to the end. CliError of `look`; that the workload ends early is told by `broken`."""
        load, lines = workload.load, workload.lines
        self._begun_s = asyncio.get_running_loop().time()
        await self._sample(look)
        looking = asyncio.create_task(self._looking(look, every_s, tell))
        try:
            async with asyncio.timeout(self.curve.end_s + ANSWER_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pace(load))
                tasks.create_task(self._listen(lines))
        except* LoadEnded as ended:
            self.broken = str(ended.exceptions[0])
        except* TimeoutError:
            late = f"{len(self.curve.steps) - len(self.answers)} steps unanswered"
            self.broken = f"the workload did not come to its end {ANSWER_S:.0f} s after the curve's: {late}"
        finally:
            if not looking.done():
                looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        if not looking.cancelled() and (error := looking.exception()) is not None:
            raise error
        await self._sample(look)

    async def _pace(self, load: Load) -> None:
        for step in self.curve.steps:
            await asyncio.sleep(max(0.0, step.time_s - self.now_s))
            self._asked_s.append(self.now_s)
            self.wanted_mib = step.memory_mib
            self._note()
            await load.say(f"{step.memory_mib} {self.passes}\n")
        await asyncio.sleep(max(0.0, self.curve.end_s - self.now_s))

    async def _listen(self, lines: AsyncIterator[str]) -> None:
        while len(self.answers) < len(self.curve.steps):
            kind, _, rest = (await _next(lines)).partition(" ")
            words = rest.split()
            if kind not in ("has", "refused", "done") or len(words) != (2 if kind == "done" else 1):
                continue  # a program may print what it likes, a Python's warning, say
            self.held_mib = int(words[0])
            if kind == "done":
                at = len(self.answers)
                wanted_mib = self.curve.steps[at].memory_mib
                self.answers.append(Answer(self._asked_s[at], self.now_s, wanted_mib, float(words[1])))
                self._note()

    async def _looking(self, look: Look, every_s: float, tell: Callable[[float], None]) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self._sample(look)
            tell(self.now_s)

    async def _sample(self, look: Look) -> None:
        self._sizes = await look()
        self._note()

    def _note(self) -> None:
        """A sample of what is known now: also at each step and answer, so that none falls between two looks."""
        self.samples.append(Sample(self.now_s, self.wanted_mib, self.held_mib, *self._sizes))


async def _next(lines: AsyncIterator[str]) -> str:
    try:
        return await anext(lines)
    except StopAsyncIteration:
        raise LoadEnded("the workload ended before its curve") from None


@dataclass(frozen=True)
class Ready:
    """A workload that has begun and waits for its first step."""

    load: Load
    lines: AsyncIterator[str]


async def ready(load: Load) -> Ready:
    """As soon as the workload has begun. LoadEnded when it ends instead, or says nothing for READY_S."""
    lines = load.heard()
    try:
        async with asyncio.timeout(READY_S):
            while await _next(lines) != "ready":
                pass
        return Ready(load, lines)
    except TimeoutError:
        raise LoadEnded("the workload does not begin", f"nothing was heard of it for {READY_S:.0f} s") from None


class ExecLoad:
    """The workload (or another program) in a sandbox, over ExecSandbox. An async context manager: the call ends with
    it, and with the call the workload."""

    def __init__(self, fabric: Fabric, reference: str, argv: Sequence[str] = ()) -> None:
        self._call: Any = open_stream(fabric.sandboxes.ExecSandbox)
        self._start = sandboxes_pb2.StreamStart(
            name=reference, exec=sandboxes_pb2.Process(argv=argv or program(), stdin=True), stdin=True
        )

    async def __aenter__(self) -> ExecLoad:
        try:
            await self._call.write(sandboxes_pb2.StreamInput(start=self._start))
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # why it ended is heard
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def say(self, line: str) -> None:
        """As Load has it."""
        try:
            await self._call.write(sandboxes_pb2.StreamInput(stdin=line.encode()))
        except (grpc.RpcError, asyncio.InvalidStateError):
            return

    async def heard(self) -> AsyncIterator[str]:
        """As Load has it."""
        out, errors = b"", b""
        try:
            async for output in self._call:
                kind = output.WhichOneof("output")
                if kind == "exit":
                    raise _ended(output.exit, errors.decode(errors="replace"))
                if kind == "stderr":
                    errors = (errors + output.stderr)[-400:]
                if kind == "stdout":
                    *lines, out = (out + output.stdout).split(b"\n")
                    for line in lines:
                        yield line.decode(errors="replace")
        except grpc.RpcError as error:
            raise LoadEnded("the connection to the workload broke", explained(parse_error(error))) from error


def _ended(status: sandboxes_pb2.ExitStatus, errors: str) -> LoadEnded:
    if status.code == NOT_FOUND_CODE:
        what = status.message or "its image has no python3"
        return LoadEnded("the workload cannot run", what, "use a sandbox whose image has python3")
    said = (errors.strip().splitlines() or [status.message or ""])[-1]
    remedy = "killed, as by the sandbox's OOM killer: `sandloom events` tells" if status.code in (9, 137) else said
    return LoadEnded("the workload ended before its curve", f"exit status {status.code}", remedy)
