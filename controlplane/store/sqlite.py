"""The SQLite engine: the Store contract in one file, for one process.

Blocking work runs in two threads, one that writes and one that reads, so that readers never wait for a disk flush.
Commits that come while a flush runs go into the next one together. Watches are woken by the commit itself: nothing
polls. A watch that falls behind what is kept for it in memory reads the rest from the file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from controlplane.errors import Compacted, Invalid, StoreError
from controlplane.store.contract import PROGRESS_S, Batch, Expect, Page, Record, Write, require_committable
from controlplane.store.tables import Outcome, Tables, Transaction, acquire, lease_gone
from controlplane.store.watchers import Watcher, follow

log = logging.getLogger("sandloom.controlplane.store")

T = TypeVar("T")
READ_CHANGES = 512
RETRY_S = 1.0


class SqliteStore:
    """An open store. Made by `open_sqlite`."""

    def __init__(self, path: Path, now_s: Callable[[], float]) -> None:
        self._path, self._now_s = path, now_s
        self._writer = ThreadPoolExecutor(1, "store-writer")
        self._reader = ThreadPoolExecutor(1, "store-reader")
        self._pending: list[tuple[Transaction, asyncio.Future[Outcome]]] = []
        self._work = asyncio.Event()
        self._watchers: set[Watcher] = set()
        self._deadlines_s: dict[int, float] = {}
        self._ttls_s: dict[int, int] = {}
        self._lease_work = asyncio.Event()
        self._closed = False

    async def _open(self) -> None:
        self._writes = await self._run(self._writer, lambda: Tables(self._path))
        self._reads = await self._run(self._reader, lambda: Tables(self._path))
        self._published, self._compacted = await self._run(self._reader, self._reads.bounds)
        self._known = self._published  # the newest revision that was ever read; it may not be published yet
        self._ttls_s = await self._run(self._reader, self._reads.leases)
        self._deadlines_s = {lease: self._now_s() + ttl for lease, ttl in self._ttls_s.items()}

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except sqlite3.Error as error:
            log.error("store %s: %s", self._path, error)
            text = f"store {self._path}: {error}; look at free disk space and the control plane's log"
            raise StoreError("StoreFailed", text) from error

    async def _close(self) -> None:
        self._closed = True
        _fail([future for _, future in self._pending], self._closed_error())
        for name, thread in (("_reads", self._reader), ("_writes", self._writer)):
            tables: Tables | None = getattr(self, name, None)
            if tables is not None:
                await self._run(thread, tables.close)
            thread.shutdown()

    async def _own(self) -> None:
        """The writing and the leases, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_forever(), name="store writer")
            group.create_task(self._expire_forever(), name="store leases")

    def _closed_error(self) -> StoreError:
        return StoreError("StoreClosed", f"store {self._path} is closed")

    # Writing.

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        """See the contract."""
        require_committable(writes)
        return await self._submit(Transaction(tuple(writes), tuple(expect)))

    async def _submit(self, transaction: Transaction) -> int:
        if self._closed:
            raise self._closed_error()
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending.append((transaction, future))
        self._work.set()
        outcome = await future
        if outcome.error is not None:
            raise outcome.error
        return outcome.revision

    async def _write_forever(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            jobs, self._pending = self._pending, []
            futures = [future for _, future in jobs]
            try:
                outcomes = await self._apply([transaction for transaction, _ in jobs])
            except StoreError as error:
                _fail(futures, error)
                continue
            except asyncio.CancelledError:
                _fail(futures, self._closed_error())
                raise
            for outcome in outcomes:
                if outcome.changes:
                    self._publish(Batch(outcome.revision, outcome.changes))
            for future, outcome in zip(futures, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    async def _apply(self, transactions: list[Transaction]) -> list[Outcome]:
        return await self._run(self._writer, lambda: self._writes.apply(transactions))

    def _publish(self, batch: Batch) -> None:
        self._published = batch.revision
        self._known = max(self._known, batch.revision)
        for watcher in self._watchers:
            watcher.offer(batch)

    # Reading.

    async def get(self, key: str) -> Record | None:
        """See the contract."""
        return await self._run(self._reader, lambda: self._reads.get(key))

    async def page(self, prefix: str, *, after: str = "", limit: int = 0, revision: int = 0) -> Page:
        """See the contract."""
        fetch = limit + 1 if limit else 0
        records, at, compacted = await self._run(
            self._reader, lambda: self._reads.list_at(prefix, after, fetch, revision)
        )
        self._known = max(self._known, at if not revision else 0)
        self._require_kept(at, compacted)
        more = bool(limit) and len(records) > limit
        return Page(tuple(records[:limit] if more else records), at, more)

    def _require_kept(self, revision: int, compacted: int) -> None:
        if revision < compacted or revision > self._known:
            kept = f"revisions {compacted} to {self._known} are kept"
            raise Compacted("Compacted", f"revision {revision} is not kept ({kept}): list again", revision=revision)

    @asynccontextmanager
    async def watch(
        self, prefix: str, *, after: int, progress_s: float = PROGRESS_S
    ) -> AsyncGenerator[AsyncIterator[Batch], None]:
        """See the contract."""
        self._require_kept(after, self._compacted)
        watcher = Watcher(prefix, after)
        self._watchers.add(watcher)
        try:
            yield follow(watcher, progress_s, self._catch_up)
        finally:
            self._watchers.discard(watcher)

    async def _catch_up(self, watcher: Watcher) -> list[Batch]:
        """Reads what it has not got yet; live afterwards, once nothing came meanwhile."""
        if watcher.cursor >= self._published:
            watcher.live = True
            return []
        batches, reached, compacted = await self._run(
            self._reader, lambda: self._reads.changes(watcher.prefix, watcher.cursor, READ_CHANGES)
        )
        self._require_kept(watcher.cursor, compacted)
        watcher.cursor = reached
        self._known = max(self._known, reached)
        return batches

    async def compact(self, revision: int) -> None:
        """See the contract."""
        self._compacted = await self._run(self._writer, lambda: self._writes.compact(revision))

    # Leases.

    async def grant_lease(self, ttl_s: int) -> int:
        """See the contract."""
        if ttl_s < 1:
            raise Invalid("ttl_s", "a lease lasts at least 1 s")
        lease = secrets.randbits(62) + 1
        await self._run(self._writer, lambda: self._writes.grant(lease, ttl_s))
        self._ttls_s[lease], self._deadlines_s[lease] = ttl_s, self._now_s() + ttl_s
        self._lease_work.set()
        return lease

    async def keep_lease(self, lease: int) -> None:
        """See the contract."""
        if lease not in self._deadlines_s:
            raise lease_gone(lease)
        self._deadlines_s[lease] = self._now_s() + self._ttls_s[lease]

    async def revoke_lease(self, lease: int) -> None:
        """See the contract."""
        if self._deadlines_s.pop(lease, None) is None:
            return
        try:
            await self._submit(Transaction(revoke=lease))
        except BaseException:
            self._deadlines_s[lease] = self._now_s() + RETRY_S
            self._lease_work.set()
            raise
        del self._ttls_s[lease]

    async def _expire_forever(self) -> None:
        while True:
            self._lease_work.clear()
            now_s = self._now_s()
            for lease, deadline_s in list(self._deadlines_s.items()):
                if deadline_s <= now_s:
                    log.info("lease %d has run out", lease)
                    with suppress(StoreError):  # logged; tried again after RETRY_S
                        await self.revoke_lease(lease)
            wait_s = min(self._deadlines_s.values(), default=now_s + 3600) - self._now_s()
            try:
                async with asyncio.timeout(max(0.0, wait_s)):
                    await self._lease_work.wait()
            except TimeoutError:
                continue


def _fail(futures: Sequence[asyncio.Future[Outcome]], error: StoreError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


@asynccontextmanager
async def open_sqlite(path: Path, *, now_s: Callable[[], float] = time.monotonic) -> AsyncGenerator[SqliteStore, None]:
    """The store in `path`, made when it is not there. StoreError when it is locked, too new or no store.

    `now_s` is the clock that leases run by."""
    lock = await asyncio.to_thread(acquire, path)
    store = SqliteStore(path, now_s)
    try:
        await store._open()
        owner = asyncio.create_task(store._own(), name=f"store {path.name}")
        try:
            yield store
        finally:
            owner.cancel()
            await asyncio.gather(owner, return_exceptions=True)
    finally:
        await store._close()
        os.close(lock)
