"""The one watch of an etcd store: everything under its prefix, once, for all of this process's watchers.

Promise: each change reaches each watcher once and in order, through restarts of etcd, members that die or are cut off
and streams that break: the watch goes on at the next revision. When that was compacted meanwhile, every watcher gets
Compacted and lists again. While etcd is away watchers wait; after SILENT_S they get StoreError, so that their clients
can ask another replica. No watch dies in silence: a stream that brings nothing is compared with etcd's own revision
every PROBE_S, and opened again when it is behind.

What was seen last is kept (RING_CHANGES), so that a watch from a recent revision, or one that fell behind, costs etcd
nothing; older ones read etcd's history over a stream of their own until they meet what is kept. etcd never splits a
revision's events over two responses (it would have to be asked to, `fragment`), so a response is whole batches.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterable
from itertools import groupby, takewhile
from operator import attrgetter
from typing import Any

import grpc.aio

from controlplane.errors import Compacted, OperationError, StoreError
from controlplane.store.contract import Batch, Change
from controlplane.store.etcdlink import EtcdLink, Member, backoff_s
from controlplane.store.watchers import Watcher

log = logging.getLogger("sandloom.controlplane.store")

RING_CHANGES = 65_536
READ_CHANGES = 4_096
PROBE_S = 5.0
SILENT_S = 15.0
REPLAY_S = 5.0
DELETE = 1


class Feed:
    """See the module. run() is its owner. All batches after `floor` and up to `cursor` are in the ring."""

    def __init__(self, link: EtcdLink, prefix: str) -> None:
        self._link, self._prefix = link, prefix.encode()
        self.cursor = self.floor = 0
        self._ring: deque[Batch] = deque()
        self._ring_changes = 0
        self.watchers: set[Watcher] = set()
        self._suspect = 0
        self._connected = False

    async def revision(self) -> int:
        """etcd's newest revision."""
        request = self._link.proto.RangeRequest(key=self._prefix or b"\0", limit=1, keys_only=True)
        return int((await self._link.call("KV", "Range", request, safe=True)).header.revision)

    def start(self, revision: int) -> None:
        """Begins after `revision`, with nothing kept."""
        self.cursor = self.floor = revision
        self._ring.clear()
        self._ring_changes = 0
        for watcher in self.watchers:  # what came in between is in etcd's history only
            watcher.live = False
            watcher.woken.set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        failures, heard_s = 0, loop.time()
        while True:
            before = self.cursor
            try:
                await self._follow()
            except Compacted as error:
                log.warning("the watch fell behind a compaction and begins again")
                self._fail_all(error, before=int(dict(error.details)["revision"]))
                await self._start_again()
                continue
            except StoreError as error:
                log.warning("the watch of the store broke off at revision %d: %s", self.cursor, error)
                failures = 0 if self.cursor > before or self._connected else failures + 1
                heard_s = loop.time() if failures == 0 else heard_s
                if loop.time() - heard_s > SILENT_S:
                    self._fail_all(error)
            await asyncio.sleep(backoff_s(failures, random.random()))

    async def _start_again(self) -> None:
        while True:
            try:
                return self.start(await self.revision())
            except StoreError as error:
                log.warning("%s", error)
                await asyncio.sleep(1.0)

    def _fail_all(self, error: OperationError, *, before: int = 0) -> None:
        for watcher in self.watchers:
            if not before or watcher.cursor < before:
                watcher.fail(error)

    def _watch_request(self, after: int) -> Any:
        proto = self._link.proto
        create = proto.WatchCreateRequest(
            key=self._prefix or b"\0", range_end=end_of(self._prefix), start_revision=after + 1
        )
        return proto.WatchRequest(create_request=create)

    async def _follow(self) -> None:
        """One stream, from the cursor until it breaks."""
        self._connected = False
        async with self._link.stream("Watch", "Watch") as (call, member):
            async with self._link.bounded(member, self._soon(self._link.access.deadline_s)):
                await call.write(self._watch_request(self.cursor))
            reading = asyncio.ensure_future(call.read())  # cancelling a read would end the stream: it goes on
            try:
                while True:
                    try:
                        async with self._link.bounded(member, self._soon(PROBE_S)):
                            await asyncio.wait({reading})
                    except TimeoutError:
                        await self._probe(member)
                        continue
                    response = reading.result()
                    reading = asyncio.ensure_future(call.read())
                    self._connected = True
                    for batch in batches_of(response, len(self._prefix)):
                        self._publish(batch)
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def _soon(self, in_s: float) -> float:
        return asyncio.get_running_loop().time() + in_s

    async def _probe(self, member: Member) -> None:
        """TimeoutError when the stream has to be opened again: its member was left or does not answer over this
        connection, or it is behind since a while."""
        if not self._link.uses(member):
            raise TimeoutError
        try:
            newest = await self.revision()
        except StoreError as error:
            await member.close()  # a connection that swallows everything; the next one may not
            raise TimeoutError from error
        if self.cursor < self._suspect:
            self._suspect = 0
            raise TimeoutError
        self._suspect = newest if newest > self.cursor else 0

    def _publish(self, batch: Batch) -> None:
        if batch.revision <= self.cursor:
            return
        self.cursor = batch.revision
        self._ring.append(batch)
        self._ring_changes += len(batch.changes)
        while self._ring_changes > RING_CHANGES and len(self._ring) > 1:
            gone = self._ring.popleft()
            self.floor = gone.revision
            self._ring_changes -= len(gone.changes)
        for watcher in self.watchers:
            watcher.offer(batch)

    # Watchers that are not live.

    async def catch_up(self, watcher: Watcher) -> list[Batch]:
        """See watchers.follow."""
        if watcher.cursor < self.floor:
            return await self._replayed(watcher)
        missed = list(takewhile(lambda batch: batch.revision > watcher.cursor, reversed(self._ring)))
        missed.reverse()
        taken = missed[:READ_CHANGES]
        watcher.live = len(taken) == len(missed)
        watcher.cursor = max(watcher.cursor, self.cursor) if watcher.live else taken[-1].revision
        return [mine for mine in map(watcher.filtered, taken) if mine.changes]

    async def _replayed(self, watcher: Watcher) -> list[Batch]:
        """The next batches of etcd's history, at most until what is kept; empty when it has none in REPLAY_S."""
        found: list[Batch] = []
        count = 0
        until_s = self._soon(REPLAY_S)
        async with self._link.stream("Watch", "Watch") as (call, member):
            await call.write(self._watch_request(watcher.cursor))
            while watcher.cursor < self.floor and count < READ_CHANGES:
                try:
                    async with self._link.bounded(member, until_s):
                        response = await call.read()
                except TimeoutError:
                    break
                for batch in batches_of(response, len(self._prefix)):
                    watcher.cursor = batch.revision
                    count += len(batch.changes)
                    mine = watcher.filtered(batch)
                    if mine.changes:
                        found.append(mine)
        return found


def end_of(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with an ASCII prefix; of all keys when it is empty. Pure."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b"\0"


def batches_of(response: Any, cut: int) -> Iterable[Batch]:
    """What a WatchResponse brings, `cut` bytes of each key left out. Compacted, StoreError when it ends the watch."""
    if response is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise StoreError("StoreUnavailable", "etcd ended the watch")
    if response.compact_revision:
        at = response.compact_revision
        raise Compacted("Compacted", f"etcd keeps what is after revision {at}: list again", revision=at)
    if response.canceled:
        raise StoreError("StoreUnavailable", f"etcd cancelled the watch: {response.cancel_reason or 'no reason given'}")
    return [
        Batch(revision, tuple(_change(event, cut) for event in events))
        for revision, events in groupby(response.events, attrgetter("kv.mod_revision"))
    ]


def _change(event: Any, cut: int) -> Change:
    kv = event.kv
    return Change(kv.key[cut:].decode("ascii"), None if event.type == DELETE else kv.value)
