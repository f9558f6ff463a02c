"""Keeping house: old requests go, history is compacted, and no step's failure stops the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controlplane import codec, keys
from controlplane.api.channel import TlsFiles
from controlplane.drains import Drains
from controlplane.errors import Compacted, StoreError
from controlplane.events import EventLog
from controlplane.images import Images
from controlplane.joining import Joining
from controlplane.reconciler import REQUEST_KEPT_S, Reconciler
from controlplane.records import Records
from controlplane.registry import Registry
from controlplane.relay import HostLinks
from controlplane.requests import UsedRequest
from controlplane.sandboxes import Sandboxes
from controlplane.store.contract import Put, Store
from controlplane.store.sqlite import open_sqlite
from controlplane.tenants import Tenants
from controlplane.view import View


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def keeping(path: Path, clock: Clock) -> AsyncIterator[tuple[Store, View, Reconciler]]:
    async with open_sqlite(path) as store:
        view = View(store)
        images = Images(store, view)
        nowhere = Path("/nonexistent")
        links = HostLinks(TlsFiles(nowhere, nowhere, nowhere))
        records = Records(store, view)
        sandboxes = Sandboxes(store, view, records, images, Tenants(store, view))
        log, registry = EventLog(store), Registry(store, view, images, 1)
        yield store, view, Reconciler(
            store, view, records, sandboxes, images, links, log, Drains(store, view, records, registry),
            Joining(store, registry, None),
            lost_grace_s=1, history_s=100, now_s=clock, clock_s=clock,
        )  # fmt: skip


async def test_requests_are_remembered_for_a_day(tmp_path: Path) -> None:
    clock = Clock()
    async with keeping(tmp_path / "s.db", clock) as (store, _, reconciler):
        for request_id, age_s in (("old", REQUEST_KEPT_S + 1), ("new", REQUEST_KEPT_S - 1)):
            used = UsedRequest("sandboxes/t/a,1", "x", clock.now_s - age_s)
            await store.commit([Put(keys.request("t", request_id), codec.encode(used))])
        await reconciler._keep_house()
        assert [record.key for record in (await store.page(keys.REQUESTS)).records] == ["requests/t/new"]


async def test_history_is_kept_as_long_as_it_is_promised_and_no_longer(tmp_path: Path) -> None:
    clock = Clock()
    async with keeping(tmp_path / "s.db", clock) as (store, view, reconciler):
        first = view.revision = await store.commit([Put("a", b"1")])
        await reconciler._keep_house()
        second = view.revision = await store.commit([Put("a", b"2")])
        clock.now_s += 60
        await reconciler._keep_house()
        assert (await store.page("a", revision=first)).records  # 60 s old: kept
        clock.now_s += 60
        view.revision = await store.commit([Put("a", b"3")])
        await reconciler._keep_house()  # first was seen 120 s ago: compacted up to it
        async with store.watch("", after=first):
            pass
        clock.now_s += 60
        await reconciler._keep_house()
        with pytest.raises(Compacted):
            await store.page("a", revision=first)
        assert (await store.page("a", revision=second)).records


async def test_a_step_that_fails_is_logged_and_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with keeping(tmp_path / "s.db", Clock()) as (_, _, reconciler):
        tries = []

        async def _fails() -> None:
            tries.append(1)
            raise StoreError("StoreFailed", "disk full")

        await reconciler._tried(_fails)
        await reconciler._tried(_fails)
        assert len(tries) == 2
        assert "fails: disk full" in caplog.text


async def test_a_new_term_begins_with_nothing_remembered(tmp_path: Path) -> None:
    """A host that was lost before this replica led last may have been back all the while since."""
    async with keeping(tmp_path / "s.db", Clock()) as (_, _, reconciler):
        reconciler._lost_since_s["h1"] = 0.0
        term = asyncio.create_task(reconciler.run())
        async with asyncio.timeout(60):
            while reconciler._lost_since_s:  # noqa: ASYNC110
                await asyncio.sleep(0)
        term.cancel()
        await asyncio.gather(term, return_exceptions=True)
        assert reconciler._lost_since_s == {}
