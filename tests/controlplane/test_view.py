"""The mirror of the store: one revision at a time, survives what is bad, never grows with a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from controlplane import codec, keys, lifecycle, scheduler, transitions
from controlplane.errors import Compacted
from controlplane.model import (
    Capacity,
    DesiredState,
    Host,
    LayerSize,
    Phase,
    Residency,
    Resources,
    Sandbox,
    SandboxSpec,
    SandboxStatus,
)
from controlplane.quotas import UNBOUNDED
from controlplane.scheduler_values import HostFacts
from controlplane.store.contract import Delete, Put, Store, Write
from controlplane.store.sqlite import open_sqlite
from controlplane.view import View
from controlplane.watching import Bookmark, Gone, watch_assignments, watch_pools
from controlplane.watching import Put as Told


@asynccontextmanager
async def viewed(path: Path) -> AsyncIterator[tuple[Store, View]]:
    async with open_sqlite(path) as store:
        view = View(store)
        running = asyncio.create_task(view.run())
        try:
            await view.reached(1)
            yield store, view
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def sandbox(uid: str, host: str = "h1", memory_mib: int = 256) -> Sandbox:
    spec = SandboxSpec("base", Resources(256, 1024, memory_mib, 1000))
    return Sandbox(f"name-{uid}", uid, "t", spec, 1.0, 1, host=host, epoch=3)


def stored(value: Sandbox) -> Put:
    return Put(keys.sandbox(value.tenant, value.name, value.uid), codec.encode(value))


async def test_what_was_there_before_and_what_comes_after_are_both_seen(tmp_path: Path) -> None:
    host = Host("h1", Capacity(1), "x:1", 1.0)
    async with open_sqlite(tmp_path / "s.db") as store:
        lease = await store.grant_lease(60)
        await store.commit([Put(keys.host("h1"), codec.encode(host)), Put(keys.alive("h1"), b"", lease)])
        held = Residency("t", "sha256:1", "h1", 1.0)
        await store.commit([Put(keys.residency("t", "sha256:1", "h1"), codec.encode(held))])
    async with viewed(tmp_path / "s.db") as (store, view):
        assert (set(view.hosts), view.alive, view.holders("t", "sha256:1")) == ({"h1"}, {"h1"}, ["h1"])
        assert view.holders("u", "sha256:1") == []
        guard = await store.commit([stored(sandbox("a")), Put(keys.quota_guard("t"), b"")])
        await view.reached(guard)
        assert (view.sandboxes["a"].revision, view.guards["t"]) == (guard, guard)
        assert [s.uid for s in view.on_host("h1")] == ["a"]
        await store.revoke_lease(lease)
        gone = [Delete(keys.host("h1")), Delete(keys.residency("t", "sha256:1", "h1")), Delete(keys.quota_guard("t"))]
        await view.reached(await store.commit([*gone, Delete(keys.sandbox("t", "name-a", "a"))]))
        assert (view.hosts, view.alive, view.residency, view.guards, view.sandboxes) == ({}, set(), {}, {}, {})


async def test_what_it_counts_as_it_goes_is_what_a_count_of_everything_gives(tmp_path: Path) -> None:
    random = Random(5)
    async with viewed(tmp_path / "s.db") as (store, view):
        for step in range(150):
            uid, host = f"u{random.randrange(8)}", random.choice(("", "h1", "h2"))
            phase = random.choice(list(Phase))
            one = replace(sandbox(uid, host), status=SandboxStatus(phase), desired=random.choice(list(DesiredState)))
            held = Residency("t", "sha256:1", random.choice(("h1", "h2")), 1.0)
            place = keys.residency(held.tenant, held.digest, held.host)
            sizes = Capacity(memory_mib=random.randrange(9000), vm_overhead_mib=64)
            writes: list[Write] = [
                stored(one), stored(one), Delete(stored(one).key), Put(place, codec.encode(held)), Delete(place),
                Put(keys.host("h1"), codec.encode(Host("h1", sizes, "x:1", 1.0))), Put(keys.alive("h1"), b""),
                Put(keys.host("h2"), codec.encode(Host("h2", sizes, "x:1", 1.0))), Delete(keys.alive("h1")),
            ]  # fmt: skip
            await view.reached(await store.commit([random.choice(writes)]))
            if step % 3 == 0:
                counted = scheduler.survey(
                    view.hosts.values(), view.alive, view.sandboxes.values(), view.residency.values()
                )
                assert view.survey() == counted
                mine = {s.uid for s in view.sandboxes.values() if s.host == "h1"}
                assert {s.uid for s in view.on_host("h1")} == mine
                assert view.open_ends == {s.uid for s in view.sandboxes.values() if lifecycle.is_open_ended(s)}


async def test_what_is_assumed_counts_in_the_index_as_if_all_were_counted_anew(tmp_path: Path) -> None:
    random = Random(7)
    async with viewed(tmp_path / "s.db") as (store, view):
        hosts = [Host(f"h{n}", Capacity(9000, 9000, 64, 8000), "x:1", 1.0) for n in range(3)]
        writes: list[Write] = [Put(keys.host(host.name), codec.encode(host)) for host in hosts]
        await view.reached(await store.commit([*writes, *(Put(keys.alive(host.name), b"") for host in hosts)]))
        for step in range(60):
            one = sandbox(f"u{step}", random.choice(hosts).name)
            one = replace(one, status=SandboxStatus(Phase.SCHEDULED), layers=(LayerSize(f"l{step % 4}", 5 << 20),))
            if random.randrange(2):
                view.census.index()  # nothing is to be counted anew when it is assumed
            view.assume(one, codec.encode(one))
            if random.randrange(3) == 0:
                view.release(one.uid)
            elif random.randrange(2):
                await view.reached(await store.commit([stored(one)]))
            seen = {row.name: _numbers(row) for row in view.census.index().rows()}
            assert seen == {state.name: _numbers(state) for state in view.survey()}


def _numbers(host: HostFacts) -> tuple[object, ...]:
    return (
        host.unpromised_mib, host.usable_mib, host.uncommitted_mib, host.cpu_asked_milli, host.settling,
        dict(host.groups),
    )  # fmt: skip


async def test_a_record_that_cannot_be_read_hides_no_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with viewed(tmp_path / "s.db") as (store, view):
        await view.reached(await store.commit([Put("sandboxes/t/bad,x", b"rubbish"), stored(sandbox("a"))]))
        assert set(view.sandboxes) == {"a"}
        assert "sandboxes/t/bad,x" in caplog.text
        await view.reached(await store.commit([Delete("sandboxes/t/bad,x")]))


async def test_a_view_that_fell_behind_a_compaction_reads_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with viewed(tmp_path / "s.db") as (store, view):
        await view.reached(await store.commit([stored(sandbox("a")), stored(sandbox("b"))]))
        with view.following() as changed:
            take, failures = view._take, [Compacted("Compacted", "as if")]

            def failing(batch: object) -> None:
                if failures:
                    raise failures.pop()
                take(batch)  # type: ignore[arg-type]

            monkeypatch.setattr(view, "_take", failing)
            gone = Delete(keys.sandbox("t", "name-a", "a"))
            await view.reached(await store.commit([gone, stored(sandbox("c"))]))
            assert set(view.sandboxes) == {"b", "c"}
            assert {"a", "c"} <= await changed.take(5)


async def test_a_slow_host_gets_the_newest_state_and_none_of_those_between(tmp_path: Path) -> None:
    async with viewed(tmp_path / "s.db") as (store, view):
        await view.reached(await store.commit([stored(sandbox("a")), stored(sandbox("b"))]))
        told = watch_assignments(view, "h1", bookmark_s=0.05)
        first = [await anext(told) for _ in range(3)]
        assert {item.sandbox.uid for item in first if isinstance(item, Told)} == {"a", "b"}
        assert isinstance(first[2], Bookmark)
        revision = 0
        for size in range(300, 400):  # while the host does not read
            revision = await store.commit([stored(sandbox("a", memory_mib=size))])
        await view.reached(revision)
        item = await anext(told)
        assert isinstance(item, Told)
        assert item.sandbox.spec.resources.memory_mib == 399
        assert isinstance(await anext(told), Bookmark)
        await view.reached(await store.commit([stored(sandbox("b", host="h2"))]))
        item = await anext(told)
        assert isinstance(item, Gone)
        assert item.uid == "b"
        reported = transitions.stopped(sandbox("b", host="h2"), 10, 1.0)
        await view.reached(await store.commit([stored(reported)]))  # somebody else's now
        assert isinstance(await anext(told), Bookmark)
        await told.aclose()


async def test_a_host_without_pools_hears_of_its_control_plane_while_others_report(tmp_path: Path) -> None:
    async with viewed(tmp_path / "s.db") as (store, view):

        async def chatter() -> None:
            for at in range(1000):  # heartbeats: the view moves far more often than a sign of life is due
                await store.commit([Put(keys.host("h1"), codec.encode(Host("h1", Capacity(1), "x:1", float(at))))])
                await asyncio.sleep(0.01)

        talking = asyncio.create_task(chatter())
        try:
            async with asyncio.timeout(8):
                told = watch_pools(view, "h1", lambda _: UNBOUNDED, bookmark_s=0.2)
                assert [await anext(told) for _ in range(3)] == [(), (), ()]
                await told.aclose()
            assert not talking.done()
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)


async def test_what_is_placed_and_not_yet_seen_counts_on_its_host_until_it_is_seen_or_released(tmp_path: Path) -> None:
    host = Host("h1", Capacity(memory_mib=1000), "x:1", 1.0)
    async with viewed(tmp_path / "s.db") as (store, view):
        await view.reached(await store.commit([Put(keys.host("h1"), codec.encode(host))]))

        def promised() -> int:
            (state,) = view.survey()
            return state.promised_mib

        one, two = sandbox("a"), sandbox("b")
        nothing, size = promised(), one.spec.resources.memory_min_mib
        view.assume(one, codec.encode(one))
        view.assume(two, codec.encode(two))
        assert view.is_assumed("a") and promised() == nothing + 2 * size
        assert view.on_host("h1") == [] and view.sandboxes == {}  # no host is told of what may not come to be
        view.release("b")
        assert promised() == nothing + size
        await view.reached(await store.commit([stored(one)]))
        assert not view.is_assumed("a") and promised() == nothing + size
        view.release("a")
        assert promised() == nothing + size
