"""Warm guests: clones that were made before anybody asked, and stand still until a sandbox claims them.

A member is a clone whose agent answered, whose image is mounted (in its template, or here by PREPARE) and whose memory
is plugged. It is rehearsed before it is paused, because the first run of anything after a restore is slow: TCG has no
translation of it yet, and each page of the template that is written is copied. A rehearsal is a START in which the
agent runs a program of its own in place of the command: nothing of the tenant may run before CONFIGURE. What a claim
has left to do is: limits, `cont`, CONFIGURE (fresh randomness, clock, names), memory; and the command itself, whose
code (the image's loader, its libraries) is the one thing that cannot be warmed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from guestagent.messages import Prepare, StartProcess
from hostd.agentlink import AgentLink
from hostd.drivers.contract import Engine, Loss, Region, StartPlan, WarmGuest
from hostd.drivers.qemu.cloning import Cloner, Started
from hostd.drivers.qemu.command import GuestShape
from hostd.drivers.qemu.engine import QemuEngine
from hostd.drivers.qemu.plan import LAYER_DEADLINE_MS, clone_memory, limits_for
from hostd.drivers.qemu.template import Choice, Origin, ceiling_bucket_mib, choose
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Vmm, Vmms, first_loss
from hostd.errors import CommandFailed, InvalidSpec, StartFailed, TemplateUnusable
from hostd.journal import Handle
from hostd.regions import regions_of
from hostd.spec import BLOCK_MIB, MemoryShape
from hostd.tasks import to_its_end

log = logging.getLogger("sandloom.hostd.warming")

REHEARSALS = 3
PLUG_DEADLINE_S, PLUG_POLL_S = 10.0, 0.02
REHEARSED = StartProcess(
    proc=2, argv=(b"rehearsal",), env=(), cwd=b"/", user=b"", tty=False, rows=24, cols=80, stdin=False
)

Phases = tuple[tuple[str, float], ...]
Settle = Callable[[StartPlan, Handle, Vmm, AgentLink, Phases], Awaitable[QemuEngine]]
"""Makes a guest whose agent answers one sandbox: CONFIGURE and memory."""


class QemuWarmGuest:
    """Implements hostd.drivers.contract.WarmGuest. `open` closes its control, link and watch."""

    def __init__(
        self, handle: Handle, folder: Path, vmm: Vmm, link: AgentLink, templates: Templates, open_: AsyncExitStack
    ) -> None:
        self.handle, self.folder, self.vmm, self.link = handle, folder, vmm, link
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
        self, cloner: Cloner, vmms: Vmms, settle: Settle, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cloner, self._vmms, self._settle, self._clock = cloner, vmms, settle, clock

    async def prewarm(self, plan: StartPlan, made: Callable[[Handle], None]) -> QemuWarmGuest:
        """See Warming.prewarm. The image's template is made when it is missing; until then a generic one does."""
        uid, templates = plan.spec.uid, self._cloner.templates
        shape, choice = await self._template(plan)
        async with AsyncExitStack() as stack:
            started = await self._cloner.clone(
                plan, shape, choice, lambda handle: made(replace(handle, member=uid)), stack
            )
            handle = replace(started.handle, member=uid)
            try:
                await self._warm(plan, choice, started)
            except BaseException:
                templates.give(choice.key)
                await to_its_end(self._vmms.destroy(uid, plan.folder, handle))
                raise
            return QemuWarmGuest(handle, plan.folder, started.vmm, started.link, templates, stack.pop_all())

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

    async def _warm(self, plan: StartPlan, choice: Choice, started: Started) -> None:
        link, control = started.link, started.vmm.control
        if choice.origin is Origin.GENERIC:
            uuids = reversed(dict.fromkeys(layer.volume_uuid for layer in reversed(plan.layers)))  # as CONFIGURE's
            await link.prepare(Prepare(tuple(uuids), LAYER_DEADLINE_MS))
        memory = MemoryShape(started.handle.base_mib, started.handle.elastic_mib)
        wanted_mib = memory.requested_mib(plan.spec.resources.memory_mib)
        if wanted_mib:
            await control.request_elastic_mib(wanted_mib)
            give_up_s = self._clock() + PLUG_DEADLINE_S
            while wanted_mib - await control.elastic_mib() >= BLOCK_MIB:
                if self._clock() > give_up_s:
                    raise StartFailed(f"the guest did not take {wanted_mib} MiB in {PLUG_DEADLINE_S:.0f} s")
                await asyncio.sleep(PLUG_POLL_S)
        for _ in range(REHEARSALS):
            await link.stats()
            await _rehearse(link)
        await control.execute("stop")

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


async def _rehearse(link: AgentLink) -> None:
    """A START as the claim's will be: the agent puts a program of its own in the command's place (PROTOCOL.md)."""
    try:
        process = await link.spawn(replace(REHEARSED, proc=link.new_proc()))
    except CommandFailed as error:
        log.warning("a guest is not rehearsed, its claim will be slower: %s", error)
        return
    async for _ in process.output():
        pass
    await process.wait()
    await process.release()
