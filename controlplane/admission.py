"""Decisions that count against a tenant's quota, one after the other: by a lock here, by a key across replicas.

Whoever decides commits with the tenant's guard (quotas/<tenant>): it must be as the view had it when the tenant's
things were counted, and is written. Of two that counted the same state one gets Conflict, and counts again. A tenant
without a bound has no guard, and its creates are independent of each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from controlplane import keys
from controlplane.quotas import UNBOUNDED, Quota
from controlplane.store.contract import Expect, Put, Write
from controlplane.view import View

VIEW_LAG_S = 5.0


@dataclass(frozen=True)
class Guard:
    """What a commit that was decided on a tenant's quota takes along; nothing for a tenant without one."""

    writes: tuple[Write, ...] = ()
    expect: tuple[Expect, ...] = ()


class Admission:
    """See the module."""

    def __init__(self, view: View, quota_of: Callable[[str], Quota]) -> None:
        self._view, self._quota_of = view, quota_of
        self._locks: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def deciding(self, tenant: str) -> AsyncIterator[Guard]:
        """Count, decide and commit in the block, and call `settled` with the revision before it ends."""
        if self._quota_of(tenant) == UNBOUNDED:
            yield Guard()
            return
        async with self._locks.setdefault(tenant, asyncio.Lock()):
            key = keys.quota_guard(tenant)
            yield Guard((Put(key, b""),), (Expect(key, self._view.guards.get(tenant, 0)),))

    async def settled(self, guard: Guard, revision: int) -> None:
        """Waits until the view counts what was committed, so that the next decision does."""
        if guard.expect:
            async with asyncio.timeout(VIEW_LAG_S):
                await self._view.reached(revision)
