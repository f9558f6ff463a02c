"""The warm pools of this host: owns their members from the making until a sandbox claims one or it is ended.

    control plane's list ──assign()──► Pools ──take()──► a starting sandbox, which owns the guest from then on

Nothing of it is journaled: members are as good as what can be made again in a moment, so they end with hostd, and what
a hostd that was killed left is ended by the next one (it finds directories that belong to no record). A claimed member
is in its sandbox's record. One task a member; the owner looks at everything again whenever something has changed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hostd.admission import HostNow, reserved_mib
from hostd.drivers.contract import Driver, LayerFile, StartPlan, WarmGuest
from hostd.errors import HostdError, InvalidSpec
from hostd.refill import PoolNow, RoomNow, decide
from hostd.spec import Resources, SandboxSpec
from hostd.tasks import OwnedTasks, to_its_end
from hostd.warmpool import MEMBER_PREFIX, MemberState, PoolSpec, fits, move

log = logging.getLogger("sandloom.hostd.pools")

END_TRIES, END_RETRY_S = 10, 1.0
PRESSED_MIB = 64
"""Available memory above the reserve below which members are given back."""


class Image(Protocol):
    """What a member needs of its image."""

    @property
    def layers(self) -> tuple[LayerFile, ...]: ...


class PoolHost(Protocol):
    """What pools need of their host; hostd/sandboxes.py is it."""

    driver: Driver
    run_dir: Path

    async def take_image(self, spec: SandboxSpec) -> Image: ...
    async def release_image(self, uid: str) -> None: ...
    def claim_vm_uid(self) -> int: ...
    def release_vm_uid(self, vm_uid: int) -> None: ...
    def host_now(self) -> HostNow: ...
    def held_resources(self, *, but: str = "") -> list[Resources]: ...
    def starting(self) -> int: ...
    def pool_event(self, name: str, reason: str, message: str) -> None: ...


@dataclass(eq=False)
class Member:
    """One guest of a pool. `guest` is there once it is READY."""

    uid: str
    pool: PoolSpec
    vm_uid: int
    state: MemberState = MemberState.MAKING
    guest: WarmGuest | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)  # it is no pool's any more, or not wanted

    def move(self, to: MemberState) -> None:
        """Takes the step, if the table has it."""
        self.state = move(self.state, to)


@dataclass(frozen=True)
class Taken:
    """A member that was taken for a sandbox. Who took it has Warming.claim use it up, or gives it to Pools.end."""

    member: Member
    guest: WarmGuest

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self.member.pool.name

    @property
    def vm_uid(self) -> int:
        """The uid that its VMM runs as."""
        return self.member.vm_uid


@dataclass(frozen=True)
class PoolStatus:
    """A pool on this host, as it is reported. `message` says why members are missing; "" while they are just made."""

    spec: PoolSpec
    ready: int
    making: int
    message: str


@dataclass
class _Pool:
    spec: PoolSpec
    failures: int = 0
    failed_at_s: float = 0.0
    why: str = ""
    short: str = ""
    told: str = ""
    unrehearsed: str = ""  # as it was told


class Pools:
    """See the module. run() is the owner of every member; everything else may be called at any time."""

    def __init__(self, host: PoolHost) -> None:
        self._host = host
        self._pools: dict[str, _Pool] = {}
        self._members: set[Member] = set()
        self._tasks = OwnedTasks()
        self._wake = asyncio.Event()
        self._reported: list[PoolStatus] = []
        self.on_change: Callable[[], None] = lambda: None

    # What comes from outside.

    def assign(self, specs: Iterable[PoolSpec]) -> None:
        """All pools of this host, as they are wanted now. What is not among them ends."""
        wanted = {spec.uid: spec for spec in specs}
        for member in list(self._members):
            spec = wanted.get(member.pool.uid)
            if spec is None or not spec.same_members(member.pool):
                self._dismiss(member)
        pools = {uid: self._pools.get(uid, _Pool(spec)) for uid, spec in wanted.items()}
        for uid, pool in pools.items():
            if not pool.spec.same_members(wanted[uid]):
                pools[uid] = _Pool(wanted[uid])
            pool.spec = wanted[uid]
        self._pools = pools
        self.poke()

    def poke(self) -> None:
        """Something that matters to pools has changed: they are looked at again."""
        self._wake.set()

    def take(self, spec: SandboxSpec) -> Taken | None:
        """A ready member that can become the sandbox, which is the caller's from now on; None when there is none."""
        for member in sorted(self._members, key=lambda member: member.uid):
            guest = member.guest
            if member.state is not MemberState.READY or guest is None or not fits(member.pool, spec):
                continue
            if member.left.is_set() or spec.resources.memory_min_mib < guest.handle.base_mib:
                continue
            member.move(MemberState.CLAIMED)
            member.left.set()
            self.poke()
            return Taken(member, guest)
        return None

    async def end(self, taken: Taken) -> None:
        """Ends a member that was taken and not claimed after all."""
        await self._destroy(taken.member, taken.guest)
        self._host.release_vm_uid(taken.vm_uid)

    # What is asked about them.

    def held(self) -> list[Resources]:
        """What members are guaranteed: those that are made count already, claimed ones are their sandbox's."""
        return [m.pool.resources for m in self._members if m.state is not MemberState.CLAIMED]

    def status(self) -> list[PoolStatus]:
        """Every pool, by name."""
        pools = sorted(self._pools.values(), key=lambda pool: (pool.spec.name, pool.spec.uid))
        return [
            PoolStatus(
                pool.spec,
                self._count(pool.spec.uid, MemberState.READY),
                self._count(pool.spec.uid, MemberState.MAKING),
                pool.short,
            )
            for pool in pools
        ]

    def ready(self) -> list[tuple[Member, WarmGuest]]:
        """Every member that stands ready."""
        return [(m, m.guest) for m in self._members if m.state is MemberState.READY and m.guest is not None]

    def _count(self, uid: str, state: MemberState) -> int:
        return sum(1 for m in self._members if m.pool.uid == uid and m.state is state and not m.left.is_set())

    # Looking.

    async def run(self) -> None:
        """Keeps every pool as it is wanted until cancelled; then all members end."""
        try:
            while True:
                self._wake.clear()
                pause_s = self._look()
                try:
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            await to_its_end(self._tasks.aclose())

    def _look(self) -> float:
        for member, guest in self.ready():
            if not guest.current():
                self._dismiss(member)
        now_s = asyncio.get_running_loop().time()
        decision = decide([self._now(pool) for pool in self._pools.values()], self._room(), now_s)
        for uid, count in decision.ends.items():
            self._dismiss_some(uid, count)
        for uid in decision.starts:
            self._start(self._pools[uid].spec)
        for uid, pool in self._pools.items():
            pool.short = decision.short.get(uid, "")
            self._tell(pool)
        status = self.status()
        if status != self._reported:
            self._reported = status
            self.on_change()
        return decision.look_again_s

    def _now(self, pool: _Pool) -> PoolNow:
        uid = pool.spec.uid
        ready, making = self._count(uid, MemberState.READY), self._count(uid, MemberState.MAKING)
        spec = pool.spec
        return PoolNow(
            uid, spec.wanted, ready, making, spec.need_mib, pool.failures, pool.failed_at_s, pool.why,
        )  # fmt: skip

    def _room(self) -> RoomNow:
        host = self._host.host_now()
        unpromised_mib = host.memory_total_mib - host.memory_reserve_mib - reserved_mib(self._host.held_resources())
        usable_mib = host.memory_available_mib - host.memory_reserve_mib
        short = ""
        if self._host.driver.warming is None:
            short = "this host's driver keeps no guests warm"
        elif host.disk_free_mib < host.disk_reserve_mib:
            short = f"{host.disk_free_mib} MiB of disk free, {host.disk_reserve_mib} MiB are kept in reserve"
        room_mib = min(unpromised_mib, usable_mib)
        return RoomNow(room_mib, self._host.starting(), os.cpu_count() or 1, short, usable_mib < PRESSED_MIB)

    def _tell(self, pool: _Pool) -> None:
        """An event when a pool gets whole, or begins to lack members for another reason than that they are made."""
        spec, ready = pool.spec, self._count(pool.spec.uid, MemberState.READY)
        now = "ready" if ready >= spec.wanted else "short" if pool.short else pool.told
        if now == pool.told or spec.wanted == 0:
            return
        pool.told = now
        if now == "ready":
            self._host.pool_event(spec.name, "PoolReady", f"{ready} of {spec.wanted} members are ready")
        else:
            self._host.pool_event(spec.name, "PoolShort", f"{ready} of {spec.wanted} members are ready: {pool.short}")

    # Members.

    def _start(self, spec: PoolSpec) -> None:
        taken = {member.uid for member in self._members}
        while (uid := f"{MEMBER_PREFIX}{spec.uid}-{secrets.token_hex(2)}") in taken:
            continue
        try:
            member = Member(uid, spec, self._host.claim_vm_uid())
        except HostdError as error:
            self._failed(spec, str(error))
            return
        self._members.add(member)
        self._tasks.spawn(self._live(member), name=uid)

    def _dismiss(self, member: Member) -> None:
        """It is not wanted any more: its task ends it."""
        member.left.set()

    def _dismiss_some(self, uid: str, count: int) -> None:
        mine = [m for m in self._members if m.pool.uid == uid and not m.left.is_set()]
        for member in sorted(mine, key=lambda m: (m.state is MemberState.READY, m.uid))[:count]:
            self._dismiss(member)

    async def _live(self, member: Member) -> None:
        """A member's whole life in its pool."""
        try:
            async with OwnedTasks() as tasks:
                making = tasks.spawn(self._make(member), f"make {member.uid}")
                left = tasks.spawn(member.left.wait())
                await asyncio.wait({making, left}, return_when=asyncio.FIRST_COMPLETED)
                if not making.done():
                    return
                member.guest = making.result()
                member.move(MemberState.READY)
                self._succeeded(member.pool)
                gone = tasks.spawn(member.guest.wait_gone())
                await asyncio.wait({gone, left}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done() and not member.left.is_set():
                    self._failed(member.pool, f"a ready member was lost: {gone.result().message}")
        except HostdError as error:
            self._failed(member.pool, str(error))
        except Exception as error:  # a defect must neither end the other members nor make a busy loop
            log.exception("member %s", member.uid)
            self._failed(member.pool, f"{type(error).__name__}: {error}")
        finally:
            await to_its_end(self._leave(member))

    async def _make(self, member: Member) -> WarmGuest:
        warming = self._host.driver.warming
        if warming is None:
            raise InvalidSpec("this host's driver keeps no guests warm")
        spec = member.pool.member_spec(member.uid)
        image = await self._host.take_image(spec)
        plan = StartPlan(spec, image.layers, member.vm_uid, self._host.run_dir / member.uid)
        guest = await warming.prewarm(plan, lambda handle: None)
        pool = self._pools.get(member.pool.uid)
        if pool is not None and guest.unrehearsed not in ("", pool.unrehearsed):
            pool.unrehearsed = guest.unrehearsed
            self._host.pool_event(spec.name, "NotRehearsed", f"claims will be slower: {guest.unrehearsed}")
        return guest

    async def _leave(self, member: Member) -> None:
        """Ends what is the pool's; a claimed member's guest is its sandbox's."""
        if member.state is not MemberState.CLAIMED:
            member.move(MemberState.ENDING)
            if member.guest is not None:
                await self._destroy(member, member.guest)
            self._host.release_vm_uid(member.vm_uid)
        await self._host.release_image(member.uid)
        self._members.discard(member)
        self.poke()

    async def _destroy(self, member: Member, guest: WarmGuest) -> None:
        await guest.detach()
        for attempt in range(END_TRIES):
            try:
                await self._host.driver.destroy(member.uid, self._host.run_dir / member.uid, guest.handle)
                return
            except (HostdError, OSError) as error:
                if attempt == 0:
                    self._host.pool_event(member.pool.name, "CleanUpStuck", f"member {member.uid}: {error}")
                await asyncio.sleep(END_RETRY_S)
        log.error("member %s of pool %s stays; the next hostd ends it", member.uid, member.pool.name)

    def _succeeded(self, spec: PoolSpec) -> None:
        pool = self._pools.get(spec.uid)
        if pool is not None:
            pool.failures = 0
        self.poke()

    def _failed(self, spec: PoolSpec, why: str) -> None:
        log.warning("pool %s: %s", spec.name, why)
        pool = self._pools.get(spec.uid)
        if pool is not None:
            pool.failures, pool.failed_at_s, pool.why = pool.failures + 1, asyncio.get_running_loop().time(), why
        self.poke()
