"""A running sandbox: does what is desired of it until its main process or its engine ends, and says how it ended.

Owns every task of the running sandbox (the log's pump, the stop under way, the resize under way); all are over when
supervise() returns. The engine itself belongs to the caller. None of them ends unseen: what a bug ends is begun again
where nothing is lost by that (a resize, listening to the guest), and ends the sandbox, with the bug's text, where
something would be: output that was taken from the engine and not recorded.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from controlplane.api.services import ServicePolicy
from hostd.drivers.contract import Engine, Exit, Loss, ProcessLink
from hostd.errors import HostdError
from hostd.journal import Outcome
from hostd.lifecycle import Phase
from hostd.logs import OutputLog
from hostd.memory.values import MemoryEvent
from hostd.resize import Grant, retry_s
from hostd.resizing import Resizing, follow_resize
from hostd.spec import DesiredState, Resources
from hostd.tasks import OwnedTasks

log = logging.getLogger("sandloom.hostd.supervision")

KILLED_EXIT_CODE = 137
KILL_GRACE_S = 2.0
LOG_RETRY_S = 1.0
LAST_OUTPUT_S = 30.0
"""How long the output of an ended process may take into the log: the disk may be slow, its window is 64 KiB."""

LAST_WORDS_S = 1.0
"""How long a broken engine may take to show what broke: its port closes a moment before its process is seen to end."""


class Owner(Resizing, Protocol):
    """What supervision needs of its sandbox; hostd/sandbox.py is it."""

    log: OutputLog

    async def wanted(self) -> None: ...
    def now_ns(self) -> int: ...
    def stopping(self) -> None: ...
    def is_parked(self) -> bool: ...
    def eviction(self) -> str: ...
    def hear(self, event: MemoryEvent) -> None: ...
    def tell(self, reason: str, message: str) -> None: ...


async def supervise(owner: Owner, engine: Engine, main: ProcessLink) -> Outcome | None:
    """Returns how the sandbox ended, or None when it was parked. The engine is to be destroyed then."""
    async with OwnedTasks() as tasks:
        return await _Supervision(owner, engine, main, tasks).run()


class _Supervision:
    def __init__(self, owner: Owner, engine: Engine, main: ProcessLink, tasks: OwnedTasks) -> None:
        self._owner, self._engine, self._main, self._tasks = owner, engine, main, tasks
        self._stop: asyncio.Task[None] | None = None
        self._stop_for = DesiredState.RUNNING
        self._resize: asyncio.Task[None] | None = None
        self._services: ServicePolicy | None = None
        self._served: tuple[Resources, Grant] | None = None

    async def run(self) -> Outcome | None:
        self._tasks.spawn(self._kept("listening to its memory", self._listen), "memory events")
        pump = self._tasks.spawn(self._pump(), "pump")
        ended = self._tasks.spawn(self._main.wait(), "main")
        gone = self._tasks.spawn(self._engine.wait_gone(), "engine")
        wanted: asyncio.Task[None] | None = None
        while not ended.done() and not gone.done() and not (self._stop and self._stop.done()):
            self._follow_desired()
            if wanted is None or wanted.done():
                wanted = self._tasks.spawn(self._owner.wanted(), "wanted")
            waiting: set[asyncio.Task[Any]] = {ended, gone, wanted}
            waiting |= {task for task in (self._stop, pump) if task is not None and not task.done()}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            _raise_bugs(pump, ended)
            if self._owner.is_parked():
                return None
            if self._owner.eviction():
                return Outcome(Phase.FAILED, "Evicted", self._owner.eviction())
        return await self._conclude(ended, gone, pump)

    def _follow_desired(self) -> None:
        spec = self._owner.spec
        if spec.desired is not DesiredState.RUNNING and spec.desired is not self._stop_for:
            if self._stop is None:
                self._owner.stopping()
            else:
                self._stop.cancel()  # REMOVED after STOPPED: no more grace
            self._stop_for = spec.desired
            grace_s = spec.stop_grace_s if spec.desired is DesiredState.STOPPED else 0.0
            self._stop = self._tasks.spawn(stop(self._main, grace_s), "stop")
        if spec.services != self._services:
            self._services = spec.services
            self._engine.serve_as(spec.services)
        if (spec.resources, self._owner.grant) != self._served:
            former = self._resize
            # Also right after a start or an adoption: targets may have changed meanwhile. Setting them is idempotent.
            self._served = (spec.resources, self._owner.grant)
            self._resize = self._tasks.spawn(self._kept("its resize", lambda: self._follow(former)), "resize")

    async def _follow(self, former: asyncio.Task[None] | None) -> None:
        """One resize at a time: the former lets go of the engine first."""
        if former is not None:
            former.cancel()
            await asyncio.wait({former})
        await follow_resize(self._owner, self._engine, begins=former is None)

    async def _kept(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does `work`; again, with growing pauses, when a bug ends it. Its owner is told once."""
        attempts = 0
        while True:
            try:
                return await work()
            except Exception as error:
                attempts += 1
                log.exception("sandbox %s: %s", self._owner.spec.name, what)
                if attempts == 1:
                    text = f"{what} was ended by {type(error).__name__}: {error}; begun again until it works"
                    self._owner.tell("InternalError", text)
                await asyncio.sleep(retry_s(attempts))

    async def _listen(self) -> None:
        async for event in self._engine.memory_events():
            self._owner.hear(event)

    async def _conclude(self, ended: asyncio.Task[Exit], gone: asyncio.Task[Loss], pump: asyncio.Task[None]) -> Outcome:
        """Works out how it ended, once all its output is in the log."""
        stopped = self._stop is not None
        if not ended.done():  # the last frames may still be on their way
            await asyncio.wait({ended}, timeout=0.2)
        if ended.done() and ended.exception() is None:
            await asyncio.wait({pump}, timeout=LAST_OUTPUT_S)
            return Outcome(Phase.EXITED, "Stopped" if stopped else "Completed", "", ended.result().code)
        if stopped:
            return Outcome(Phase.EXITED, "Killed", "it did not end by itself and was killed", KILLED_EXIT_CODE)
        if not gone.done():
            await asyncio.wait({gone}, timeout=LAST_WORDS_S)
        if gone.done():
            return Outcome(Phase.FAILED, gone.result().reason, gone.result().message)
        return Outcome(Phase.FAILED, "AgentLost", str(ended.exception()))

    async def _pump(self) -> None:
        async for piece in self._main.output():
            await self._record(piece.stream, piece.data)

    async def _record(self, stream: int, data: bytes) -> None:
        """Into the log; as long as the disk is full the workload's output waits, as at a pipe that nobody reads."""
        told = False
        while True:
            try:
                return self._owner.log.append(self._owner.now_ns(), stream, data)
            except OSError as error:
                if not told:
                    self._owner.tell("LogStalled", f"its output waits: the log cannot be written: {error.strerror}")
                    told = True
                await asyncio.sleep(LOG_RETRY_S)


def _raise_bugs(*tasks: asyncio.Task[Any]) -> None:
    """Raises what no engine's end explains."""
    for task in tasks:
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None and not isinstance(error, HostdError):
            raise error


async def stop(main: ProcessLink, grace_s: float) -> None:
    """SIGTERM, the grace, SIGKILL, a last wait. When it returns the engine is to be destroyed."""
    for signo, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_GRACE_S)):
        if wait_s <= 0:
            continue
        try:
            async with asyncio.timeout(wait_s):
                await main.signal(signo)
                await main.wait()
            return
        except (TimeoutError, HostdError):
            continue
