"""How a sandbox's engine comes up: started, claimed from a pool, restored from a checkpoint, or taken over.

Each way ends with a journaled record in RUNNING and a Live; whatever fails leaves the engine to be destroyed by the
sandbox's task (hostd/sandbox.py), which is the only caller.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hostd.checkpoint import fitted
from hostd.drivers.contract import Engine, ProcessLink, StartPlan
from hostd.errors import HostdError
from hostd.journal import Handle, Record
from hostd.lifecycle import Phase
from hostd.logs import OutputLog
from hostd.pools import Taken
from hostd.resize import Cause, Grant, ResizeState
from hostd.resizing import granted
from hostd.spec import Command, DesiredState, SandboxSpec
from hostd.tasks import OwnedTasks, to_its_end

if TYPE_CHECKING:
    from hostd.surroundings import Host


@dataclass(frozen=True)
class Live:
    """A running engine, its main process, and what that was started with."""

    engine: Engine
    main: ProcessLink
    command: Command


class Starting(Protocol):
    """What is needed of the sandbox; hostd/sandbox.py is it."""

    record: Record
    live: Live | None
    log: OutputLog
    folder: Path
    grant: Grant

    @property
    def host(self) -> Host: ...
    @property
    def spec(self) -> SandboxSpec: ...
    async def wanted(self) -> None: ...
    def now_ns(self) -> int: ...
    def write(self, record: Record) -> None: ...
    def step(self, to: Phase, **values: object) -> None: ...
    def made(self, handle: Handle) -> None: ...
    def tell(self, reason: str, message: str) -> None: ...


async def adopt(box: Starting) -> Live:
    """Takes over the engine that the record names. HostdError with what became of it."""
    record, handle, host = box.record, box.record.handle, box.host
    assert handle is not None
    if handle.checkpoint and record.phase is Phase.STARTING:  # it may not have become itself yet
        raise HostdError("hostd restarted while it was being restored", reason="StartInterrupted")
    plan = StartPlan(record.spec, (), handle.vm_uid, box.folder, box.tell)
    engine = await host.driver.adopt(plan, handle, dict(box.log.offsets))
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
            record = replace(record, phase=Phase.RUNNING, started_at_s=host.now_s())
        box.grant = await _had(box, engine)
    except BaseException:
        await to_its_end(engine.detach())
        raise
    assert record.command is not None
    if handle.checkpoint:
        await host.checkpoints.adopt(handle.checkpoint, box.spec.uid, handle.pid)
    box.live = Live(engine, main, record.command)
    box.write(record)
    box.tell("Adopted", f"taken over by a restarted hostd, pid {handle.pid}")
    return box.live


async def _had(box: Starting, engine: Engine) -> Grant:
    """What the former hostd let it have. The record knows where a resize was under way, the engine what it has."""
    sizes, resize = box.spec.resources, box.record.resize
    known_mib = resize.allocated_mib if resize else sizes.memory_min_mib
    try:
        known_mib = (await engine.memory()).actual_mib
    except HostdError:
        pass
    had_mib = max(sizes.memory_min_mib, min(sizes.memory_max_mib, known_mib))
    if resize is None or not resize.covers(sizes) or not resize.allocated_mib:  # asked for, and not begun
        first = box.host.broker.first_grant(box.spec)
        if first.memory_mib >= had_mib or sizes.memory_mib <= had_mib:
            return Grant(min(first.memory_mib, sizes.memory_mib), first.cause, first.message)
        return Grant(had_mib, first.cause, first.message)
    if resize.state in (ResizeState.IN_PROGRESS, ResizeState.ERROR) or resize.cause is Cause.GUEST:
        return Grant(resize.allocated_mib, resize.cause, resize.message)
    return Grant(had_mib, resize.cause, resize.message)


async def start_unless_unwanted(box: Starting) -> Live | None:
    """Starts, giving up as soon as the sandbox is wanted no more (None)."""
    if box.record.phase is not Phase.ASSIGNED:
        raise HostdError("hostd restarted while it was starting", reason="StartInterrupted")
    async with OwnedTasks() as tasks:
        start = tasks.spawn(_restore(box) if box.spec.checkpoint else _begin(box), "start")
        while box.spec.desired is DesiredState.RUNNING:
            wanted = tasks.spawn(box.wanted())
            await asyncio.wait({start, wanted}, return_when=asyncio.FIRST_COMPLETED)
            wanted.cancel()
            if start.done():
                return start.result()
        start.cancel()
        await asyncio.wait({start})
        # It may have come up at the last moment: then it is stopped as any other.
        return None if start.cancelled() or start.exception() else start.result()


async def _restore(box: Starting) -> Live:
    """Goes on from a checkpoint instead of starting."""
    host, checkpointing = box.host, box.host.driver.checkpointing
    about = host.checkpoints.find(box.spec.checkpoint).about
    spec = fitted(about, box.spec)
    assert checkpointing is not None, "else there is no checkpoint here"
    layers = await host.take_layers(spec, about)
    async with host.start_slot():
        await host.admitted(spec)
        vm_uid = host.claim_vm_uid()
        box.log.begin_at(box.now_ns(), about.offsets)
        box.step(Phase.STARTING, spec=spec, vm_uid=vm_uid, command=about.command)
        plan = StartPlan(spec, layers, vm_uid, box.folder, box.tell)
        async with host.checkpoints.memory(about.id, spec.uid) as memory:
            engine = await checkpointing.restore(plan, memory, about.form, about.offsets, box.made)
    main = engine.resume()
    assert main is not None, "what is restored has a main process"
    return runs(box, Live(engine, main, about.command), engine.start_phases)


async def _begin(box: Starting) -> Live:
    host = box.host
    image = await host.take_image(box.spec)
    command = image.command(box.spec)
    async with host.start_slot():
        taken = host.take_member(box.spec)
        try:
            await host.admitted(box.spec)
            vm_uid = taken.vm_uid if taken else host.claim_vm_uid()
            box.step(Phase.STARTING, vm_uid=vm_uid, command=command)
        except BaseException:
            if taken is not None:
                await to_its_end(host.end_member(taken))
            raise
        box.grant = host.broker.first_grant(box.spec)
        spec = replace(box.spec, resources=granted(box.spec.resources, box.grant))
        engine = await _engine(box, StartPlan(spec, image.layers, vm_uid, box.folder, box.tell), taken)
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    try:
        main = await engine.spawn(command, main=True)
    except BaseException:
        await to_its_end(engine.detach())
        raise
    return runs(box, Live(engine, main, command), (*engine.start_phases, ("workload", loop.time() - begin_s)))


def runs(box: Starting, live: Live, phases: tuple[tuple[str, float], ...]) -> Live:
    """It runs: who hears so may ask at once."""
    box.live = live
    origin = live.engine.origin
    started_at_s = box.record.started_at_s or box.host.now_s()
    box.step(Phase.RUNNING, started_at_s=started_at_s, start_phases=phases, origin=origin, reason="", message="")
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases)
    box.tell("Started", f"{origin}; {times}" if origin else times)
    return live


async def _engine(box: Starting, plan: StartPlan, taken: Taken | None) -> Engine:
    """The member that was taken, as this sandbox; without one, or when that does not work, a start of its own."""
    driver = box.host.driver
    if taken is not None and driver.warming is not None:
        try:
            engine = await driver.warming.claim(taken.guest, plan, box.made)
        except HostdError as error:
            box.tell("ClaimFailed", f"member {taken.member.uid} of pool {taken.pool}, so it is started: {error}")
        else:
            engine.origin = f"{engine.origin} from pool {taken.pool}"
            return engine
    return await driver.start(plan, box.made)
