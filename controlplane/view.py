"""A mirror of the store in memory: hosts, sandboxes, images and who holds them, kept up by one watch.

Promise: it shows one revision of the store at a time (`revision`), at most a moment old. Decisions are made on it and
committed with guards (keys.py), so that an old view costs a retry and never a wrong commit. Waiting wakes at once.
Whoever follows single sandboxes gets the *set* that changed, not a queue: a slow reader skips states, never grows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from controlplane import keys, lifecycle, scheduler
from controlplane.census import Census
from controlplane.errors import BadState, Compacted, StoreError
from controlplane.membership import Member
from controlplane.mirrored import MIRRORED, parsed, parsed_all
from controlplane.model import Host, Image, Pool, Residency, Sandbox
from controlplane.scheduler import HostState
from controlplane.store.contract import Batch, Put, Store
from controlplane.tenancy import Tenant
from controlplane.usage import Measured, Use

log = logging.getLogger("sandloom.controlplane.view")

T = TypeVar("T")
PAGE_RECORDS = 1000
SETTLED_HOSTS = 200
RETRY_S = 0.5
NUDGE_S = 1.0


class Changed:
    """The uids of sandboxes that changed since they were last taken."""

    def __init__(self) -> None:
        self._uids: set[str] = set()
        self._filled = asyncio.Event()

    def add(self, uid: str) -> None:
        """Marks one."""
        self._uids.add(uid)
        self._filled.set()

    async def take(self, timeout_s: float) -> set[str]:
        """Waits until some changed; empty after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._filled.wait()
        except TimeoutError:
            return set()
        taken, self._uids = self._uids, set()
        self._filled.clear()
        return taken


class View:
    """See the module. run() is its owner; everything else reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.revision = 0
        self.hosts: dict[str, Host] = {}
        self.alive: set[str] = set()
        self.lost: set[str] = set()  # hosts that are not alive
        self.sandboxes: dict[str, Sandbox] = {}  # by uid
        self.open_ends: set[str] = set()  # uids of sandboxes that the reconciler may have to do something for
        self._leaving: dict[str, dict[str, Sandbox]] = {}
        self._by_host: dict[str, dict[str, Sandbox]] = {}
        self._holders: dict[tuple[str, str], set[str]] = {}  # hosts by tenant and digest
        self._held: dict[str, dict[str, Residency]] = {}  # by host and key
        self.census = Census(self._host_state)
        self.images: dict[str, Image] = {}  # by key
        self.residency: dict[str, Residency] = {}  # by key
        self.guards: dict[str, int] = {}  # mod_revision of the quota's guard, by tenant
        self._by_tenant: dict[str, dict[str, Sandbox]] = {}
        self._assumed: dict[str, tuple[Sandbox, bytes]] = {}  # with their records
        self._assumed_on: dict[str, dict[str, Sandbox]] = {}
        self.pools: dict[str, Pool] = {}  # by key
        self.members: dict[str, Member] = {}  # those that have a record
        self.tenants: dict[str, Tenant] = {}  # those that have a record
        self.measured = Measured(scheduler.DEFAULT_POLICY.quantile)
        self._followers: set[Changed] = set()
        self._moved = asyncio.Event()
        self._nudging = False

    async def run(self) -> None:
        """Lists, then follows, for ever; lists again when it fell behind a compaction."""
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load()
                    loaded = True
                async with self._store.watch(keys.ALL, after=self.revision) as batches:
                    async for batch in batches:
                        self._take(batch)
            except Compacted:
                loaded = False
                log.warning("the view fell behind and reads everything again")
            except StoreError as error:
                log.error("the view cannot follow the store: %s", error)
                await asyncio.sleep(RETRY_S)

    async def reached(self, revision: int) -> None:
        """Returns when the view shows `revision` or a later one. Bound it with a timeout. StoreError.

        What others keep in the same etcd makes revisions that no change of ours tells of; then one is made."""
        if self.revision >= revision:
            return
        try:
            async with asyncio.timeout(NUDGE_S):
                await self.until(lambda: self.revision >= revision or None)
        except TimeoutError:
            if self.revision < revision and not self._nudging:
                self._nudging = True
                try:
                    await self._store.commit([Put(keys.SYNC, b"")])
                finally:
                    self._nudging = False
            await self.until(lambda: self.revision >= revision or None)

    async def until(self, condition: Callable[[], T | None]) -> T:
        """Waits until `condition` gives something other than None. It is asked again after each change."""
        while (found := condition()) is None:
            await self._moved.wait()
        return found

    @property
    def moved(self) -> asyncio.Event:
        """Is set by the next change. Take it first, then look at the view, then wait for it: nothing is missed."""
        return self._moved

    @contextmanager
    def following(self) -> Iterator[Changed]:
        """Marks every sandbox that changes while the block runs."""
        changed = Changed()
        self._followers.add(changed)
        try:
            yield changed
        finally:
            self._followers.discard(changed)

    def on_host(self, host: str) -> list[Sandbox]:
        """The sandboxes that are assigned to a host."""
        return list(self._by_host.get(host, {}).values())

    def of_tenant(self, tenant: str) -> Iterable[Sandbox]:
        """A tenant's sandboxes."""
        return self._by_tenant.get(tenant, {}).values()

    # What this control plane has placed and does not see yet counts on its host, and only there.

    def assume(self, sandbox: Sandbox, record: bytes) -> None:
        """Counts a placement until the view shows the sandbox, or until it is released. `record` is it, encoded."""
        self._assumed[sandbox.uid] = sandbox, record
        self._assumed_on.setdefault(sandbox.host, {})[sandbox.uid] = sandbox
        self.census.assume(sandbox.host, scheduler.demand_of(sandbox, self.measured.expected))

    def is_assumed(self, uid: str) -> bool:
        """Whether a placement of it is on its way."""
        return uid in self._assumed

    def release(self, uid: str) -> None:
        """Counts it no more; nothing happens when it is shown already."""
        assumed = self._assumed.pop(uid, None)
        if assumed is not None:
            self._count_no_more(assumed[0])
            self.census.touch(assumed[0].host)

    def _count_no_more(self, sandbox: Sandbox) -> None:
        there = self._assumed_on[sandbox.host]
        del there[sandbox.uid]
        if not there:
            del self._assumed_on[sandbox.host]

    def leaving(self, host: str) -> list[Sandbox]:
        """The sandboxes that a host has to end before they may begin anew elsewhere."""
        return list(self._leaving.get(host, {}).values())

    def member(self, host: str) -> Member:
        """What operators decided of a host."""
        return self.members.get(host) or Member(host)

    def survey(self) -> list[HostState]:
        """The hosts as the scheduler sees them, by name."""
        return self.census.states()

    def _host_state(self, name: str) -> HostState | None:
        host = self.hosts.get(name)
        if host is None:
            return None
        there: Iterable[Sandbox] = self._by_host.get(name, {}).values()
        if name in self._assumed_on:
            there = [*there, *self._assumed_on[name].values()]
        held = self._held.get(name, {}).values()
        cordoned = not self.member(name).takes_new
        return scheduler.host_state(host, name in self.alive, there, held, self.measured.expected, cordoned=cordoned)

    def pool_of_member(self, uid: str) -> Pool | None:
        """The pool that a row of the ledger is a member of: hosts name members pool-<uid of the pool>-<number>."""
        return next((pool for pool in self.pools.values() if uid.startswith(f"pool-{pool.uid}-")), None)

    def holders(self, tenant: str, digest: str) -> list[str]:
        """The hosts that hold a tenant's image."""
        return sorted(self._holders.get((tenant, digest), ()))

    def is_held(self, tenant: str, digest: str) -> bool:
        """Whether a host whose lease holds has a tenant's image, so that another one may fetch it."""
        return not self.alive.isdisjoint(self._holders.get((tenant, digest), ()))

    async def _load(self) -> None:
        """Replaces everything by one revision of the store. What takes long gives way to others now and then."""
        found: list[tuple[str, object, int]] = []
        after, revision = "", 0
        for prefix in MIRRORED:
            after = ""
            while True:
                page = await self._store.page(prefix, after=after, limit=PAGE_RECORDS, revision=revision)
                revision = page.revision
                found += parsed_all(page.records)
                if not page.more:
                    break
                after = page.records[-1].key
        for table in (self.hosts, self.images, self.residency, self.guards, self.pools, self.tenants, self.members):
            table.clear()
        self.alive.clear()
        self.lost.clear()
        before, self.sandboxes = self.sandboxes, {}
        for index in (self._by_host, self._by_tenant, self._leaving, self._held, self._holders, self.measured):
            index.clear()
        self.census.clear()
        self.open_ends.clear()
        for at, (key, value, mod_revision) in enumerate(found):
            self._apply(key, value, mod_revision)
            if not self.revision and at % PAGE_RECORDS == 0:  # nobody looks at it yet
                await asyncio.sleep(0)
        more = not self.revision
        while more:
            more = self.census.settle(SETTLED_HOSTS)
            await asyncio.sleep(0)
        for uid in before:
            self._mark(uid)
        self._reach(revision)

    def _take(self, batch: Batch) -> None:
        for change in batch.changes:
            if change.value is None:
                self._delete(change.key)
            else:
                self._put(change.key, change.value, batch.revision)
        self._reach(batch.revision)

    def _reach(self, revision: int) -> None:
        self.revision = revision
        self._moved.set()
        self._moved = asyncio.Event()

    def _mark(self, uid: str) -> None:
        for follower in self._followers:
            follower.add(uid)

    def _put(self, key: str, value: bytes, revision: int) -> None:
        assumed = self._assumed.pop(keys.split_sandbox(key)[2], None) if key.startswith(keys.SANDBOXES) else None
        if assumed is not None and assumed[1] == value:  # it is what was assumed, and has been counted as such
            sandbox = replace(assumed[0], revision=revision)
            self._count_no_more(sandbox)
            self._set_sandbox(sandbox, counted=sandbox.uid not in self.sandboxes)
            return
        if assumed is not None:
            self._count_no_more(assumed[0])
            self.census.touch(assumed[0].host)
        try:
            mirrored = parsed(key, value, revision)
        except BadState as error:  # as in parsed_all
            log.error("%s", error)
            return
        self._apply(key, mirrored, revision)

    def _apply(self, key: str, value: object, revision: int) -> None:
        if isinstance(value, Sandbox):
            self._set_sandbox(value)
        elif isinstance(value, Host):
            self.hosts[value.name] = value
            self._look_at(value.name)
        elif isinstance(value, Image):
            self.images[key] = value
        elif isinstance(value, Pool):
            self.pools[key] = value
        elif isinstance(value, Member):
            self.members[value.name] = value
            self.census.touch(value.name)
        elif isinstance(value, Tenant):
            self.tenants[value.name] = value
        elif isinstance(value, Use):
            self._set_use(keys.split_use(key), value)
        elif isinstance(value, Residency):
            self.residency[key] = self._held.setdefault(value.host, {})[key] = value
            self._holders.setdefault((value.tenant, value.digest), set()).add(value.host)
            self.census.touch(value.host)
        elif key.startswith(keys.ALIVE):
            self.alive.add(key.removeprefix(keys.ALIVE))
            self._look_at(key.removeprefix(keys.ALIVE))
        elif key.startswith(keys.QUOTAS):
            self.guards[key.removeprefix(keys.QUOTAS)] = revision

    def _look_at(self, host: str) -> None:
        """It was put or deleted, or its lease was."""
        if host in self.hosts and host not in self.alive:
            self.lost.add(host)
        else:
            self.lost.discard(host)
        self.census.touch(host)

    def _delete(self, key: str) -> None:
        if key.startswith(keys.SANDBOXES):
            uid = keys.split_sandbox(key)[2]
            self._drop_sandbox(uid)
            self._mark(uid)
        elif key.startswith(keys.HOSTS):
            self.hosts.pop(key.removeprefix(keys.HOSTS), None)
            self._look_at(key.removeprefix(keys.HOSTS))
        elif key.startswith(keys.ALIVE):
            self.alive.discard(key.removeprefix(keys.ALIVE))
            self._look_at(key.removeprefix(keys.ALIVE))
        elif key.startswith(keys.QUOTAS):
            self.guards.pop(key.removeprefix(keys.QUOTAS), None)
        elif key.startswith(keys.MEMBERS):
            self.members.pop(key.removeprefix(keys.MEMBERS), None)
            self.census.touch(key.removeprefix(keys.MEMBERS))
        elif key.startswith(keys.USES):
            self._set_use(keys.split_use(key), None)
        elif key.startswith(keys.TENANTS):
            self.tenants.pop(key.removeprefix(keys.TENANTS), None)
        else:
            self.images.pop(key, None)
            self.pools.pop(key, None)
            held = self.residency.pop(key, None)
            if held is not None:
                self._holders[held.tenant, held.digest].discard(held.host)
                there = self._held[held.host]
                del there[key]
                if not there:
                    del self._held[held.host]
                self.census.touch(held.host)

    def _set_use(self, workload: tuple[str, str], use: Use | None) -> None:
        if self.measured.put(workload, use):
            for sandbox in self.of_tenant(workload[0]):
                if sandbox.spec.image_digest == workload[1]:
                    self.census.touch(sandbox.host)

    def _set_sandbox(self, sandbox: Sandbox, *, counted: bool = False) -> None:
        self._drop_sandbox(sandbox.uid)
        self.sandboxes[sandbox.uid] = sandbox
        self._by_tenant.setdefault(sandbox.tenant, {})[sandbox.uid] = sandbox
        if sandbox.host:
            self._by_host.setdefault(sandbox.host, {})[sandbox.uid] = sandbox
            if not counted:
                self.census.touch(sandbox.host)
        if sandbox.leaving:
            self._leaving.setdefault(sandbox.leaving, {})[sandbox.uid] = sandbox
        if lifecycle.is_open_ended(sandbox):
            self.open_ends.add(sandbox.uid)
        self._mark(sandbox.uid)

    def _drop_sandbox(self, uid: str) -> None:
        sandbox = self.sandboxes.pop(uid, None)
        self.open_ends.discard(uid)
        if sandbox is not None:
            mine = self._by_tenant[sandbox.tenant]
            del mine[uid]
            if not mine:
                del self._by_tenant[sandbox.tenant]
        if sandbox is not None and sandbox.leaving:
            self._leaving[sandbox.leaving].pop(uid, None)
        if sandbox is not None and sandbox.host:
            there = self._by_host[sandbox.host]
            del there[uid]
            if not there:
                del self._by_host[sandbox.host]
            self.census.touch(sandbox.host)
