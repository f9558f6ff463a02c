"""Parking: a running sandbox becomes a checkpoint on this host's disk, and goes on from there when it is asked for.

    RUNNING ─freeze, copy─► checkpoint kept ─► record says PARKED ─► engine destroyed, its memory let go of
    PARKED ─admitted─► restored, RENEWed (clock, randomness) ─► record says RUNNING ─► checkpoint removed

The workload never runs again between the copy and the end of its engine, so nothing of it happens twice; output that
was on its way goes on where the log ends. A hostd that dies on the way leaves either what ran (it is adopted and goes
on) or what is parked (whatever is left of an engine is destroyed). uid, name, log, hostname and machine id stay.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from hostd.checkpoint import Wanted, require_able
from hostd.drivers.contract import Checkpointing, StartPlan, TakenCheckpoint
from hostd.errors import CannotCheckpoint, CheckpointUnusable, HostdError, NotRunning
from hostd.journal import Outcome
from hostd.lifecycle import Phase
from hostd.resize import ResizeProgress
from hostd.resizing import granted
from hostd.spec import DesiredState
from hostd.starting import Live, Starting, runs
from hostd.supervision import KILLED_EXIT_CODE
from hostd.tasks import to_its_end

PARKED_REASON = "Parked"
NAME_PREFIX = "park-"


class Parkable(Starting, Protocol):
    """What is needed of the sandbox; hostd/sandbox.py is it."""

    resize: ResizeProgress | None

    @property
    def sessions(self) -> Sequence[str]: ...
    @property
    def execs(self) -> int: ...
    def running(self) -> Live: ...


@dataclass
class Waking:
    """Who waits for a parked sandbox to run. All that ask before it does are told together."""

    asked: list[asyncio.Future[None]] = field(default_factory=list)

    def ask(self) -> asyncio.Future[None]:
        """One more."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked.append(future)
        return future

    def tell(self, error: Exception | None) -> None:
        """How it went."""
        for future in self.asked:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(None)
                future.exception()  # who asked may be gone: then nobody minds
        self.asked.clear()


def require_parkable(box: Parkable) -> None:
    """InvalidSpec for its class, NotRunning, CannotCheckpoint with what it has that would be lost."""
    has = box.host.driver.checkpointing
    require_able(box.spec, box.record.phase, box.sessions, able=has.classes if has is not None else ())
    if box.execs:
        raise CannotCheckpoint(
            f"sandbox {box.spec.name} has {box.execs} exec running, whose client would lose it: wait for its end",
            reason="ExecRunning",
        )


async def park(box: Parkable, why: str) -> None:
    """Keeps a checkpoint of it and says so in its record; its task then destroys the engine. On any error it goes on
    as if nothing had been. As require_parkable; CheckpointFailed; OutOfSpace of the store."""
    require_parkable(box)
    live, checkpoints = box.running(), box.host.checkpoints
    key = secrets.token_hex(8)
    wanted = Wanted(key, NAME_PREFIX + key, ephemeral=True)
    stands_still: list[Checkpointing] = []

    async def taking(checkpointing: Checkpointing) -> TakenCheckpoint:
        taken = await checkpointing.checkpoint(live.engine, lambda: dict(box.log.offsets), go_on=False)
        stands_still.append(checkpointing)
        return taken

    try:
        made = await checkpoints.make(wanted, box.spec, live.command, taking)
        if box.live is not live or box.record.phase is not Phase.RUNNING:
            raise NotRunning(f"sandbox {box.spec.name} ended while it was being parked")
        # With what it has been let have: so much it is let have again, also by the next hostd.
        sizes = replace(box.resize, allocated_mib=box.grant.memory_mib) if box.resize is not None else None
        box.step(Phase.PARKED, parked=key, reason=PARKED_REASON, message=why, resize=sizes)
    except BaseException:
        for checkpointing in stands_still:
            await to_its_end(_go_on(checkpointing, live))
        await to_its_end(checkpoints.remove(key))
        raise
    size_mib = made.size_bytes >> 20
    box.tell(PARKED_REASON, f"{why}; {size_mib} MiB on disk, its memory is let go of")


async def _go_on(checkpointing: Checkpointing, live: Live) -> None:
    try:
        await checkpointing.go_on(live.engine)
    except HostdError:
        return  # it has ended, which its owner sees elsewhere


async def put_down(box: Parkable) -> None:
    """Destroys what is left of a parked sandbox's engine and lets go of the memory of its checkpoint. HostdError."""
    host, record = box.host, box.record
    if record.handle is not None:
        await host.driver.destroy(box.spec.uid, box.folder, record.handle)
        for key in {box.spec.checkpoint, record.handle.checkpoint} - {""}:
            host.checkpoints.release(key, box.spec.uid)
        box.write(replace(record, handle=None))
    host.checkpoints.let_go(record.parked)


async def unpark(box: Parkable) -> Live:
    """Restores it where it was. ShortOfResources when its guarantee, or what it held, does not fit now; after any error
    but CheckpointUnusable it stays parked."""
    host, key = box.host, box.record.parked
    checkpointing = host.driver.checkpointing
    if checkpointing is None:
        raise CheckpointUnusable("this host runs no class of sandbox that can be unparked any more")
    kept = host.checkpoints.find(key)
    about, first = kept.about, host.broker.first_grant(box.spec)
    if first.memory_mib > box.grant.memory_mib:
        box.grant = first
    sizes = granted(box.spec.resources, box.grant)
    spec = replace(box.spec, checkpoint=key, resources=sizes)
    layers = await host.take_layers(spec, about)
    async with host.start_slot():
        await host.admitted(box.spec, kept.size_bytes >> 20)
        vm_uid = box.record.vm_uid if box.record.vm_uid is not None else host.claim_vm_uid()
        box.write(replace(box.record, vm_uid=vm_uid))
        plan = StartPlan(spec, layers, vm_uid, box.folder, box.tell)
        offsets = dict(box.log.offsets)
        async with host.checkpoints.memory(key, box.spec.uid) as memory:
            engine = await checkpointing.restore(plan, memory, about.form, offsets, box.made)
    main = engine.resume()
    assert main is not None, "what is restored has a main process"
    live = runs(box, Live(engine, main, about.command), engine.start_phases)
    box.write(replace(box.record, parked=""))
    await to_its_end(host.checkpoints.remove(key))
    return live


async def parked_through(box: Parkable, waking: Waking) -> Live | Outcome:
    """From parked to running again, or to its end. HostdError when it cannot go on any more."""
    while True:
        await put_down(box)
        while box.spec.desired is DesiredState.RUNNING and not waking.asked:
            await box.wanted()
        if box.spec.desired is not DesiredState.RUNNING:
            waking.tell(NotRunning(f"sandbox {box.spec.name} is to end"))
            return Outcome(Phase.EXITED, "Stopped", "stopped while it was parked", KILLED_EXIT_CODE)
        try:
            live = await unpark(box)
        except CheckpointUnusable as error:
            waking.tell(error)
            raise
        except HostdError as error:
            waking.tell(error)
            box.tell("UnparkFailed", f"it stays parked: {error}")
        else:
            waking.tell(None)
            return live
