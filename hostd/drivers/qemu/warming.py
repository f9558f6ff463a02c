"""Warm guests: clones that were made before anybody asked, and stand still until a sandbox claims them.

A member is a clone whose agent answered, whose image is mounted (in its template, or here by PREPARE) and whose memory
is plugged. It is rehearsed before it is paused (hostd/drivers/qemu/rehearsal.py): CONFIGURE's steps, and programs of
the image, confined and with an identity to throw away. What a claim has left to do is: limits, `cont`, CONFIGURE (fresh
randomness, clock, names), memory, and the command itself.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from guestagent.messages import Configure, Prepare
from hostd.agentlink import AgentLink
from hostd.drivers.contract import Engine, Loss, Region, StartPlan, WarmGuest
from hostd.drivers.qemu.cloning import Cloner, Started
from hostd.drivers.qemu.command import GuestShape
from hostd.drivers.qemu.engine import QemuEngine
from hostd.drivers.qemu.plan import LAYER_DEADLINE_MS, clone_memory, configure_for, limits_for
from hostd.drivers.qemu.rehearsal import rehearse
from hostd.drivers.qemu.template import Choice, Origin, ceiling_bucket_mib, choose
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Vmm, Vmms, first_loss
from hostd.errors import InvalidSpec, StartFailed, TemplateUnusable
from hostd.journal import Handle
from hostd.regions import regions_of
from hostd.spec import BLOCK_MIB, MemoryShape
from hostd.tasks import to_its_end

PLUG_DEADLINE_S, PLUG_POLL_S = 10.0, 0.02

Phases = tuple[tuple[str, float], ...]
Settle = Callable[[StartPlan, Handle, Vmm, AgentLink, Phases], Awaitable[QemuEngine]]
"""Makes a guest whose agent answers one sandbox: CONFIGURE and memory."""


class QemuWarmGuest:
    """Implements hostd.drivers.contract.WarmGuest. `open` closes its control, link and watch."""

    def __init__(
        self,
        started: Started,
        plan: StartPlan,
        templates: Templates,
        open_: AsyncExitStack,
        *,
        unrehearsed: str,
    ) -> None:
        self.handle, self.folder = replace(started.handle, member=plan.spec.uid), plan.folder
        self.vmm, self.link, self.unrehearsed = started.vmm, started.link, unrehearsed
        self._templates, self.open = templates, open_

    async def wait_gone(self) -> Loss:
        """See WarmGuest.wait_gone."""
        return await first_loss(self.vmm.process.gone, self.link.lost)

    async def regions(self) -> list[Region]:
        """See WarmGuest.regions."""
        return await asyncio.to_thread(regions_of, self.handle.pid)

    def current(self) -> bool:
        """See WarmGuest.current."""
        return self._templates.ready().get(self.handle.template, False)

    async def detach(self) -> None:
        """See WarmGuest.detach."""
        await self.open.aclose()


class QemuWarming:
    """Implements hostd.drivers.contract.Warming."""

    def __init__(
        self,
        cloner: Cloner,
        vmms: Vmms,
        settle: Settle,
        *,
        clock: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._cloner, self._vmms, self._settle, self._clock, self._time_ns = cloner, vmms, settle, clock, time_ns

    async def prewarm(self, plan: StartPlan, made: Callable[[Handle], None]) -> QemuWarmGuest:
        """See Warming.prewarm. The image's template is made when it is missing; until then a generic one does."""
        uid, templates = plan.spec.uid, self._cloner.templates
        shape, choice = await self._template(plan)
        async with AsyncExitStack() as stack:
            started = await self._cloner.clone(
                plan, shape, choice, lambda handle: made(replace(handle, member=uid)), stack
            )
            try:
                unrehearsed = await self._warm(plan, choice, started)
            except BaseException:
                templates.give(choice.key)
                await to_its_end(self._vmms.destroy(uid, plan.folder, replace(started.handle, member=uid)))
                raise
            return QemuWarmGuest(started, plan, templates, stack.pop_all(), unrehearsed=unrehearsed)

    async def _template(self, plan: StartPlan) -> tuple[GuestShape, Choice]:
        fitting = self._cloner.fitting(plan)
        if fitting.image is None:
            least_mib = plan.spec.resources.memory_min_mib
            raise InvalidSpec(
                f"a guaranteed {least_mib} MiB is too little for clones with this image and ceiling: raise the minimum",
                reason="MemoryTooSmall",
            )
        self._cloner.want_image(plan, fitting)
        for _ in range(2):
            choice = choose(fitting.candidates, self._cloner.templates.ready(), cold=False)
            shape = fitting.image if choice.origin is Origin.IMAGE else fitting.generic
            if choice.origin is not Origin.COLD and shape is not None:
                return shape, choice
            await self._cloner.templates.until_made(fitting.candidates.image_key)
        raise TemplateUnusable(f"template {fitting.candidates.image_key[:12]} of the pool's image could not be made")

    async def _warm(self, plan: StartPlan, choice: Choice, started: Started) -> str:
        """Everything up to the pause; "" or why no program of the image was rehearsed."""
        link, control = started.link, started.vmm.control
        if choice.origin is Origin.GENERIC:
            layers = reversed(dict.fromkeys(layer.volume_uuid for layer in reversed(plan.layers)))  # as CONFIGURE's
            await link.prepare(Prepare(tuple(layers), LAYER_DEADLINE_MS))
        memory = MemoryShape(started.handle.base_mib, started.handle.elastic_mib)
        wanted_mib = memory.requested_mib(plan.spec.resources.memory_mib)
        if wanted_mib:
            await control.request_elastic_mib(wanted_mib)
            give_up_s = self._clock() + PLUG_DEADLINE_S
            while wanted_mib - await control.elastic_mib() >= BLOCK_MIB:
                if self._clock() > give_up_s:
                    raise StartFailed(f"the guest did not take {wanted_mib} MiB in {PLUG_DEADLINE_S:.0f} s")
                await asyncio.sleep(PLUG_POLL_S)
        uuids = tuple(layer.volume_uuid for layer in plan.layers)

        def throwaway() -> Configure:
            return configure_for(plan.spec, uuids, entropy=secrets.token_bytes(64), now_ns=self._time_ns())

        unrehearsed = await rehearse(link, throwaway)
        await control.execute("stop")
        return unrehearsed

    async def claim(self, guest: WarmGuest, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Warming.claim."""
        assert isinstance(guest, QemuWarmGuest)
        begin_s = self._clock()
        handle = self._claimed(guest.handle, plan)
        try:
            made(handle)
            limits = limits_for(plan.spec.resources)
            await asyncio.to_thread(self._vmms.cgroups.set_limits, handle.member, limits)
            await guest.vmm.control.execute("cont")
            phases = (("resume", self._clock() - begin_s),)
            engine = await self._settle(plan, handle, guest.vmm, guest.link, phases)
        except BaseException:
            await to_its_end(self.end(guest))
            raise
        guest.open.pop_all()  # the engine's now
        engine.origin = Origin.WARM.value
        return engine

    @staticmethod
    def _claimed(handle: Handle, plan: StartPlan) -> Handle:
        resources = plan.spec.resources
        if resources.memory_min_mib < handle.base_mib:
            asked_mib = resources.memory_min_mib
            raise StartFailed(f"a member has {handle.base_mib} MiB of boot memory, {asked_mib} are asked for")
        template = MemoryShape(handle.base_mib, ceiling_bucket_mib(resources.memory_max_mib) - handle.base_mib)
        return replace(handle, elastic_mib=clone_memory(template, resources).elastic_mib)

    async def end(self, guest: QemuWarmGuest) -> None:
        """Ends a guest that nobody has."""
        await guest.detach()
        await self._vmms.destroy(guest.handle.member, guest.folder, guest.handle)
        self._cloner.templates.give(guest.handle.template)
