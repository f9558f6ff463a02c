"""The event log: what happened, to whom, bounded in number and age. Entries are writes of the commit they tell of."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from controlplane import codec, keys
from controlplane.model import Event
from controlplane.store.contract import Delete, Put, Store

KEPT_EVENTS = 10_000
KEPT_S = 7 * 86_400
PAGE_RECORDS = 500


def entry(event: Event, *, recorded_s: float | None = None) -> Put:
    """The write that records an event. Its key sorts by when it was recorded, which is when it happened unless given;
    two of one moment stay apart by a random word."""
    at_s = event.time_s if recorded_s is None else recorded_s
    return Put(keys.event(int(at_s * 1e9), secrets.token_hex(4)), codec.encode(event))


class EventLog:
    """Recording, following and pruning."""

    def __init__(self, store: Store, *, now_s: Callable[[], float] = time.time, kept: int = KEPT_EVENTS) -> None:
        self._store, self._now_s, self._kept = store, now_s, kept

    async def record(self, event: Event) -> None:
        """Appends one event. Not idempotent."""
        await self._store.commit([entry(event, recorded_s=self._now_s())])

    async def stored(self) -> AsyncIterator[Event | int]:
        """Every kept event, oldest first, all of one revision; that revision is the last item."""
        after, revision = "", 0
        while True:
            page = await self._store.page(keys.EVENTS, after=after, limit=PAGE_RECORDS, revision=revision)
            revision = page.revision
            for record in page.records:
                yield codec.decode(Event, record.value, record.key, revision=record.mod_revision)
            if not page.more:
                yield revision
                return
            after = page.records[-1].key

    async def follow(self, revision: int) -> AsyncGenerator[Event, None]:
        """Every event recorded after `revision`, as it comes."""
        async with self._store.watch(keys.EVENTS, after=revision) as batches:
            async for batch in batches:
                for change in batch.changes:
                    if change.value is not None:
                        yield codec.decode(Event, change.value, change.key, revision=batch.revision)

    async def prune(self) -> int:
        """Removes what is too old or too many; how many went."""
        found: list[str] = []
        after = ""
        while True:
            page = await self._store.page(keys.EVENTS, after=after, limit=PAGE_RECORDS)
            found += [record.key for record in page.records]
            if not page.more:
                break
            after = page.records[-1].key
        oldest = keys.event(int((self._now_s() - KEPT_S) * 1e9), "")
        surplus = max(0, len(found) - self._kept)
        doomed = [key for at, key in enumerate(found) if at < surplus or key < oldest]
        for at in range(0, len(doomed), PAGE_RECORDS):
            await self._store.commit([Delete(key) for key in doomed[at : at + PAGE_RECORDS]])
        return len(doomed)
