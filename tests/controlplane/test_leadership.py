"""One leader at a time, on a real etcd: won by one, lost with the lease, and what it still says is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from controlplane import keys
from controlplane.errors import Conflict
from controlplane.leadership import TTL_S, Elected, Fenced, OnlyOne
from controlplane.store.contract import Put, Store
from controlplane.store.etcd import open_etcd
from controlplane.store.sqlite import open_sqlite
from tests.contract.engines import etcd_access

DEADLINE_S = 60.0


class Candidate:
    """A replica's part in an election, and what its work did."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.leadership = Elected(store, name, self._caught_up)
        self.fenced = Fenced(store, self.leadership)
        self.caught_up_to = 0
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.fail: Exception | None = None

    async def _caught_up(self, revision: int) -> None:
        self.caught_up_to = revision

    async def work(self) -> None:
        self.begun.set()
        try:
            if self.fail is not None:
                fail, self.fail = self.fail, None
                raise fail
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@contextlib.asynccontextmanager
async def candidate(name: str, opened: contextlib.AbstractAsyncContextManager[Store]) -> AsyncIterator[Candidate]:
    async with opened as store:
        one = Candidate(store, name)
        task = asyncio.create_task(one.leadership.lead(one.work))
        try:
            yield one
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def soon(wait: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await wait()


async def test_one_leads_and_the_next_takes_over_at_once_when_it_resigns() -> None:
    access = etcd_access()
    async with candidate("b", open_etcd(access)) as second, contextlib.AsyncExitStack() as stack:
        await soon(second.begun.wait)
        record = await second.store.get(keys.LEADER)
        assert record is not None and record.value == b"b" and record.mod_revision == second.caught_up_to
        third = await stack.enter_async_context(candidate("c", open_etcd(access)))
        assert second.leadership.leads and not third.leadership.leads
        assert await second.fenced.commit([Put("by", b"b")])
        with pytest.raises(Conflict, match="does not lead"):
            await third.fenced.commit([Put("by", b"c")])
        await third.store.commit([Put("by", b"anybody")])  # what is not the leader's needs no leader
        assert not third.begun.is_set()
        first = await stack.enter_async_context(candidate("a", open_etcd(access)))
        await second.store.revoke_lease(record.lease)  # as if it had run out
        await soon(second.ended.wait)
        async with asyncio.timeout(DEADLINE_S):
            while not any(one.leadership.leads for one in (first, second, third)):
                await second.store.get(keys.LEADER)
        assert [one.leadership.leads for one in (first, second, third)].count(True) == 1


async def test_what_an_old_leader_still_says_is_refused() -> None:
    """The lease is gone and the old leader does not know yet: only the fence stands between it and the store."""
    access = etcd_access()
    async with candidate("old", open_etcd(access)) as old:
        await soon(old.begun.wait)
        fence = old.leadership.fence()
        record = await old.store.get(keys.LEADER)
        assert record is not None
        async with open_etcd(access) as elsewhere:
            revision = await elsewhere.commit([Put(keys.LEADER, b"new")])  # the key is another one's now
            with pytest.raises(Conflict):
                await old.store.commit([Put("said", b"late")], fence)
            assert await elsewhere.get("said") is None
            assert revision > fence[0].mod_revision


async def test_a_leader_whose_store_stands_still_stops_before_its_lease_is_another_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    access = etcd_access()
    async with candidate("slow", open_etcd(access)) as slow:
        await soon(slow.begun.wait)

        async def never(_: int) -> None:
            await asyncio.Event().wait()

        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        monkeypatch.setattr(slow.store, "keep_lease", never)
        await soon(slow.ended.wait)
        assert loop.time() - asked_s < TTL_S + 20
        assert not slow.leadership.leads
        with pytest.raises(Conflict):
            await slow.fenced.commit([Put("said", b"late")])


async def test_work_that_fails_is_begun_again_in_another_term() -> None:
    async with candidate("a", open_etcd(etcd_access())) as only:
        await soon(only.begun.wait)
        first = only.caught_up_to
        record = await only.store.get(keys.LEADER)
        assert record is not None
        only.begun.clear()
        await only.store.revoke_lease(record.lease)
        await soon(only.begun.wait)
        assert only.caught_up_to > first


async def test_the_only_one_leads_without_a_fence(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "s.db") as store:
        alone = OnlyOne()
        assert alone.leads and alone.fence() == ()
        ran = asyncio.Event()

        async def work() -> None:
            ran.set()

        await alone.lead(work)
        assert ran.is_set()
        await Fenced(store, alone).commit([Put("a", b"1")])
        assert (await store.page("")).records
