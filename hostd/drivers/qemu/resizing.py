"""A guest's resize under way: step by step as hostd/memory/policy.py decides, until the target is reached.

Owns one task, the follower: it goes on after resize() returned, and ends with the next resize, with success, or with
the engine's being let go of. A step that has begun is ended before another resize begins. A checkpoint is taken between
two steps.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hostd.agentlink import AgentLink
from hostd.drivers.qemu.control import Control
from hostd.drivers.qemu.elastic import Did, GuestMemory
from hostd.drivers.qemu.vcpus import set_online
from hostd.errors import AgentLost, HostdError
from hostd.journal import Handle
from hostd.memory.policy import ElasticNow, Step, cause_of, next_step, target_of
from hostd.memory.values import Mechanism, Moved, Resized
from hostd.spec import BLOCK_MIB, Resources
from hostd.tasks import OwnedTasks
from hostd.turnstile import Turnstile

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0


@dataclass
class _Progress:
    """How far the resize under way has come."""

    resources: Resources
    vcpus: int
    now: ElasticNow
    begin: ElasticNow
    took_s: dict[Mechanism, float] = field(default_factory=dict)
    swapped_mib: int = 0
    failed: set[Mechanism] = field(default_factory=set)
    silent: bool = False
    problem: str = ""
    accepted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def target_mib(self) -> int:
        """What is aimed at."""
        return target_of(self.resources.memory_mib, self.resources.memory_min_mib, self.now)

    def note(self, step: Step, did: Did, took_s: float) -> None:
        """Takes down what a step came to."""
        self.took_s[step.mechanism] = self.took_s.get(step.mechanism, 0.0) + took_s
        if step.mechanism is Mechanism.SWAP:
            self.swapped_mib += did.moved_mib
        if abs(did.moved_mib) < BLOCK_MIB or step.mechanism is Mechanism.SWAP:
            self.failed.add(step.mechanism)
        self.silent = did.silent or (self.silent and not did.moved_mib)
        self.problem = did.problem or self.problem

    def _moved(self) -> tuple[Moved, ...]:
        """By what is there now: a mechanism may have gone on after its step was given up."""
        moved_mib = {
            Mechanism.BALLOON: self.begin.ballooned_mib - self.now.ballooned_mib,
            Mechanism.VIRTIO_MEM: self.now.plugged_mib - self.begin.plugged_mib,
            Mechanism.SWAP: self.swapped_mib,
        }
        return tuple(Moved(one, mib, self.took_s.get(one, 0.0)) for one, mib in moved_mib.items() if mib)

    def result(self, *, over: bool) -> Resized:
        """For the caller, after the deadline (`over`) or before it."""
        now, target_mib = self.now, self.target_mib
        cause = cause_of(now, target_mib, over=over, silent=self.silent)
        short_mib = abs(now.actual_mib - target_mib) if cause is not None else 0
        words = f"{short_mib} MiB are missing: {cause.value}" if cause is not None else ""
        message = "; ".join(part for part in (words, self.problem) if part)
        return Resized(now.actual_mib, short_mib, cause, self._moved(), self.vcpus, message)


class Resizing:
    """See the module."""

    def __init__(
        self, handle: Handle, control: Control, link: AgentLink, memory: GuestMemory, turnstile: Turnstile
    ) -> None:
        self._handle, self._control, self._link = handle, control, link
        self._memory, self._turnstile = memory, turnstile
        self._tasks = OwnedTasks()
        self._follower: asyncio.Task[None] | None = None
        self._vcpus: int | None = None  # online, as far as known

    async def to(self, resources: Resources, deadline_s: float) -> Resized:
        """See Engine.resize. ControlLost, AgentLost."""
        await self._stop()
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        vcpus = await self._set_vcpus(resources.vcpus)
        now = await self._memory.ready_for(resources.memory_mib)
        progress = _Progress(resources, vcpus, now, now)
        follower = self._follower = self._tasks.spawn(self._follow(progress), f"resize of pid {self._handle.pid}")
        accepted = self._tasks.spawn(progress.accepted.wait())
        await asyncio.wait({follower, accepted}, return_when=asyncio.FIRST_COMPLETED)
        accepted.cancel()
        await asyncio.wait({follower}, timeout=max(0.0, deadline_s - (loop.time() - begin_s)))
        if follower.done() and not progress.accepted.is_set():
            follower.result()  # the engine did not take it
        return progress.result(over=deadline_s > 0)

    async def _set_vcpus(self, wanted: int) -> int:
        wanted = min(wanted, self._handle.ceiling_vcpus)
        if self._vcpus is None:
            self._vcpus = (await self._link.stats()).cpus_online
        if self._vcpus != wanted:
            async with self._turnstile.through():
                self._vcpus = await set_online(self._control, self._link, wanted)
        return self._vcpus

    async def _step(self, progress: _Progress) -> bool:
        """One mechanism's move; whether there is more to do, now or later."""
        step = next_step(progress.now, progress.target_mib, progress.failed)
        if step is not None:
            begin_s = asyncio.get_running_loop().time()
            async with self._turnstile.through():
                did = await self._memory.act(step, progress.now, progress.accepted.set)
            progress.note(step, did, asyncio.get_running_loop().time() - begin_s)
            progress.now = did.now or (await self._memory.look())[1]
        if abs(progress.now.actual_mib - progress.target_mib) >= BLOCK_MIB:
            return True
        progress.accepted.set()
        return False

    async def _follow(self, progress: _Progress) -> None:
        wait_s = FIRST_RETRY_S
        try:
            while await self._step(progress):
                if next_step(progress.now, progress.target_mib, progress.failed) is None:
                    progress.accepted.set()
                    await asyncio.sleep(wait_s)  # nothing but waiting helps
                    wait_s = min(LAST_RETRY_S, 2 * wait_s)
                    progress.failed.clear()
                    progress.now = (await self._memory.look())[1]
        except AgentLost as error:
            progress.silent, progress.problem = True, str(error)
            if not progress.accepted.is_set():
                raise
        except HostdError as error:  # the engine's owner learns of it by wait_gone
            progress.problem = str(error)
            if not progress.accepted.is_set():
                raise

    async def _stop(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait({self._follower})
            self._follower = None

    async def aclose(self) -> None:
        """The follower ends. Idempotent."""
        await self._tasks.aclose()
