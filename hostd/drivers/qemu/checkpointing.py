"""Checkpoints of running guests, and guests restored from them: implements hostd.drivers.contract.Checkpointing.

Restoring: QEMU with both RAM blocks mapped privately from the sealed memfds and layers where they stood → device state
→ run → the agent answers, its workload frozen still → other processes than main are killed → RENEW: entropy, clock,
names → the workload goes on. So nothing of a tenant's ever runs with another sandbox's identity or randomness.

Memory of a restored guest: a page of the checkpoint costs memory once for all forks until a fork writes to it, then
once more for that fork. A page that held zeros is a hole: the first fork to touch it makes the file's page real (of
zeros, for all forks) besides its own copy. What a fork gives back by shrinking are its own copies; the checkpoint's
pages go when the checkpoint and the last of its forks are gone.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

from guestagent.messages import MAIN_PROC, Renew
from guestagent.protocol import ProcCarry, SessionCarry
from hostd.agentlink import AgentLink
from hostd.agentprocess import AgentProcess
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Engine, StartPlan, TakenCheckpoint
from hostd.drivers.qemu import checkpointblob, snapshot
from hostd.drivers.qemu.accel import cpu_identity, qemu_version
from hostd.drivers.qemu.checkpointblob import CheckpointMemory
from hostd.drivers.qemu.checkpointform import GuestForm, restored_shape
from hostd.drivers.qemu.checkpointtaking import let_go_on, take
from hostd.drivers.qemu.command import RamFile
from hostd.drivers.qemu.engine import Parts, QemuEngine
from hostd.drivers.qemu.plan import GuestKernel, limits_for, machine_id_of
from hostd.drivers.qemu.vcpus import plugged_count
from hostd.drivers.qemu.vmm import Launch, Vmms
from hostd.errors import CannotCheckpoint, CheckpointUnusable, StartFailed
from hostd.journal import Handle
from hostd.services.clock import clock_ns
from hostd.services.serving import serve
from hostd.spec import SandboxClass
from hostd.tasks import to_its_end

ENTROPY_BYTES = 64


@dataclass(frozen=True)
class QemuMemory:
    """Implements hostd.drivers.contract.CheckpointMemory."""

    sealed: CheckpointMemory

    def held_bytes(self) -> int:
        """See the contract."""
        return self.sealed.held_bytes()

    def write(self, about: bytes, out: BinaryIO) -> None:
        """See the contract."""
        checkpointblob.write_blob(self.sealed, about, out)

    def close(self) -> None:
        """See the contract."""
        self.sealed.close()


@dataclass(frozen=True)
class _Restoring:
    """One restore under way."""

    plan: StartPlan
    launch: Launch
    handle: Handle
    state_fd: int
    main: ProcCarry
    begin_s: float


class QemuCheckpointing:
    """Stateless: what is open belongs to engines and to whoever holds a memory."""

    def __init__(
        self,
        kernel: GuestKernel,
        accel: str,
        vmms: Vmms,
        cgroups: Hierarchy,
        *,
        clock: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._kernel, self._accel, self._vmms, self._cgroups = kernel, accel, vmms, cgroups
        self._clock, self._time_ns = clock, time_ns

    classes = (SandboxClass.GUEST_KERNEL,)

    def recognises(self, path: Path) -> bool:
        """See Checkpointing.recognises."""
        return checkpointblob.is_blob(path)

    # Taking.

    async def checkpoint(
        self, engine: Engine, offsets: Callable[[], dict[int, int]], *, go_on: bool = True
    ) -> TakenCheckpoint:
        """See Checkpointing.checkpoint."""
        if not isinstance(engine, QemuEngine):
            raise CannotCheckpoint("only sandboxes of class guest-kernel can be checkpointed")
        qemu, cpu = await asyncio.to_thread(_identity, self._accel)
        plugged_vcpus = await plugged_count(engine.control)
        form = GuestForm.of(engine.handle, qemu, cpu, plugged_vcpus)
        taken = await take(engine, form, offsets, stay=not go_on)
        return TakenCheckpoint(QemuMemory(taken.memory), taken.form.encode(), taken.offsets, taken.pause_s)

    async def go_on(self, engine: Engine) -> None:
        """See Checkpointing.go_on."""
        if isinstance(engine, QemuEngine):
            await let_go_on(engine)

    def read_about(self, path: Path) -> bytes:
        """See Checkpointing.read_about."""
        return checkpointblob.read_about(path)

    def load(self, path: Path) -> QemuMemory:
        """See Checkpointing.load."""
        return QemuMemory(checkpointblob.load(path))

    def load_of(self, path: Path, pid: int) -> QemuMemory:
        """See Checkpointing.load_of."""
        return QemuMemory(checkpointblob.from_fork(path, pid))

    # Restoring.

    async def restore(
        self,
        plan: StartPlan,
        memory: QemuMemory,
        form: Mapping[str, object],
        offsets: Mapping[int, int],
        made: Callable[[Handle], None],
    ) -> Engine:
        """See Checkpointing.restore."""
        begin_s = self._clock()
        guest, sealed = GuestForm.parse(form), memory.sealed
        guest.require(self._accel, *await asyncio.to_thread(_identity, self._accel))
        if (sealed.ram_bytes, sealed.elastic_bytes) != (guest.base_mib << 20, guest.memory.region_mib << 20):
            raise CheckpointUnusable("the checkpoint's memory is not of the size that its form says; make it anew")
        with sealed.state_reader() as state_fd:
            launch = self._launch(plan, guest, sealed, state_fd)
            forked = asyncio.ensure_future(asyncio.to_thread(self._vmms.fork, launch))
            try:
                raw = await asyncio.shield(forked)
                handle = replace(raw, elastic_mib=guest.elastic_mib, checkpoint=plan.spec.checkpoint)
                made(handle)
                main = ProcCarry(MAIN_PROC, offsets.get(1, 0), offsets.get(2, 0), stdin_open=plan.spec.process.stdin)
                return await self._wake(_Restoring(plan, launch, handle, state_fd, main, begin_s))
            except BaseException:
                await to_its_end(self._vmms.undo(launch.shape, forked))
                raise

    def _launch(self, plan: StartPlan, guest: GuestForm, sealed: CheckpointMemory, state_fd: int) -> Launch:
        elastic = RamFile(sealed.elastic_fd, private=True) if sealed.elastic_bytes else None
        shape = restored_shape(guest, plan, self._kernel, RamFile(sealed.ram_fd, private=True), elastic)
        gids = tuple({layer.gid for layer in plan.layers})
        inherit = tuple(fd for fd in (sealed.ram_fd, sealed.elastic_fd, state_fd) if fd >= 0)
        return Launch(shape, plan.vm_uid, gids, limits_for(plan.spec.resources, restored=True), inherit)

    async def _wake(self, restoring: _Restoring) -> QemuEngine:
        plan, shape, times = restoring.plan, restoring.launch.shape, [restoring.begin_s]
        async with AsyncExitStack() as stack:
            vmm = await self._vmms.reach(shape, restoring.handle, stack)
            times.append(self._clock())
            try:
                await snapshot.load_state(vmm.control, restoring.state_fd, gone=vmm.process.gone)
            except StartFailed as error:
                raise CheckpointUnusable(f"QEMU does not take the checkpoint: {error}") from error
            await vmm.control.execute("cont")
            times.append(self._clock())
            link = await self._vmms.reach_agent(shape, vmm, stack, SessionCarry(procs=(restoring.main,)))
            times.append(self._clock())
            main = await self._renew(plan, link)
            tool = await serve(plan.spec.services, shape.services_path, link, plan.tell)
            times.append(self._clock())
            stack.pop_all()
        names = ("vmm", "restore", "answer", "renew")
        phases = tuple((name, end - begin) for name, begin, end in zip(names, times, times[1:], strict=False))
        parts = Parts(vmm.process, vmm.control, link, tool)
        engine = QemuEngine(plan.spec.uid, restoring.handle, parts, self._cgroups, phases, main)
        engine.origin = f"restored from checkpoint {plan.spec.checkpoint[:12]}".rstrip()
        return engine

    async def _renew(self, plan: StartPlan, link: AgentLink) -> AgentProcess:
        """The main process of a guest that has become a sandbox of its own; whoever started others is not here."""
        main: AgentProcess | None = None
        others: list[AgentProcess] = []
        for state in link.guest.procs:
            process = link.follow(state.proc)
            if state.proc == MAIN_PROC:
                main = process
            else:
                await process.signal(signal.SIGKILL)
                others.append(process)
        if main is None:
            raise CheckpointUnusable("the checkpoint's guest has no main process; make it anew")
        renew = Renew(
            hostname=plan.spec.hostname.encode(),
            entropy=secrets.token_bytes(ENTROPY_BYTES),
            machine_id=machine_id_of(plan.spec),
            time_unix_ns=clock_ns(plan.spec.services, self._time_ns()),
        )
        await link.renew(renew)
        for process in others:
            link.abandon(process)
        return main


@cache
def _identity(accel: str) -> tuple[str, str]:
    """This host's QEMU and CPU: a state fits the same only."""
    return qemu_version(), cpu_identity(accel)
