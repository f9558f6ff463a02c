"""The etcd engine: the Store contract on a cluster, for any number of control planes at once.

Reads are linearizable: what one replica committed every replica reads. Lists page at one revision. Commits of one
moment share a transaction (etcdcommits.py), all watches of a process share one of etcd's (etcdwatch.py), all leases one
stream (etcdleases.py), and all of them the way to the cluster (etcdlink.py). Layout: every key of the contract under
the prefix of the configuration ("sandloom/"), values as they are. The store compacts only where it is told to
(the reconciler does, `history_s`); etcd's own --auto-compaction may run beside it. Space that compaction freed
is given back by `etcdctl defrag`, which is the operator's to run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from controlplane.errors import Compacted, StoreError
from controlplane.store.contract import PROGRESS_S, Batch, Expect, Page, Record, Write, require_committable
from controlplane.store.etcdcommits import Commits
from controlplane.store.etcdleases import Leases
from controlplane.store.etcdlink import EtcdAccess, EtcdLink
from controlplane.store.etcdwatch import Feed, end_of
from controlplane.store.watchers import Watcher, follow

log = logging.getLogger("sandloom.controlplane.store")

READ_RECORDS = 2_000


class EtcdStore:
    """An open store. Made by `open_etcd`."""

    def __init__(self, access: EtcdAccess) -> None:
        self._link = EtcdLink(access)
        self._prefix = access.prefix
        self._feed = Feed(self._link, access.prefix)
        self._commits = Commits(self._link, access.prefix)
        self._leases = Leases(self._link)
        self._closed = False

    async def _own(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed.run(), name="store watch")
            group.create_task(self._commits.run(), name="store commits")
            group.create_task(self._leases.run(), name="store leases")
            group.create_task(self._link.watchdog(), name="store watchdog")

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError("StoreClosed", "the store is closed")

    # Writing.

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        """See the contract."""
        self._require_open()
        require_committable(writes)
        if not writes and not expect:
            return await self._feed.revision()
        return await self._commits.commit(writes, expect)

    async def compact(self, revision: int) -> None:
        """See the contract."""
        self._require_open()
        with suppress(Compacted):  # it was compacted further already, or there is nothing to compact yet
            request = self._link.proto.CompactionRequest(revision=revision)
            await self._link.call("KV", "Compact", request, safe=True)

    # Reading.

    async def get(self, key: str) -> Record | None:
        """See the contract."""
        self._require_open()
        request = self._link.proto.RangeRequest(key=self._key(key))
        answer = await self._link.call("KV", "Range", request, safe=True)
        return self._record(answer.kvs[0]) if answer.kvs else None

    async def page(self, prefix: str, *, after: str = "", limit: int = 0, revision: int = 0) -> Page:
        """See the contract."""
        self._require_open()
        records: list[Record] = []
        while True:
            wanted = min(READ_RECORDS, limit - len(records)) if limit else READ_RECORDS
            answer = await self._range(prefix, after, wanted, revision)
            revision = revision or int(answer.header.revision)
            records += map(self._record, answer.kvs)
            if not answer.more or (limit and len(records) >= limit):
                return Page(tuple(records), revision, bool(answer.more))
            after = records[-1].key

    async def _range(self, prefix: str, after: str, limit: int, revision: int) -> Any:
        start = self._key(after) + b"\0" if after >= prefix and after else self._key(prefix)
        request = self._link.proto.RangeRequest(
            key=start or b"\0", range_end=end_of(self._key(prefix)), limit=limit, revision=revision
        )
        return await self._link.call("KV", "Range", request, safe=True)

    def _key(self, key: str) -> bytes:
        return (self._prefix + key).encode("ascii")

    def _record(self, kv: Any) -> Record:
        key = kv.key[len(self._prefix) :].decode("ascii")
        return Record(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)

    @asynccontextmanager
    async def watch(
        self, prefix: str, *, after: int, progress_s: float = PROGRESS_S
    ) -> AsyncGenerator[AsyncIterator[Batch], None]:
        """See the contract."""
        self._require_open()
        request = self._link.proto.RangeRequest(
            key=self._key("") or b"\0", limit=1, keys_only=True, revision=max(1, after)
        )
        await self._link.call("KV", "Range", request, safe=True)  # Compacted, when it is not kept
        watcher = Watcher(prefix, after)
        self._feed.watchers.add(watcher)
        try:
            yield follow(watcher, progress_s, self._feed.catch_up)
        finally:
            self._feed.watchers.discard(watcher)

    # Leases.

    async def grant_lease(self, ttl_s: int) -> int:
        """See the contract."""
        self._require_open()
        return await self._leases.grant(ttl_s)

    async def keep_lease(self, lease: int) -> None:
        """See the contract."""
        self._require_open()
        await self._leases.keep(lease)

    async def revoke_lease(self, lease: int) -> None:
        """See the contract."""
        self._require_open()
        await self._leases.revoke(lease)


@asynccontextmanager
async def open_etcd(access: EtcdAccess, *, patience_s: float = 0.0) -> AsyncGenerator[EtcdStore, None]:
    """The store in a cluster. StoreError when it lets us not in, or no member answers in time: a call's deadline, or
    `patience_s`, if that is longer."""
    store = EtcdStore(access)
    give_up_s = asyncio.get_running_loop().time() + patience_s
    try:
        while True:
            try:
                store._feed.start(await store._feed.revision())
                break
            except StoreError as error:
                if error.reason != "StoreUnavailable" or asyncio.get_running_loop().time() >= give_up_s:
                    raise
                log.warning("waiting for etcd: %s", error)
        owner = asyncio.create_task(store._own(), name="store etcd")
        try:
            yield store
        finally:
            store._closed = True
            owner.cancel()
            await asyncio.gather(owner, return_exceptions=True)
    finally:
        await store._link.close()
