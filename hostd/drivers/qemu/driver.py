"""The guest-kernel driver: one QEMU a sandbox, in its own directory, uid and cgroup, with its agent.

A start is cut into phases that add up: vmm (exec to QMP greeting), kernel (to the agent's first answer), agent
(CONFIGURE: layers, overlay, identity). The command's own start is the owner's fourth phase, workload.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from guestagent.messages import MAIN_PROC
from guestagent.protocol import ProcCarry, SessionCarry
from hostd.agentlink import AgentLink
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Checkpointing, Engine, StartPlan
from hostd.drivers.qemu.checkpointing import QemuCheckpointing
from hostd.drivers.qemu.checkpointtaking import let_run
from hostd.drivers.qemu.cloning import Cloner
from hostd.drivers.qemu.command import SERVICES_SOCKET, GuestShape
from hostd.drivers.qemu.control import Control
from hostd.drivers.qemu.engine import Parts, QemuEngine
from hostd.drivers.qemu.plan import GuestKernel, configure_for, limits_for, shape_for
from hostd.drivers.qemu.template import Choice, Origin
from hostd.drivers.qemu.vmm import Launch, Vmm, Vmms
from hostd.drivers.qemu.warming import QemuWarming
from hostd.drivers.seat import seat_of
from hostd.errors import StartFailed, TemplateUnusable
from hostd.journal import Handle
from hostd.process import WatchedProcess, open_same
from hostd.services.serving import keep_clock, serve
from hostd.spec import MemoryShape
from hostd.tasks import to_its_end

ADOPT_DEADLINE_S = 15.0


class QemuDriver:
    """Implements hostd.drivers.contract.Driver."""

    def __init__(
        self,
        kernel: GuestKernel,
        accel: str,
        cgroups: Hierarchy,
        *,
        boot_deadline_s: float,
        layers_as: str = "pmem",
        cloner: Cloner | None = None,
        huge: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.kernel, self.accel, self.cgroups = kernel, accel, cgroups
        self._vmms, self._layers_as, self._cloner = Vmms(cgroups, boot_deadline_s, huge=huge), layers_as, cloner
        self._clock, self._time_ns = clock, time_ns
        self.checkpointing: Checkpointing | None = QemuCheckpointing(
            kernel, accel, self._vmms, cgroups, clock=clock, time_ns=time_ns
        )
        self.warming = None if cloner is None else QemuWarming(cloner, self._vmms, self._settle, clock=clock)

    async def start(self, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Driver.start. A clone when a template fits, else a cold boot; the engine's `origin` says which."""
        if self._cloner is None:
            return await self._boot(plan, made, "")
        fitting, choice = self._cloner.choose(plan)
        if choice.awaits:
            choice = await self._cloner.wait(plan, fitting, choice)
        shape = fitting.image if choice.origin is Origin.IMAGE else fitting.generic
        if choice.origin is Origin.COLD or shape is None:
            return await self._boot(plan, made, choice.reason)
        try:
            return await self._clone(self._cloner, plan, shape, choice, made)
        except (StartFailed, TemplateUnusable) as error:
            if isinstance(error, StartFailed) and error.reason not in ("VmmExited", "TemplateUnusable", "BootTimeout"):
                raise
            self._cloner.templates.forget(choice.key)
            return await self._boot(plan, made, f"cloning failed: {error}")

    async def _clone(
        self, cloner: Cloner, plan: StartPlan, shape: GuestShape, choice: Choice, made: Callable[[Handle], None]
    ) -> QemuEngine:
        async with AsyncExitStack() as stack:
            started = await cloner.clone(plan, shape, choice, made, stack)
            try:
                engine = await self._settle(plan, started.handle, started.vmm, started.link, started.phases)
            except BaseException:
                cloner.templates.give(choice.key)
                await to_its_end(self._vmms.destroy(plan.spec.uid, plan.folder, started.handle))
                raise
            engine.origin = f"{choice.origin.value} {choice.key[:12]}"
            stack.pop_all()
            return engine

    async def _boot(self, plan: StartPlan, made: Callable[[Handle], None], reason: str) -> QemuEngine:
        """A cold start."""
        shape = shape_for(plan, self.kernel, self.accel, self._layers_as)
        begin_s = self._clock()
        gids = tuple({self.kernel.gid, *(layer.gid for layer in plan.layers)})
        launch = Launch(shape, plan.vm_uid, gids, limits_for(plan.spec.resources))
        forked = asyncio.ensure_future(asyncio.to_thread(self._vmms.fork, launch))
        try:
            handle = await asyncio.shield(forked)
            made(handle)
            async with AsyncExitStack() as stack:
                vmm = await self._vmms.reach(shape, handle, stack)
                vmm_s = self._clock()
                link = await self._vmms.reach_agent(shape, vmm, stack)
                phases = (("vmm", vmm_s - begin_s), ("kernel", self._clock() - vmm_s))
                engine = await self._settle(plan, handle, vmm, link, phases)
                stack.pop_all()
        except BaseException:
            await to_its_end(self._vmms.undo(shape, forked))
            raise
        engine.origin = f"{Origin.COLD.value}{': ' + reason if reason else ''}"
        return engine

    async def _settle(
        self, plan: StartPlan, handle: Handle, vmm: Vmm, link: AgentLink, phases: tuple[tuple[str, float], ...]
    ) -> QemuEngine:
        """Makes a guest whose agent answers this one sandbox."""
        begin_s = self._clock()
        uuids = tuple(layer.volume_uuid for layer in plan.layers)
        entropy = secrets.token_bytes(64)
        await link.configure(configure_for(plan.spec, uuids, entropy=entropy, now_ns=self._time_ns()))
        memory = MemoryShape(handle.base_mib, handle.elastic_mib)
        if memory.elastic_mib:
            await vmm.control.request_elastic_mib(memory.requested_mib(plan.spec.resources.memory_mib))
        seat = seat_of(plan.spec.uid, plan.folder, handle)
        tool = await serve(plan.spec.services, seat.folder / SERVICES_SOCKET, link, plan.tell)
        phases = (*phases, ("agent", self._clock() - begin_s))
        return QemuEngine(seat.name, handle, Parts(vmm.process, vmm.control, link, tool), self.cgroups, phases)

    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None:
        """See Driver.adopt. None when the process is gone; AgentLost or ControlLost when it does not answer."""
        descriptor = open_same(handle.pid, handle.start_ticks)
        if descriptor is None:
            return None
        async with AsyncExitStack() as stack:
            process = WatchedProcess(handle.pid, descriptor)
            stack.callback(process.close)
            seat, process_spec = seat_of(plan.spec.uid, plan.folder, handle), plan.spec.process
            folder = seat.folder
            control = await Control.connect(folder / "qmp.sock", deadline_s=ADOPT_DEADLINE_S, alive=process.gone)
            stack.push_async_callback(control.close)
            await let_run(control)  # a former hostd may have died while it took a checkpoint
            main = ProcCarry(MAIN_PROC, offsets.get(1, 0), offsets.get(2, 0), stdin_open=process_spec.stdin)
            link = await AgentLink.connect(
                folder / "agent.sock", deadline_s=ADOPT_DEADLINE_S, gone=process.gone, carry=SessionCarry(procs=(main,))
            )
            stack.push_async_callback(link.close)
            await link.thaw()
            await keep_clock(plan.spec.services, link, self._time_ns)
            if handle.template and self._cloner is not None:
                await self._cloner.templates.adopt(handle.template, handle.pid)
            tool = await serve(plan.spec.services, folder / SERVICES_SOCKET, link, plan.tell)
            stack.pop_all()
            return QemuEngine(seat.name, handle, Parts(process, control, link, tool), self.cgroups)

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        """See Driver.destroy."""
        seat = seat_of(uid, folder, handle)
        await self._vmms.destroy(seat.name, seat.folder, handle)
        if handle is not None and handle.template and self._cloner is not None:
            self._cloner.templates.give(handle.template)
