"""Decisions that count against a tenant's quota: one after the other, by a lock here and by a key across replicas.

Whoever decides commits with the tenant's guard (quotas/<tenant>): it must be as the view had it when the tenant's
things were counted, and is written. Of two that counted the same state one gets Conflict, and counts again. A tenant
without a bound has no guard, and its creates are independent of each other.

Creates of one tenant that wait for each other are decided together (`together`): each counts what the view has and
those decided before it, and all are recorded by one commit, which is all or nothing. So many cost one round trip to
the store, and a quota is exceeded by no number of them. When one spoils the commit (a name that was taken) all of them
get Conflict; whoever comes again has read the store, so that it is told itself and spoils none any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from controlplane import keys
from controlplane.errors import Conflict, ControlPlaneError, StoreError
from controlplane.model import Sandbox
from controlplane.quotas import UNBOUNDED, Quota
from controlplane.store.contract import MOST_EXPECTATIONS, Expect, Put, Store, Write
from controlplane.view import View

log = logging.getLogger("sandloom.controlplane.admission")

VIEW_LAG_S = 5.0
MOST_TOGETHER = 64


@dataclass(frozen=True)
class Guard:
    """What a commit that was decided on a tenant's quota takes along; nothing for a tenant without one."""

    writes: tuple[Write, ...] = ()
    expect: tuple[Expect, ...] = ()


@dataclass(frozen=True)
class Decided:
    """A sandbox that is to be recorded, as it is and encoded, and the commit that does so."""

    sandbox: Sandbox
    record: bytes
    writes: tuple[Write, ...]
    expect: tuple[Expect, ...]


Decide = Callable[[Sequence[Sandbox]], Decided]
"""Decides on the present view and on sandboxes that go before it; raises what refuses it. Waits for nothing."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    decide: Decide
    done: asyncio.Future[tuple[Sandbox, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def refuse(self, error: Exception) -> None:
        """Tells the one that waits, if it still does."""
        if not self.done.done():
            self.done.set_exception(error)


class Admission:
    """See the module. Commits that run when nobody waits for them any more end by the store's own deadline."""

    def __init__(self, view: View, quota_of: Callable[[str], Quota]) -> None:
        self._view, self._quota_of = view, quota_of
        self._locks: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    def is_bounded(self, tenant: str) -> bool:
        """Whether the tenant's decisions have to be counted."""
        return self._quota_of(tenant) != UNBOUNDED

    @asynccontextmanager
    async def deciding(self, tenant: str) -> AsyncIterator[Guard]:
        """Count, decide and commit in the block, and call `settled` with the revision before it ends."""
        if not self.is_bounded(tenant):
            yield Guard()
            return
        async with self._locks.setdefault(tenant, asyncio.Lock()):
            yield self._guard(tenant)

    def _guard(self, tenant: str) -> Guard:
        key = keys.quota_guard(tenant)
        return Guard((Put(key, b""),), (Expect(key, self._view.guards.get(tenant, 0)),))

    async def settled(self, guard: Guard, revision: int) -> None:
        """Waits until the view counts what was committed, so that the next decision does."""
        if guard.expect:
            async with asyncio.timeout(VIEW_LAG_S):
                await self._view.reached(revision)

    # Many at once.

    async def together(self, store: Store, tenant: str, decide: Decide) -> tuple[Sandbox, int]:
        """Decides and commits with whoever else waits; the sandbox, and the revision. What is placed is assumed in the
        view; the caller releases it when this fails. Raises what `decide` does, Conflict when the commit was refused
        (decide again), and StoreError when its outcome is not known."""
        mine = _Waiting(decide)
        self._waiting.setdefault(tenant, deque()).append(mine)
        if tenant not in self._running:
            self._running[tenant] = asyncio.create_task(self._work(store, tenant), name=f"admission of {tenant}")
        return await mine.done

    async def _work(self, store: Store, tenant: str) -> None:
        """One commit after the other while somebody waits. It is a task of its own: a caller that gives up must not
        take the others along."""
        waiting = self._waiting[tenant]
        try:
            while waiting:
                async with self.deciding(tenant) as guard:
                    await self._commit(store, waiting, guard)
        finally:
            del self._running[tenant], self._waiting[tenant]
            for left in waiting:  # only when it was cancelled
                left.refuse(_stopping())

    async def _commit(self, store: Store, waiting: deque[_Waiting], guard: Guard) -> None:
        """Commits those that fit into one commit, and tells each of them."""
        batch = _Batch(guard)
        while waiting and len(batch.taken) < MOST_TOGETHER:
            one = waiting.popleft()
            if not one.done.done() and not self._take(one, batch):
                waiting.appendleft(one)
                break
        if not batch.taken:
            return
        try:
            revision = await store.commit(list(batch.writes.values()), list(batch.expect.values()))
        except BaseException as error:
            for one, _ in batch.taken:
                one.refuse(error if isinstance(error, Exception) else _stopping())
            if not isinstance(error, Exception):
                raise
            return
        for one, decided in batch.taken:
            if not one.done.done():
                one.done.set_result((decided.sandbox, revision))
        try:
            await self.settled(guard, revision)
        except (ControlPlaneError, TimeoutError) as error:  # what is decided next expects an old guard: Conflict
            log.warning("the view is late with a tenant's sandboxes: %s", error)

    def _take(self, one: _Waiting, batch: _Batch) -> bool:
        """Decides it and adds it, or refuses it; whether it is done with. If not, it has to wait for the next batch."""
        try:
            decided = one.decide([before.sandbox for _, before in batch.taken])
        except Exception as error:
            one.refuse(error)
            return True
        if not batch.agrees_with(decided):
            one.refuse(Conflict("Changed", "another one of the same moment has this name: decide again"))
            return True
        if batch.taken and not batch.has_room_for(decided):
            return False
        batch.add(one, decided)
        if decided.sandbox.host:
            self._view.assume(decided.sandbox, decided.record)
        return True


class _Batch:
    """What goes into one commit."""

    def __init__(self, guard: Guard) -> None:
        self.taken: list[tuple[_Waiting, Decided]] = []
        self.writes = {write.key: write for write in guard.writes}
        self.expect = {one.key: one for one in guard.expect}

    def agrees_with(self, decided: Decided) -> bool:
        """Whether no key would be written twice, or be expected to be two things."""
        twice = any(write.key in self.writes for write in decided.writes)
        return not twice and all(self.expect.get(one.key, one) == one for one in decided.expect)

    def has_room_for(self, decided: Decided) -> bool:
        """Whether a store takes so many expectations."""
        return len(self.expect.keys() | {one.key for one in decided.expect}) <= MOST_EXPECTATIONS

    def add(self, one: _Waiting, decided: Decided) -> None:
        """One more."""
        self.taken.append((one, decided))
        self.writes |= {write.key: write for write in decided.writes}
        self.expect |= {mine.key: mine for mine in decided.expect}


def _stopping() -> StoreError:
    return StoreError("StoreClosed", "the control plane is stopping")
