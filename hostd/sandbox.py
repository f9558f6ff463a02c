"""One sandbox on this host: its task walks the lifecycle, level-triggered on what is desired of it.

The record is journaled before each step, so that a restart finds out where it stood. The engine belongs to the task:
when it is cancelled (hostd stops) the engine is let go of and keeps running; when the sandbox ends it is destroyed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from hostd.checkpoint import Wanted, require_able
from hostd.checkpoints import StoredCheckpoint
from hostd.drivers.contract import Checkpointing, Engine, TakenCheckpoint
from hostd.ending import finish, until_removed
from hostd.errors import CommandFailed, HostdError, NotRunning
from hostd.journal import Handle, Outcome, Record
from hostd.lifecycle import ENDED, Phase, move
from hostd.logs import OutputLog
from hostd.memory.values import MemoryEvent
from hostd.parking import Waking, park, parked_through, require_parkable
from hostd.resize import Cause, Grant, ResizeProgress, ResizeState
from hostd.resize import move as move_resize
from hostd.resizing import impossible
from hostd.spec import SandboxSpec
from hostd.starting import Live, adopt, start_unless_unwanted
from hostd.supervision import KILLED_EXIT_CODE, supervise
from hostd.surroundings import Host
from hostd.tasks import to_its_end

log = logging.getLogger("sandloom.hostd.sandbox")

STOPPED_EARLY = Outcome(Phase.EXITED, "Stopped", "stopped before it ran", KILLED_EXIT_CODE)


class Sandbox:
    """See the module. Everything outside reads `record`, `live`, `log`, `resize`, and calls want()."""

    def __init__(self, record: Record, host: Host) -> None:
        self.record, self.host = record, host
        self.folder = host.run_dir / record.spec.uid
        self.log = OutputLog(host.journal.folder(record.spec.uid))
        self.live: Live | None = None
        self.resize: ResizeProgress | None = record.resize
        self.grant = Grant(record.resize.allocated_mib if record.resize else record.spec.resources.memory_mib)
        self._floor_mib = self.grant.memory_mib
        self.followers, self.followed = 0, False
        self.sessions: list[str] = []
        self.execs = 0
        self._parking, self._waking = False, Waking()
        self._eviction, self._broken = "", ""
        self._forgotten = False
        self._wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def spec(self) -> SandboxSpec:
        """What is asked of it now."""
        return self.record.spec

    @property
    def has_begun(self) -> bool:
        """Whether anything was done for it: a later epoch then begins anew instead of taking it over."""
        return self.record.phase is not Phase.ASSIGNED

    # What comes from outside.

    def want(self, spec: SandboxSpec) -> None:
        """Takes the newest assignment. An older epoch is not obeyed; nothing is, once the record is being removed."""
        if self._forgotten:  # a record written now would come back into the folder that a thread removes
            return
        now = self.spec
        keep = replace(spec, image_digest=now.image_digest, process=now.process, hostname=now.hostname)
        if spec.epoch < now.epoch or keep == now:
            return
        resized, had_mib = keep.resources != now.resources, self.desired_mib
        self.write(replace(self.record, spec=keep))
        if resized:
            self._floor_mib = had_mib
            if self.record.phase is Phase.PARKED:
                self._waking.ask()
            elif not self._impossible():
                self.grant = self.host.broker.regrant(self)
        self._wanted.set()

    def follow_begins(self) -> None:
        """A client follows the log; the sandbox with remove_on_exit waits for it."""
        self.followers += 1
        self.followed = True
        self._tell_waiters()

    def follow_ends(self) -> None:
        """That client is done."""
        self.followers -= 1
        self._tell_waiters()

    def exec_begins(self) -> None:
        """A client runs one more program in it."""
        self.execs += 1

    def exec_ends(self) -> None:
        """That program has ended."""
        self.execs -= 1

    def session_begins(self, what: str) -> None:
        """A client types into it."""
        self.sessions.append(what)

    def session_ends(self, what: str) -> None:
        """That client is done."""
        self.sessions.remove(what)

    async def checkpoint(self, wanted: Wanted) -> StoredCheckpoint:
        """Takes a checkpoint of it as it runs; it goes on. Idempotent by its id. NotRunning, CannotCheckpoint with what
        it has that cannot be carried, CheckpointFailed."""
        has = self.host.driver.checkpointing
        require_able(self.spec, self.record.phase, self.sessions, able=has.classes if has is not None else ())
        live = self.running()

        async def taking(checkpointing: Checkpointing) -> TakenCheckpoint:
            return await checkpointing.checkpoint(live.engine, lambda: dict(self.log.offsets))

        made = await self.host.checkpoints.make(wanted, self.spec, live.command, taking)
        size_mib, pause_s = made.size_bytes >> 20, made.about.pause_s
        self.tell("Checkpointed", f"{wanted.name} ({wanted.id}): {size_mib} MiB, it stood still for {pause_s:.2f} s")
        return made

    async def park(self, why: str) -> None:
        """Keeps it on disk and lets go of its memory; returns when that is done. Idempotent. See hostd/parking.py."""
        if self.record.phase is not Phase.PARKED:
            if self._parking:
                raise NotRunning(f"sandbox {self.spec.name} is being parked already: retry")
            self._parking = True
            try:
                await park(self, why)
            finally:
                self._parking = False
                self._tell_waiters()
            self._wanted.set()
        await self.wait_for(lambda record: record.handle is None)

    async def unpark(self) -> None:
        """Lets it go on if it is parked; returns when it runs. ShortOfResources, CheckpointUnusable, NotRunning."""
        await self.wait_for(lambda _: not self._parking)
        if self.record.phase is Phase.PARKED:
            asked = self._waking.ask()
            self._wanted.set()
            await asked

    def unparkable(self) -> str:
        """Why it cannot be parked now; "" when it can."""
        try:
            require_parkable(self)
        except HostdError as error:
            return str(error)
        return "it is being parked" if self._parking else ""

    async def awake(self) -> Live:
        """The live engine, unparked first if need be. As running() and unpark()."""
        await self.unpark()
        return self.running()

    def running(self) -> Live:
        """The live engine. NotRunning, with the phase and its reason, when there is none."""
        if self.live is None:
            record = self.record
            state = f"{record.phase.value}{': ' + record.message if record.message else ''}"
            raise NotRunning(f"sandbox {self.spec.name} is not running ({state})")
        return self.live

    async def wait_for(self, condition: Callable[[Record], bool]) -> Record:
        """The record as soon as `condition` holds of it. Bound it with a timeout."""
        while not condition(self.record):
            await self._changed.wait()
        return self.record

    # What supervision asks (hostd.supervision.Owner).

    async def wanted(self) -> None:
        """Returns after the next want()."""
        await self._wanted.wait()
        self._wanted.clear()

    def now_ns(self) -> int:
        """The time that log entries carry."""
        return self.host.now_ns()

    def is_parked(self) -> bool:
        """Whether its engine is to be destroyed now, and the sandbox kept."""
        return self.record.phase is Phase.PARKED

    def stopping(self) -> None:
        """It was asked to end."""
        if self.record.phase is not Phase.STOPPING:
            self.step(Phase.STOPPING)

    def tell_resize(self, progress: ResizeProgress) -> None:
        """How far the resize got."""
        if progress == self.resize:
            return
        previous, self.resize = self.resize, move_resize(self.resize, progress)
        known = self.record.resize
        if known is None or (known.state, known.cause, known.desired_mib) != (
            progress.state, progress.cause, progress.desired_mib,
        ):  # fmt: skip
            self.write(replace(self.record, resize=progress))
        else:
            self.host.changed(self)
        settled = progress.state is not ResizeState.IN_PROGRESS
        if settled and previous is not None and previous.state is not progress.state:
            text = f"memory {progress.actual_mib} of {progress.desired_mib} MiB, cpu {progress.cpu_milli / 1000:g}"
            self.tell("Resize" + progress.state.name.title(), f"{text} {progress.message}".strip())

    # What the broker asks (hostd.memory.brokering.Governed).

    @property
    def engine(self) -> Engine | None:
        """The running engine, unless it is being parked or about to end."""
        if self.live is None or self._parking or self.record.phase is not Phase.RUNNING:
            return None
        return self.live.engine

    @property
    def cooperative(self) -> bool:
        """Whether its guest gives back what it says is idle."""
        return not self.record.uncooperative

    @property
    def desired_mib(self) -> int:
        """What it should have if there is room. What can never be is not waited for: what was asked before counts."""
        return self._floor_mib if self._impossible() else self.spec.resources.memory_mib

    def _impossible(self) -> bool:
        live = self.live
        return live is not None and impossible(self.spec, live.engine.handle, self.most_mib())[0] is not Cause.NONE

    def allot(self, grant: Grant) -> None:
        """What it may have from now on."""
        self.grant = grant
        self._wanted.set()

    def judge_guest(self, cooperative: bool, why: str) -> None:
        """Marks it, or takes the mark away."""
        self.write(replace(self.record, uncooperative=not cooperative))
        self.tell("Cooperative" if cooperative else "Uncooperative", why)

    def evict(self, why: str) -> None:
        """Ends it for the host's sake."""
        self._eviction = why
        self._wanted.set()

    def eviction(self) -> str:
        """Why it is to be evicted; "" when it is not."""
        return self._eviction

    def hear(self, event: MemoryEvent) -> None:
        """Its guest tells of its memory."""
        self.host.broker.hear(self, event)

    def most_mib(self) -> int:
        """What this host has for one sandbox at most."""
        return self.host.broker.most_mib()

    def now_s(self) -> float:
        """Seconds since 1970."""
        return self.host.now_s()

    def made(self, handle: Handle) -> None:
        """Its engine has a process."""
        self.write(replace(self.record, handle=handle))

    def tell(self, reason: str, message: str) -> None:
        """Puts it into the event log."""
        self.host.event(self, reason, message)

    # The record.

    def write(self, record: Record) -> None:
        """Makes it durable, and tells whoever waits for it."""
        self.host.journal.write(record)
        self.record = record
        self._tell_waiters()
        self.host.changed(self)

    def _tell_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def step(self, to: Phase, **values: object) -> None:
        """Takes a step of the lifecycle, with what else changes in the record."""
        self.write(replace(self.record, phase=move(self.record.phase, to), **values))  # type: ignore[arg-type]

    def broken(self, error: Exception) -> None:
        """A bug, or a disk that takes no record, ended its task. It is not left half done: it ends as FAILED, and
        run(), called again, goes on with cleaning up."""
        text = f"{type(error).__name__}: {error}"
        if self.record.outcome is None and self.record.phase not in ENDED:
            self.record = replace(self.record, outcome=Outcome(Phase.FAILED, "InternalError", text))
        if text != self._broken:
            self._broken = text
            self.tell("InternalError", f"a step of hostd's failed, its clean-up is tried until it works: {text}")

    # The walk.

    async def run(self) -> None:
        """Walks the lifecycle to GONE. Cancelling it leaves the engine running and the record as it is."""
        try:
            if self.record.phase not in ENDED:
                outcome = self.record.outcome or await self._live_through()
                self.record = replace(self.record, outcome=outcome)  # durable first of all that finish() does
                await to_its_end(finish(self, outcome))
        finally:
            self.log.close()
        await until_removed(self)
        await self.host.release_image(self.spec.uid)
        self._forgotten = True
        await asyncio.to_thread(self.host.journal.remove, self.spec.uid)
        self.record = replace(self.record, phase=move(self.record.phase, Phase.GONE))
        self._tell_waiters()
        self.host.changed(self, removed=True)

    async def _live_through(self) -> Outcome:
        """From wherever the record stands to how it ended. The engine may still be there, let go of."""
        try:
            live: Live | None = None
            if self.record.phase is not Phase.PARKED:
                live = await (adopt(self) if self.record.handle else start_unless_unwanted(self))
                if live is None:
                    return STOPPED_EARLY
            return await self._by_turns(live)
        except CommandFailed as error:
            return Outcome(Phase.EXITED, error.reason, str(error), error.exit_code)
        except HostdError as error:
            return Outcome(Phase.FAILED, error.reason, str(error))
        except Exception as error:  # a bug of ours must not leave a sandbox half alive and silent
            log.exception("sandbox %s", self.spec.name)
            return Outcome(Phase.FAILED, "InternalError", f"{type(error).__name__}: {error}")
        finally:
            await self._detached()
            self._waking.tell(NotRunning(f"sandbox {self.spec.name} has ended"))

    async def _by_turns(self, live: Live | None) -> Outcome:
        """Runs and is parked (None) by turns, until it ends."""
        while True:
            if live is not None:
                outcome = await supervise(self, live.engine, live.main)
                if outcome is not None:
                    return outcome
                await self._detached()
            woken = await parked_through(self, self._waking)
            if isinstance(woken, Outcome):
                return woken
            live = woken

    async def _detached(self) -> None:
        last, self.live = self.live, None
        if last is not None:
            await to_its_end(last.engine.detach())
