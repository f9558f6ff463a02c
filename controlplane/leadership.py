"""Who does the work that only one control plane may do: placing, recovery, housekeeping. Election and fencing.

With SQLite there is one process, held by the store's lock: it leads as long as it runs. With etcd there may be
several replicas, and the one that leads holds the key `leader` under a lease of TTL_S. Its revision is the term: every
commit that the leader makes as such expects the key to be still of that revision, in the same transaction, so that
whatever a leader still says after it was replaced is refused by the store itself, however late it wakes up. Clocks and
leases only decide when somebody else takes over; they are never what keeps two leaders apart.

A new leader sees all that the old one did: it begins when its view has reached its own term, and each commit of an
older term has an earlier revision. A leader that cannot keep its lease stops its work, and begins with nothing
remembered when it is elected again. So a store that stalls, and loses the leases of hosts, loses the leader's first (it
is the shortest), and hosts get their whole grace again from the moment the store is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol

from controlplane import keys
from controlplane.errors import Conflict, ControlPlaneError, NotFound, StoreError
from controlplane.store.contract import PROGRESS_S, Batch, Expect, Page, Put, Record, Store, Write

log = logging.getLogger("sandloom.controlplane.leadership")

TTL_S = 2
"""etcd's shortest lease: with the time to notice and to take over, a dead leader is replaced within three seconds."""
KEEP_S = 0.5
RETRY_S = 0.5
LOOK_S = 5.0
RESIGN_S = 1.0


class Leadership(Protocol):
    """Runs work only while this control plane leads."""

    @property
    def leads(self) -> bool:
        """Whether this control plane leads, as far as it knows; the store knows better (fence)."""
        ...

    def fence(self) -> tuple[Expect, ...]:
        """What every commit made as the leader has to expect. Conflict (NotLeading) when this one does not lead."""
        ...

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` whenever leadership is won, cancels it when that is lost. Until cancelled."""
        ...


class OnlyOne:
    """Leads for as long as it runs."""

    leads = True

    def fence(self) -> tuple[Expect, ...]:
        """Nothing: there is no other."""
        return ()

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` at once."""
        await work()


class Elected:
    """One of several replicas: see the module. `caught_up` returns when decisions may be made on all up to a revision;
    `name` is for people, to see who leads."""

    def __init__(self, store: Store, name: str, caught_up: Callable[[int], Awaitable[None]]) -> None:
        self._store, self._name, self._caught_up = store, name, caught_up
        self._term = 0
        self._leads = False

    @property
    def leads(self) -> bool:
        """See Leadership."""
        return self._leads

    def fence(self) -> tuple[Expect, ...]:
        """See Leadership."""
        if not self._leads:
            raise Conflict("NotLeading", f"replica {self._name} does not lead now")
        return (Expect(keys.LEADER, self._term),)

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """See Leadership."""
        while True:
            try:
                lease = await self._campaign()
                await self._reign(lease, work)
            except (ControlPlaneError, TimeoutError) as error:
                log.warning("replica %s: %s", self._name, error)
                await asyncio.sleep(RETRY_S)
            except Exception:  # a bug; a fabric without a leader would be worse than one that tries again
                log.exception("replica %s: the leader's work failed", self._name)
                await asyncio.sleep(RETRY_S)

    async def _campaign(self) -> int:
        """Waits until nobody leads and wins; the lease that the leadership is held by."""
        while True:
            page = await self._store.page(keys.LEADER)
            if page.records:
                await self._until_gone(page.revision)
                continue
            lease = await self._store.grant_lease(TTL_S)
            try:
                put = Put(keys.LEADER, self._name.encode(), lease)
                self._term = await self._store.commit([put], [Expect(keys.LEADER, 0)])
            except Conflict:
                await self._store.revoke_lease(lease)
                continue
            return lease

    async def _until_gone(self, revision: int) -> None:
        """Returns when the leader's key was deleted, and now and then to look again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S), self._store.watch(keys.LEADER, after=revision) as batches:
                async for batch in batches:
                    if any(change.value is None for change in batch.changes):
                        return

    async def _reign(self, lease: int, work: Callable[[], Awaitable[None]]) -> None:
        log.info("replica %s leads, term %d", self._name, self._term)
        try:
            async with asyncio.TaskGroup() as group:
                working = group.create_task(self._work(work), name="leader")
                try:
                    await self._keep(lease, working)
                finally:
                    self._leads = False
                    working.cancel()
        except* ControlPlaneError as errors:
            log.warning("replica %s leads no more: %s", self._name, errors.exceptions[0])
        finally:
            self._leads = False
            log.info("replica %s has left term %d", self._name, self._term)
            with suppress(ControlPlaneError, TimeoutError):
                async with asyncio.timeout(RESIGN_S):
                    await self._store.revoke_lease(lease)  # the next one need not wait for it

    async def _work(self, work: Callable[[], Awaitable[None]]) -> None:
        await self._caught_up(self._term)
        self._leads = True
        await work()

    async def _keep(self, lease: int, working: asyncio.Task[None]) -> None:
        """Keeps the lease until it is lost, may be lost, or the work has ended."""
        loop = asyncio.get_running_loop()
        held_until_s = loop.time() + TTL_S
        while not working.done():
            asked_s = loop.time()
            try:
                async with asyncio.timeout_at(held_until_s):
                    await self._store.keep_lease(lease)
                held_until_s = asked_s + TTL_S
            except NotFound:
                log.warning("replica %s: its lease has run out", self._name)
                return
            except TimeoutError:
                log.warning("replica %s: the store did not keep its lease in %d s", self._name, TTL_S)
                return
            except StoreError as error:
                log.warning("replica %s: %s", self._name, error)
                if loop.time() >= held_until_s:
                    return
            await asyncio.wait({working}, timeout=KEEP_S)


class Fenced:
    """The store as the leader uses it: every commit is refused once another one leads. All else is the store's."""

    def __init__(self, store: Store, leadership: Leadership) -> None:
        self._store, self._leadership = store, leadership

    async def get(self, key: str) -> Record | None:
        """See the contract."""
        return await self._store.get(key)

    async def page(self, prefix: str, *, after: str = "", limit: int = 0, revision: int = 0) -> Page:
        """See the contract."""
        return await self._store.page(prefix, after=after, limit=limit, revision=revision)

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        """See the contract. Conflict, too, when another one leads."""
        return await self._store.commit(writes, [*expect, *self._leadership.fence()])

    def watch(
        self, prefix: str, *, after: int, progress_s: float = PROGRESS_S
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """See the contract."""
        return self._store.watch(prefix, after=after, progress_s=progress_s)

    async def compact(self, revision: int) -> None:
        """See the contract."""
        self._leadership.fence()
        await self._store.compact(revision)

    async def grant_lease(self, ttl_s: int) -> int:
        """See the contract."""
        return await self._store.grant_lease(ttl_s)

    async def keep_lease(self, lease: int) -> None:
        """See the contract."""
        await self._store.keep_lease(lease)

    async def revoke_lease(self, lease: int) -> None:
        """See the contract."""
        await self._store.revoke_lease(lease)
