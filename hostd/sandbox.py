"""One sandbox on this host: its task walks the lifecycle, level-triggered on what is desired of it.

The record is journaled before each step, so that a restart finds out where it stood. The engine belongs to the task:
when it is cancelled (hostd stops) the engine is let go of and keeps running; when the sandbox ends it is destroyed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from hostd.checkpoint import Wanted, fitted, require_able
from hostd.checkpoints import StoredCheckpoint
from hostd.drivers.contract import Checkpointing, Engine, ProcessLink, StartPlan, TakenCheckpoint
from hostd.errors import CommandFailed, HostdError, NotRunning
from hostd.journal import Handle, Outcome, Record
from hostd.lifecycle import ENDED, Phase, move
from hostd.logs import OutputLog
from hostd.pools import Taken
from hostd.resize import ResizeProgress, ResizeState
from hostd.spec import Command, DesiredState, SandboxSpec
from hostd.supervision import KILLED_EXIT_CODE, supervise
from hostd.surroundings import Host
from hostd.tasks import OwnedTasks, to_its_end

log = logging.getLogger("sandloom.hostd.sandbox")

CLEAN_UP_RETRY_S = 1.0
LINGER_FIRST_S, LINGER_LAST_S = 5.0, 10.0
"""How long an ended sandbox with remove_on_exit waits for its first, and its present, followers."""


@dataclass(frozen=True)
class Live:
    """A running engine, its main process, and what that was started with."""

    engine: Engine
    main: ProcessLink
    command: Command


STOPPED_EARLY = Outcome(Phase.EXITED, "Stopped", "stopped before it ran", KILLED_EXIT_CODE)


class Sandbox:
    """See the module. Everything outside reads `record`, `live`, `log`, `resize`, and calls want()."""

    def __init__(self, record: Record, host: Host) -> None:
        self.record, self._host = record, host
        self.folder = host.run_dir / record.spec.uid
        self.log = OutputLog(host.journal.folder(record.spec.uid))
        self.live: Live | None = None
        self.resize: ResizeProgress | None = None
        self.followers, self._followed = 0, False
        self._sessions: list[str] = []
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
        self._write(replace(self.record, spec=keep))
        self._wanted.set()

    def follow_begins(self) -> None:
        """A client follows the log; the sandbox with remove_on_exit waits for it."""
        self.followers += 1
        self._followed = True
        self._tell_waiters()

    def follow_ends(self) -> None:
        """That client is done."""
        self.followers -= 1
        self._tell_waiters()

    def session_begins(self, what: str) -> None:
        """A client types into it."""
        self._sessions.append(what)

    def session_ends(self, what: str) -> None:
        """That client is done."""
        self._sessions.remove(what)

    async def checkpoint(self, wanted: Wanted) -> StoredCheckpoint:
        """Takes a checkpoint of it as it runs; it goes on. Idempotent by its id. NotRunning, CannotCheckpoint with what
        it has that cannot be carried, CheckpointFailed."""
        has = self._host.driver.checkpointing
        require_able(self.spec, self.record.phase, self._sessions, able=has.classes if has is not None else ())
        live = self.running()

        async def taking(checkpointing: Checkpointing) -> TakenCheckpoint:
            return await checkpointing.checkpoint(live.engine, lambda: dict(self.log.offsets))

        made = await self._host.checkpoints.make(wanted, self.spec, live.command, taking)
        size_mib, pause_s = made.size_bytes >> 20, made.about.pause_s
        self.tell("Checkpointed", f"{wanted.name} ({wanted.id}): {size_mib} MiB, it stood still for {pause_s:.2f} s")
        return made

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
        return self._host.now_ns()

    def stopping(self) -> None:
        """It was asked to end."""
        if self.record.phase is not Phase.STOPPING:
            self._move(Phase.STOPPING)

    def tell_resize(self, progress: ResizeProgress) -> None:
        """How far the resize got."""
        if progress == self.resize:
            return
        previous, self.resize = self.resize, progress
        self._host.changed(self)
        settled = progress.state is not ResizeState.IN_PROGRESS
        if settled and previous is not None and previous.state is not progress.state:
            text = f"memory {progress.actual_mib} of {progress.desired_mib} MiB, cpu {progress.cpu_milli / 1000:g}"
            self.tell("Resize" + progress.state.name.title(), f"{text} {progress.message}".strip())

    def tell(self, reason: str, message: str) -> None:
        """Puts it into the event log."""
        self._host.event(self, reason, message)

    # The record.

    def _write(self, record: Record) -> None:
        self._host.journal.write(record)
        self.record = record
        self._tell_waiters()
        self._host.changed(self)

    def _tell_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _move(self, to: Phase, **values: object) -> None:
        self._write(replace(self.record, phase=move(self.record.phase, to), **values))  # type: ignore[arg-type]

    # The walk.

    async def run(self) -> None:
        """Walks the lifecycle to GONE. Cancelling it leaves the engine running and the record as it is."""
        try:
            if self.record.phase not in ENDED:
                outcome = self.record.outcome or await self._live_through()
                await to_its_end(self._finish(outcome))
        finally:
            self.log.close()
        await self._until_removed()
        await self._host.release_image(self.spec.uid)
        self._forgotten = True
        await asyncio.to_thread(self._host.journal.remove, self.spec.uid)
        self.record = replace(self.record, phase=move(self.record.phase, Phase.GONE))
        self._tell_waiters()
        self._host.changed(self, removed=True)

    async def _live_through(self) -> Outcome:
        """From wherever the record stands to how it ended. The engine may still be there, let go of."""
        try:
            live = await (self._adopt() if self.record.handle else self._start_unless_unwanted())
            if live is None:
                return STOPPED_EARLY
            return await supervise(self, live.engine, live.main)
        except CommandFailed as error:
            return Outcome(Phase.EXITED, error.reason, str(error), error.exit_code)
        except HostdError as error:
            return Outcome(Phase.FAILED, error.reason, str(error))
        except Exception as error:  # a bug of ours must not leave a sandbox half alive and silent
            log.exception("sandbox %s", self.spec.name)
            return Outcome(Phase.FAILED, "InternalError", f"{type(error).__name__}: {error}")
        finally:
            live, self.live = self.live, None
            if live is not None:
                await to_its_end(live.engine.detach())

    async def _finish(self, outcome: Outcome) -> None:
        """Ends the engine, then says so: once a sandbox is told to have ended, nothing of it runs."""
        if self.record.outcome is None:
            self._write(replace(self.record, outcome=outcome))
        told = False
        while True:
            try:
                await self._host.driver.destroy(self.spec.uid, self.folder, self.record.handle)
                break
            except (HostdError, OSError) as error:
                if not told:
                    self.tell("CleanUpStuck", f"tried again until it works: {error}")
                    told = True
                await asyncio.sleep(CLEAN_UP_RETRY_S)
        await self._host.release_image(self.spec.uid)
        if self.spec.checkpoint:
            self._host.checkpoints.release(self.spec.checkpoint, self.spec.uid)
        self.log.close()
        self._move(
            outcome.phase,
            reason=outcome.reason,
            message=outcome.message,
            exit_code=outcome.exit_code,
            handle=None,
            finished_at_s=self._host.now_s(),
        )
        self.tell(outcome.reason, outcome.message or outcome.phase.value)

    # Starting and adopting.

    async def _adopt(self) -> Live:
        record, handle = self.record, self.record.handle
        assert handle is not None
        if handle.checkpoint and record.phase is Phase.STARTING:  # it may not have become itself yet
            raise HostdError("hostd restarted while it was being restored", reason="StartInterrupted")
        plan = StartPlan(record.spec, (), handle.vm_uid, self.folder, self.tell)
        engine = await self._host.driver.adopt(plan, handle, dict(self.log.offsets))
        if engine is None:
            if record.phase is Phase.STARTING:
                raise HostdError("hostd restarted while it was starting, and the VMM ended", reason="StartInterrupted")
            raise HostdError("the VMM ended while hostd was away", reason="VmmExited")
        try:
            main = engine.resume()
            if main is None or record.command is None:
                raise HostdError("hostd restarted before its command was started", reason="StartInterrupted")
            record = replace(record, adoptions=record.adoptions + 1)
            if record.phase is Phase.STARTING:  # the command ran, but the record of it was not written in time
                record = replace(record, phase=Phase.RUNNING, started_at_s=self._host.now_s())
        except BaseException:
            await to_its_end(engine.detach())
            raise
        assert record.command is not None
        if handle.checkpoint:
            await self._host.checkpoints.adopt(handle.checkpoint, self.spec.uid, handle.pid)
        self.live = Live(engine, main, record.command)
        self._write(record)
        self.tell("Adopted", f"taken over by a restarted hostd, pid {handle.pid}")
        return self.live

    async def _start_unless_unwanted(self) -> Live | None:
        """Starts, giving up as soon as the sandbox is wanted no more (None)."""
        if self.record.phase is not Phase.ASSIGNED:
            raise HostdError("hostd restarted while it was starting", reason="StartInterrupted")
        async with OwnedTasks() as tasks:
            start = tasks.spawn(self._start(), "start")
            while self.spec.desired is DesiredState.RUNNING:
                wanted = tasks.spawn(self.wanted())
                await asyncio.wait({start, wanted}, return_when=asyncio.FIRST_COMPLETED)
                wanted.cancel()
                if start.done():
                    return start.result()
            start.cancel()
            await asyncio.wait({start})
            # It may have come up at the last moment: then it is stopped as any other.
            return None if start.cancelled() or start.exception() else start.result()

    async def _start(self) -> Live:
        return await (self._restore() if self.spec.checkpoint else self._begin())

    async def _restore(self) -> Live:
        """Goes on from a checkpoint instead of starting."""
        checkpoints, checkpointing = self._host.checkpoints, self._host.driver.checkpointing
        about = checkpoints.find(self.spec.checkpoint).about
        spec = fitted(about, self.spec)
        assert checkpointing is not None, "else there is no checkpoint here"
        layers = await self._host.take_layers(spec, about)
        async with self._host.start_slot():
            self._host.admit(spec)
            vm_uid = self._host.claim_vm_uid()
            self.log.begin_at(self.now_ns(), about.offsets)
            self._move(Phase.STARTING, spec=spec, vm_uid=vm_uid, command=about.command)
            plan = StartPlan(spec, layers, vm_uid, self.folder, self.tell)
            async with checkpoints.memory(about.id, spec.uid) as memory:
                engine = await checkpointing.restore(plan, memory, about.form, about.offsets, self._made)
        main = engine.resume()
        assert main is not None, "what is restored has a main process"
        return self._runs(engine, main, about.command, engine.start_phases)

    async def _begin(self) -> Live:
        image = await self._host.take_image(self.spec)
        command = image.command(self.spec)
        async with self._host.start_slot():
            taken = self._host.take_member(self.spec)
            try:
                self._host.admit(self.spec)
                vm_uid = taken.vm_uid if taken else self._host.claim_vm_uid()
                self._move(Phase.STARTING, vm_uid=vm_uid, command=command)
            except BaseException:
                if taken is not None:
                    await to_its_end(self._host.end_member(taken))
                raise
            engine = await self._engine(StartPlan(self.spec, image.layers, vm_uid, self.folder, self.tell), taken)
        begin_s = self._loop.time()
        try:
            main = await engine.spawn(command, main=True)
        except BaseException:
            await to_its_end(engine.detach())
            raise
        phases = (*engine.start_phases, ("workload", self._loop.time() - begin_s))
        return self._runs(engine, main, command, phases)

    def _runs(self, engine: Engine, main: ProcessLink, command: Command, phases: tuple[tuple[str, float], ...]) -> Live:
        self.live = Live(engine, main, command)  # first: who hears that it runs may ask at once
        now_s = self._host.now_s()
        self._move(Phase.RUNNING, started_at_s=now_s, start_phases=phases, origin=engine.origin)
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases)
        self.tell("Started", f"{engine.origin}; {times}" if engine.origin else times)
        return self.live

    async def _engine(self, plan: StartPlan, taken: Taken | None) -> Engine:
        """The member that was taken, as this sandbox; without one, or when that does not work, a start of its own."""
        warming = self._host.driver.warming
        if taken is not None and warming is not None:
            try:
                engine = await warming.claim(taken.guest, plan, self._made)
            except HostdError as error:
                self.tell("ClaimFailed", f"member {taken.member.uid} of pool {taken.pool}, so it is started: {error}")
            else:
                engine.origin = f"{engine.origin} from pool {taken.pool}"
                return engine
        return await self._host.driver.start(plan, self._made)

    def _made(self, handle: Handle) -> None:
        self._write(replace(self.record, handle=handle))

    # Ended.

    async def _until_removed(self) -> None:
        """Until it is to be removed; one with remove_on_exit first lets its followers read the end of it."""

        if not self.spec.remove_on_exit:
            await self.wait_for(lambda _: self._removed())
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_FIRST_S):
                await self.wait_for(lambda _: self._followed or self._removed())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_LAST_S):
                await self.wait_for(lambda _: self.followers == 0 or self._removed())

    def _removed(self) -> bool:
        return self.spec.desired is DesiredState.REMOVED
