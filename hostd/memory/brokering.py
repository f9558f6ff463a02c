"""The broker's hands: looks at the host and its sandboxes, has broker.py decide, and does it.

    engine.memory(), events, cgroup, /proc ──sense──► broker.decide ──► allot() / park() / evict(), each with its why

A round each `sense_s`, and at once when a guest tells of pressure or somebody asks. Owns no memory: a sandbox's
allocation is its own (hostd/sandbox.py), which also journals it; a restarted hostd takes it from what the engine has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hostd.drivers.contract import Engine
from hostd.errors import HostdError
from hostd.memory import broker
from hostd.memory.broker import Decision, Rules, SandboxMemory
from hostd.memory.pressure import HostMemory
from hostd.memory.values import MemoryEvent, MemoryEventKind, MemoryNow
from hostd.resize import Cause, Grant
from hostd.spec import SandboxSpec
from hostd.tasks import OwnedTasks
from sharedcache.errors import CacheError

log = logging.getLogger("sandloom.hostd.memory")

ANSWER_S, PATIENCE_S = 2.0, 0.25
"""How long a guest may take to say what it has, and how long a round waits for it: what it said last counts meanwhile,
and nobody is held up by a guest that is silent."""

WANTS_KEPT_S = 2.0
PARK_AGAIN_S = 60.0
"""How long a sandbox whose parking failed is passed over: others go then, or the lowest is evicted."""


class Governed(Protocol):
    """What the broker needs of a running sandbox; hostd/sandbox.py is it."""

    grant: Grant

    @property
    def cooperative(self) -> bool: ...
    @property
    def desired_mib(self) -> int: ...
    @property
    def spec(self) -> SandboxSpec: ...
    @property
    def engine(self) -> Engine | None: ...
    def allot(self, grant: Grant) -> None: ...
    def judge_guest(self, cooperative: bool, why: str) -> None: ...
    def tell(self, reason: str, message: str) -> None: ...
    def unparkable(self) -> str: ...
    async def park(self, why: str) -> None: ...
    def evict(self, why: str) -> None: ...


class BrokerHost(Protocol):
    """What the broker needs of its host; hostd/sandboxes.py is it."""

    def governed(self) -> Sequence[Governed]: ...
    def promised_elsewhere_mib(self) -> int: ...
    def arriving_mib(self) -> int: ...
    def resident_mib(self, uid: str) -> int: ...
    def host_event(self, reason: str, message: str) -> None: ...


@dataclass
class _Seen:
    """What is known of one sandbox between two looks. Seconds are the loop's."""

    now: MemoryNow | None = None
    at_s: float = 0.0
    stalled_percent: float = 0.0
    refaults_per_s: float = 0.0
    wants_mib: int = 0
    wanted_at_s: float = 0.0
    idle_since_s: float | None = None
    asked_back_s: float | None = None
    look: asyncio.Task[None] | None = None
    unparkable: str = ""
    unparkable_until_s: float = 0.0

    def take(self, now: MemoryNow, at_s: float) -> None:
        """The newest answer of its engine."""
        if self.now is not None and at_s > self.at_s:
            span_s, before, after = at_s - self.at_s, self.now.signals, now.signals
            self.stalled_percent = max(0, after.psi_some_us - before.psi_some_us) / (span_s * 10_000)
            self.refaults_per_s = max(0, after.refaults - before.refaults) / span_s
        self.now, self.at_s = now, at_s


class Broker:
    """See the module. run() is its owner; hear(), regrant() and poke() may be called at any time."""

    def __init__(
        self, host: BrokerHost, rules: Rules, sense: Callable[[], HostMemory], *, sense_s: float, active: bool = True
    ) -> None:
        self._host, self.rules, self.sense, self._sense_s, self.active = host, rules, sense, sense_s, active
        self._seen: dict[str, _Seen] = {}
        self._memory = HostMemory(0, 0)
        self._poked = asyncio.Event()
        self._tasks = OwnedTasks()
        self._resort: asyncio.Task[None] | None = None
        self._short_since_s: float | None = None
        self.closed, self._failure = "", ""

    # What comes from outside.

    def poke(self) -> None:
        """Looks at everything now."""
        self._poked.set()

    def hear(self, sandbox: Governed, event: MemoryEvent) -> None:
        """A guest tells something of its memory."""
        if event.kind is MemoryEventKind.OOM_KILL:
            sandbox.tell(
                "GuestOom",
                f"its kernel killed a process for want of memory: {event.available_mib} of {event.total_mib} MiB were"
                f" available, {event.oom_kills} such kills so far, {event.stalled_us / 1e6:.1f} s stood still",
            )
        seen = self._seen.setdefault(sandbox.spec.uid, _Seen())
        seen.wants_mib, seen.wanted_at_s = max(event.wants_mib, 1), self._clock()
        self.poke()

    def host_memory(self) -> HostMemory:
        """The host now. Blocks for microseconds."""
        self._memory = self.sense()
        return self._memory

    def most_mib(self) -> int:
        """What one sandbox can have here at most, were it alone."""
        total_mib = self._memory.total_mib or self.host_memory().total_mib
        return total_mib - self.rules.reserve_mib - self.rules.overhead_mib

    def regrant(self, sandbox: Governed) -> Grant:
        """What the sandbox, whose desired size has changed, is let have now."""
        desired_mib, had = sandbox.spec.resources.memory_mib, sandbox.grant
        if not self.active or sandbox.engine is None:
            return Grant(desired_mib)
        boxes = self._boxes()
        if all(one.uid != sandbox.spec.uid for one in boxes):  # not looked at yet: the next round gives it more
            self.host_memory()
            self.poke()
            if had.memory_mib >= desired_mib:
                return Grant(desired_mib)
            return Grant(had.memory_mib, Cause.HOST_ROOM, self._short_text(desired_mib - had.memory_mib))
        move = broker.grant_for(self.host_memory(), boxes, self.rules, sandbox.spec.uid, held_mib=self._held_mib())
        self.poke()
        if move is not None:
            return Grant(move.memory_mib, move.cause, move.why)
        if had.memory_mib >= desired_mib:
            return Grant(had.memory_mib)
        return Grant(had.memory_mib, Cause.HOST_ROOM, self._short_text(desired_mib - had.memory_mib))

    def first_grant(self, spec: SandboxSpec) -> Grant:
        """What a sandbox that starts gets: its guarantee, and what it desires beyond that if it is free."""
        low, wanted = spec.resources.memory_min_mib, spec.resources.memory_mib
        if not self.active or wanted == low:
            return Grant(wanted)
        room = broker.room_mib(self.host_memory(), self._boxes(), self.rules, self._held_mib())  # its guarantee is held
        most_mib = low + max(0, min(room, self._memory.available_mib - self.rules.reserve_mib // 2))
        if most_mib >= wanted:
            return Grant(wanted)
        return Grant(max(low, most_mib), Cause.HOST_ROOM, self._short_text(wanted - max(low, most_mib)))

    def _short_text(self, missing_mib: int) -> str:
        now = self._memory
        return (
            f"{missing_mib} MiB more are not free now ({now.available_mib} of {now.total_mib} MiB available, reserve"
            f" {self.rules.reserve_mib}): given as soon as they are"
        )

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()

    # The loop.

    async def run(self) -> None:
        """Rounds until cancelled."""
        async with self._tasks:
            while True:
                self._poked.clear()
                if self.active:
                    await self._tried()
                try:
                    async with asyncio.timeout(self._sense_s):
                        await self._poked.wait()
                except TimeoutError:
                    pass

    async def _tried(self) -> None:
        try:
            await self.round()
        except (HostdError, OSError) as error:
            self._failed(str(error))
        except Exception as error:  # a bug must not leave the host's memory with nobody in charge, nor end hostd
            log.exception("a round failed")
            self._failed(f"{type(error).__name__}: {error}")
        else:
            self._failure = ""

    def _failed(self, text: str) -> None:
        log.warning("a round failed: %s", text)
        if text != self._failure:
            self._failure = text
            self._host.host_event(
                "BrokerFailed", f"memory stays as it is; tried again each {self._sense_s:g} s: {text}"
            )

    async def round(self) -> Decision:
        """Looks, decides and acts once."""
        await self._look_at_all()
        memory, now_s = self.host_memory(), self._clock()
        if not broker.is_short(memory, self.rules):
            self._short_since_s = None
        elif self._short_since_s is None:
            self._short_since_s = now_s
        short_s = now_s - self._short_since_s if self._short_since_s is not None else 0.0
        governed = {sandbox.spec.uid: sandbox for sandbox in self._host.governed()}
        for uid in set(self._seen) - set(governed):
            del self._seen[uid]
        held_mib, arriving_mib = self._held_mib(), self._host.arriving_mib()
        decision = broker.decide(
            memory, self._boxes(), self.rules, held_mib=held_mib, arriving_mib=arriving_mib, short_s=short_s
        )
        for move in decision.moves:
            self._move(governed[move.uid], move)
        self._admission(decision.closed)
        self._last_resort(decision, governed)
        for sandbox in governed.values():
            self._judge(sandbox, now_s)
        return decision

    async def _look_at_all(self) -> None:
        looks: list[asyncio.Task[None]] = []
        for sandbox in self._host.governed():
            seen = self._seen.setdefault(sandbox.spec.uid, _Seen())
            if seen.look is None or seen.look.done():
                seen.look = self._tasks.spawn(self._look(sandbox), f"look at {sandbox.spec.name}")
            looks.append(seen.look)
        if looks:
            await asyncio.wait(looks, timeout=PATIENCE_S)

    async def _look(self, sandbox: Governed) -> None:
        engine = sandbox.engine
        if engine is None:
            return
        seen = self._seen.setdefault(sandbox.spec.uid, _Seen())
        try:
            async with asyncio.timeout(ANSWER_S):
                seen.take(await engine.memory(), self._clock())
        except (HostdError, TimeoutError):
            return  # busy, or ending: its owner sees to the latter
        one = self._box(sandbox, seen)
        if one.allocated_mib - max(broker.need_mib(one, self.rules), one.desired_mib) < broker.headroom_mib(
            one, self.rules
        ):
            seen.idle_since_s = None
        elif seen.idle_since_s is None:
            seen.idle_since_s = self._clock()

    def _boxes(self) -> list[SandboxMemory]:
        known = ((sandbox, self._seen.get(sandbox.spec.uid)) for sandbox in self._host.governed())
        return [self._box(sandbox, seen) for sandbox, seen in known if seen is not None and seen.now is not None]

    def _held_mib(self) -> int:
        """What is promised beside the boxes: also to those that have not said yet what they use."""
        unseen = [one for one in self._host.governed() if (self._seen.get(one.spec.uid) or _Seen()).now is None]
        guaranteed = sum(one.spec.resources.memory_min_mib + self.rules.overhead_mib for one in unseen)
        return self._host.promised_elsewhere_mib() + guaranteed

    def _box(self, sandbox: Governed, seen: _Seen) -> SandboxMemory:
        assert seen.now is not None
        spec, now, now_s = sandbox.spec, seen.now, self._clock()
        sizes, used_mib = spec.resources, max(0, now.actual_mib - now.available_mib)
        resident_mib = self._host.resident_mib(spec.uid)
        return SandboxMemory(
            uid=spec.uid,
            name=spec.name,
            min_mib=sizes.memory_min_mib,
            max_mib=sizes.memory_max_mib,
            desired_mib=sandbox.desired_mib,
            allocated_mib=sandbox.grant.memory_mib,
            actual_mib=now.actual_mib,
            used_mib=used_mib,
            resident_mib=resident_mib or used_mib,
            priority=spec.priority,
            weight=spec.weight,
            stalled_percent=seen.stalled_percent,
            refaults_per_s=seen.refaults_per_s,
            wants_mib=seen.wants_mib if now_s - seen.wanted_at_s < WANTS_KEPT_S else 0,
            idle_s=now_s - seen.idle_since_s if seen.idle_since_s is not None else 0.0,
            cooperative=sandbox.cooperative,
            unparkable=sandbox.unparkable() or (seen.unparkable if now_s < seen.unparkable_until_s else ""),
        )

    # Acting.

    def _move(self, sandbox: Governed, move: broker.Move) -> None:
        before_mib = sandbox.grant.memory_mib
        seen = self._seen[move.uid]
        if move.memory_mib < before_mib:
            seen.idle_since_s = None
            seen.asked_back_s = seen.asked_back_s or self._clock()
        else:
            seen.wants_mib = 0
        sandbox.allot(Grant(move.memory_mib, move.cause, move.why))
        sandbox.tell(move.reason, move.why)

    def _admission(self, closed: str) -> None:
        if bool(closed) != bool(self.closed):
            self._host.host_event(
                "AdmissionClosed" if closed else "AdmissionOpen",
                closed or "memory is free again: sandboxes are admitted",
            )
        self.closed = closed

    def _last_resort(self, decision: Decision, governed: dict[str, Governed]) -> None:
        """One at a time, and then the host is watched anew for as long as the rules say."""
        if self._resort is not None and not self._resort.done():
            return
        if decision.park is not None:
            self._short_since_s = self._clock()
            self._resort = self._tasks.spawn(self._park(governed[decision.park.uid], decision.park.why), "park")
        elif decision.evict is not None:
            self._short_since_s = self._clock()
            governed[decision.evict.uid].evict(decision.evict.why)

    async def _park(self, sandbox: Governed, why: str) -> None:
        try:
            await sandbox.park(why)
        except (HostdError, CacheError, OSError) as error:
            seen = self._seen.setdefault(sandbox.spec.uid, _Seen())
            seen.unparkable, seen.unparkable_until_s = f"parking it failed: {error}", self._clock() + PARK_AGAIN_S
            sandbox.tell("ParkFailed", f"not tried again for {PARK_AGAIN_S:.0f} s: {error}")

    def _judge(self, sandbox: Governed, now_s: float) -> None:
        """Marks a guest that does not give back what it says is idle, until it does."""
        seen = self._seen.get(sandbox.spec.uid)
        if seen is None or seen.now is None:
            return
        one = self._box(sandbox, seen)
        surplus_mib = one.actual_mib - max(one.allocated_mib, one.used_mib + broker.headroom_mib(one, self.rules))
        if surplus_mib < broker.headroom_mib(one, self.rules):
            seen.asked_back_s = None
            if not sandbox.cooperative:
                sandbox.judge_guest(True, f"it has given back what it was asked for: {one.actual_mib} MiB left")
        elif seen.asked_back_s is None:
            seen.asked_back_s = now_s
        elif sandbox.cooperative and now_s - seen.asked_back_s >= self.rules.follow_s:
            why = (
                f"for {now_s - seen.asked_back_s:.0f} s it has kept {one.actual_mib} MiB of which it calls"
                f" {one.actual_mib - one.used_mib} free, and was asked to go down to {one.allocated_mib}: it counts"
                f" with its maximum of {one.max_mib} MiB"
            )
            sandbox.judge_guest(False, why)
