"""The elastic memory of one QEMU guest: what it is now, and each mechanism's move (hostd/memory/policy.py decides).

Owns, from first use to close(): a descriptor of the elastic file. A fork has none: nobody but its own QEMU can drop
pages of a private mapping, so there virtio-mem does all.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from guestagent.messages import GuestEvent, GuestStats
from hostd.agentlink import AgentLink
from hostd.cgroups import Hierarchy
from hostd.drivers.qemu.control import Control
from hostd.errors import AgentLost, ControlLost
from hostd.journal import Handle
from hostd.memory.balloon import BLOCK_MIB, Balloon, ElasticRegion
from hostd.memory.elasticfile import find_elastic, held_bytes
from hostd.memory.policy import ElasticNow, Step
from hostd.memory.values import Mechanism, MemoryEvent, MemoryEventKind, MemoryNow, MemorySignals
from hostd.spec import MemoryShape

ELASTIC_DEVICE = "vmem0"
BALLOON_DEADLINE_S = 5.0
SETTLE_S = 0.1
PLUG_POLL_S, PLUG_STILL_S = 0.01, 3.0
"""virtio-mem is given up for now when nothing has moved for PLUG_STILL_S; a guest tries again when it is asked anew."""


@dataclass(frozen=True)
class Did:
    """What a step came to: how much the guest has more (or less), whether its agent left it without an answer, and what
    there is now, when the answer itself said it all: a growth from the balloon is there with it."""

    moved_mib: int
    silent: bool = False
    problem: str = ""
    now: ElasticNow | None = None


class GuestMemory:
    """See the module."""

    def __init__(
        self,
        name: str,
        handle: Handle,
        control: Control,
        link: AgentLink,
        cgroups: Hierarchy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._handle, self._control, self._link, self._cgroups = name, handle, control, link, cgroups
        self.shape = MemoryShape(handle.base_mib, handle.elastic_mib)
        self._clock = clock
        self._region: ElasticRegion | None = None
        self._balloon: Balloon | None = None
        self._looked = False
        self._pressed_at_s: float | None = None
        self._unplugging = False
        self._known: ElasticNow | None = None
        self.refused_runs = 0

    # What there is.

    async def look(self) -> tuple[MemoryNow, ElasticNow]:
        """Asks QEMU, the guest and the host. ControlLost, AgentLost."""
        await self._find()
        plugged = await self._control.elastic_mib() if self.shape.elastic_mib else 0
        stats = await self._link.stats()
        ballooned = min(plugged, stats.balloon_kib >> 10)
        descriptor = None if self._region is None else self._region.descriptor
        held = None if descriptor is None else held_bytes(descriptor) >> 20
        now = ElasticNow(
            base_mib=self.shape.base_mib,
            usable_mib=self.shape.elastic_mib,
            plugged_mib=plugged,
            ballooned_mib=ballooned,
            available_mib=stats.mem_available_kib >> 10,
            punchable=descriptor is not None,
            held_mib=held,
            clears=self._handle.init_on_alloc,
            swappable_mib=self._cgroups.swappable_mib(),
            pressed_s_ago=None if self._pressed_at_s is None else self._clock() - self._pressed_at_s,
        )
        self._known = now
        told = MemoryNow(
            now.actual_mib, now.available_mib, plugged, ballooned, now.punchable, held or 0, signals_of(stats)
        )
        return told, now

    async def ready_for(self, memory_mib: int) -> ElasticNow:
        """As look(), for a resize to `memory_mib`. A growth that the balloon can serve alone need not ask first: as far
        as is known nothing has changed since the last look, and the answer says what the balloon holds then."""
        known = self._known
        if known is not None and 0 < memory_mib - known.actual_mib <= known.ballooned_mib:
            return known
        return (await self.look())[1]

    async def _find(self) -> None:
        """Where the elastic memory is, in the guest and here; once."""
        if self._looked or not self.shape.elastic_mib:
            return
        size_mib = MemoryShape(0, self._handle.device_mib or self.shape.elastic_mib).region_mib
        try:
            private = bool(self._handle.checkpoint)
            descriptor = None if private else await asyncio.to_thread(find_elastic, self._handle.pid, size_mib << 20)
        except OSError as error:
            raise ControlLost(f"QEMU's elastic memory cannot be found: {error}") from error
        try:
            region = ElasticRegion(await self._address(), size_mib << 20, descriptor)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        self._region, self._balloon = region, Balloon(self._link.elastic, region)
        self._looked = True

    async def _address(self) -> int:
        for device in await self._control.execute("query-memory-devices"):
            if device["data"].get("id") == ELASTIC_DEVICE:
                return int(device["data"]["memaddr"])
        raise ControlLost(f"QEMU has no device {ELASTIC_DEVICE}")

    def heard(self, event: GuestEvent) -> MemoryEvent | None:
        """What a guest's event says of its memory; None when it is of something else. Claims, cut to what can be."""
        told = event_of(event)
        if told is not None and told.kind is MemoryEventKind.PRESSURE:
            self._pressed_at_s, self._known = self._clock(), None
        return told

    # What can be done.

    async def act(self, step: Step, now: ElasticNow, accepted: Callable[[], None]) -> Did:
        """Carries a step out, as far as it goes; `accepted` is called when it is under way. ControlLost."""
        self._known = None
        if step.mechanism is Mechanism.VIRTIO_MEM:
            await self._ask_anew(step.mib, now.plugged_mib)
            await self._control.request_elastic_mib(step.mib)
            accepted()
            return await self._until_plugged(step.mib, now)
        accepted()
        if step.mechanism is Mechanism.BALLOON:
            return await self._set_balloon(step.mib, now)
        freed = await asyncio.to_thread(self._cgroups.reclaim, self._name, step.mib << 20)
        return Did(-(freed >> 20))

    async def _set_balloon(self, ballooned_mib: int, now: ElasticNow) -> Did:
        assert self._balloon is not None, "look() found it"
        if self._unplugging and ballooned_mib >= now.ballooned_mib:
            await self._stop_unplugging()
        try:
            outcome = await self._balloon.set(ballooned_mib // BLOCK_MIB, BALLOON_DEADLINE_S)
        except AgentLost as error:
            return Did(0, silent=True, problem=str(error))
        self.refused_runs += outcome.refused_runs
        problem = outcome.problem
        if outcome.refused_runs:
            problem = f"the guest named {outcome.refused_runs} runs that are not its elastic memory"
        moved_mib = now.ballooned_mib - outcome.blocks * BLOCK_MIB
        after = None
        if moved_mib > 0 and not problem:
            available_mib = now.available_mib + moved_mib
            after = replace(now, ballooned_mib=now.ballooned_mib - moved_mib, available_mib=available_mib)
        self._known = after
        return Did(moved_mib, problem=problem, now=after)

    async def _until_plugged(self, plugged_mib: int, now: ElasticNow) -> Did:
        seen_mib, still_since_s = now.plugged_mib, self._clock()
        while seen_mib != plugged_mib and self._clock() - still_since_s < PLUG_STILL_S:
            await asyncio.sleep(PLUG_POLL_S)
            at_mib = await self._control.elastic_mib()
            if at_mib != seen_mib:
                seen_mib, still_since_s = at_mib, self._clock()
        self._unplugging = self._unplugging and seen_mib != plugged_mib
        did = Did(seen_mib - now.plugged_mib)
        if did.moved_mib < 0 and now.ballooned_mib and now.punchable:
            # Unplugging moves the balloon's blocks, too: the guest has others for them now, which the host still holds.
            again = await self._set_balloon(now.ballooned_mib, now)
            return Did(did.moved_mib, again.silent, again.problem)
        return did

    async def _ask_anew(self, mib: int, plugged_mib: int) -> None:
        """A guest that could not unplug all it was asked for lets that be for 50 s, then for up to 5 minutes (the
        kernel's virtio_mem.c, VIRTIO_MEM_RETRY_TIMER_*), and the same request once more is no news to it: so it is told
        of another one before."""
        if self._unplugging and mib < plugged_mib:
            await self._control.request_elastic_mib(plugged_mib)
        self._unplugging = mib < plugged_mib

    async def _stop_unplugging(self) -> None:
        """A guest that goes on trying to unplug may move a block between telling of it and its being punched."""
        await self._control.request_elastic_mib(await self._control.elastic_mib())
        await asyncio.sleep(SETTLE_S)
        self._unplugging = False

    def close(self) -> None:
        """Lets go of the elastic file. Idempotent."""
        if self._region is not None and self._region.descriptor is not None:
            os.close(self._region.descriptor)
        self._region = self._balloon = None


def signals_of(stats: GuestStats) -> MemorySignals:
    """What a guest's counters say of its memory. Pure."""
    return MemorySignals(
        psi_some_us=stats.psi_mem_some_us,
        psi_full_us=stats.psi_mem_full_us,
        refaults=stats.refault,
        oom_kills=stats.oom_kills,
        active_mib=stats.active_kib >> 10,
        inactive_mib=stats.inactive_kib >> 10,
        swapped_mib=stats.swapped_kib >> 10,
    )


def event_of(event: GuestEvent) -> MemoryEvent | None:
    """A guest's event as a value; None when it is not of memory. Pure."""
    kinds = {"psi_memory": MemoryEventKind.PRESSURE, "oom_kill": MemoryEventKind.OOM_KILL}
    if event.name not in kinds:
        return None
    values = {name: max(0, value) for name, value in event.values}
    return MemoryEvent(
        kinds[event.name],
        available_mib=values.get("available_kib", 0) >> 10,
        total_mib=values.get("total_kib", 0) >> 10,
        gave_back_mib=values.get("gave_back_kib", 0) >> 10,
        wants_mib=values.get("wants_kib", 0) >> 10,
        oom_kills=values.get("total", 0),
        stalled_us=values.get("full_us", 0),
    )
