"""What every engine of the Store contract must do. See controlplane/store/contract.py for the promises."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.errors import Compacted, Conflict, Invalid, NotFound
from controlplane.store.contract import MAX_VALUE_BYTES, Batch, Change, Delete, Expect, Put, Store
from tests.contract.engines import ENGINES, Engine


@pytest.fixture(params=sorted(ENGINES))
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    engine = ENGINES[request.param](tmp_path)
    yield engine
    if engine.clean is not None:
        await engine.clean()


@pytest.fixture
async def store(engine: Engine) -> AsyncIterator[Store]:
    async with engine.open() as store:
        yield store


async def keys_of(store: Store, prefix: str = "", *, revision: int = 0) -> list[str]:
    return [record.key for record in (await store.page(prefix, revision=revision)).records]


async def gather(store: Store, prefix: str, after: int, until_revision: int) -> list[Batch]:
    """What a watch gives until it has shown `until_revision`."""
    seen: list[Batch] = []
    async with asyncio.timeout(20), store.watch(prefix, after=after, progress_s=0.2) as batches:
        async for batch in batches:
            if batch.changes:
                seen.append(batch)
            if batch.revision >= until_revision:
                return seen
    raise AssertionError("the watch ended")


# Reading and writing.


async def test_what_is_put_is_read(store: Store) -> None:
    revision = await store.commit([Put("a/1", b"one")])
    record = await store.get("a/1")
    assert record is not None
    assert (record.value, record.create_revision, record.mod_revision, record.lease) == (b"one", revision, revision, 0)
    assert await store.get("a/2") is None


async def test_a_changed_record_keeps_its_create_revision_and_a_new_one_begins_anew(store: Store) -> None:
    first = await store.commit([Put("a", b"1")])
    second = await store.commit([Put("a", b"2")])
    record = await store.get("a")
    assert record is not None and (record.create_revision, record.mod_revision) == (first, second)
    await store.commit([Delete("a")])
    third = await store.commit([Put("a", b"3")])
    record = await store.get("a")
    assert record is not None and record.create_revision == third


async def test_every_commit_that_changes_something_has_the_next_revision(store: Store) -> None:
    first = await store.commit([Put("a", b""), Put("b", b"")])
    assert await store.commit([Put("a", b"")]) == first + 1
    assert await store.commit([Delete("nothing")]) == first + 1
    assert await store.commit([]) == first + 1
    assert await store.commit([Delete("a")]) == first + 2


async def test_commits_of_one_moment_are_each_all_or_nothing(store: Store) -> None:
    """Whatever an engine does together, each is decided by itself, and those that meet on a key one after the other."""
    there = await store.commit([Put("taken", b"")])
    wishes = [
        store.commit([Put(f"c/{i}/a", b""), Put(f"c/{i}/b", b"")], [Expect("taken", 0 if i % 3 == 0 else there)])
        for i in range(90)
    ]
    swaps = [store.commit([Put("one", str(i).encode())], [Expect("one", 0)]) for i in range(30)]
    outcomes = await asyncio.gather(*wishes, *swaps, return_exceptions=True)
    assert [isinstance(outcome, Conflict) for outcome in outcomes[:90]] == [i % 3 == 0 for i in range(90)]
    won = [i for i, outcome in enumerate(outcomes[90:]) if not isinstance(outcome, BaseException)]
    record = await store.get("one")
    assert len(won) == 1 and record is not None and record.value == str(won[0]).encode()
    assert record.mod_revision == outcomes[90 + won[0]]
    for i in range(90):
        keys = await keys_of(store, f"c/{i}/")
        assert keys == ([] if i % 3 == 0 else [f"c/{i}/a", f"c/{i}/b"])
        for key in keys:
            kept = await store.get(key)
            assert kept is not None and kept.mod_revision == outcomes[i]


async def test_a_commit_of_many_writes_is_one(store: Store) -> None:
    before = (await store.page("")).revision
    revision = await store.commit([Put(f"m/{i:04}", b"x") for i in range(700)])
    (batch,) = await gather(store, "m/", before, revision)
    assert len(batch.changes) == 700
    with pytest.raises(Conflict):
        await store.commit([Delete(f"m/{i:04}") for i in range(700)], [Expect("m/0000", revision + 1)])
    assert len(await keys_of(store, "m/")) == 700
    assert await store.commit([Delete(f"m/{i:04}") for i in range(700)], [Expect("m/0000", revision)]) == revision + 1
    assert await keys_of(store, "m/") == []


async def test_a_key_may_be_written_once_in_a_commit(store: Store) -> None:
    with pytest.raises(Invalid):
        await store.commit([Put("a", b"1"), Delete("a")])
    assert await store.get("a") is None


async def test_a_value_has_a_bound(store: Store) -> None:
    await store.commit([Put("most", bytes(MAX_VALUE_BYTES))])
    with pytest.raises(Invalid, match="the most"):
        await store.commit([Put("more", bytes(MAX_VALUE_BYTES + 1))])


async def test_everything_is_there_after_opening_again(engine: Engine) -> None:
    async with engine.open() as store:
        await store.commit([Put("a", b"1"), Put("b", b"2")])
        revision = await store.commit([Delete("b")])
    async with engine.open() as store:
        page = await store.page("")
        assert [(record.key, record.value) for record in page.records] == [("a", b"1")]
        assert page.revision == revision
        assert await store.commit([Put("c", b"")]) == revision + 1


# Compare and swap.


async def test_an_expectation_holds_or_nothing_happens(store: Store) -> None:
    revision = await store.commit([Put("a", b"1")])
    for expect in (Expect("a", 0), Expect("a", revision + 1), Expect("missing", revision)):
        with pytest.raises(Conflict):
            await store.commit([Put("b", b""), Put("a", b"2")], [Expect("a", revision), expect])
    assert await keys_of(store) == ["a"]
    assert await store.commit([Put("a", b"2")], [Expect("a", revision), Expect("missing", 0)]) == revision + 1


async def test_of_many_that_swap_one_value_exactly_one_wins_each_round(store: Store) -> None:
    await store.commit([Put("counter", b"0")])

    async def increments(times: int) -> int:
        lost = 0
        for _ in range(times):
            while True:
                record = await store.get("counter")
                assert record is not None
                try:
                    await store.commit(
                        [Put("counter", str(int(record.value) + 1).encode())], [Expect("counter", record.mod_revision)]
                    )
                    break
                except Conflict:
                    lost += 1
        return lost

    lost = await asyncio.gather(*(increments(10) for _ in range(8)))
    record = await store.get("counter")
    assert record is not None and record.value == b"80"  # no increment lost, none twice
    assert sum(lost) > 0  # they did meet


# Lists.


async def test_a_list_is_in_key_order_and_keeps_to_its_prefix(store: Store) -> None:
    await store.commit([Put(key, b"") for key in ("b/2", "a/9", "b/1", "b", "c/1", "b/10")])
    assert await keys_of(store, "b/") == ["b/1", "b/10", "b/2"]
    assert await keys_of(store) == ["a/9", "b", "b/1", "b/10", "b/2", "c/1"]
    assert await keys_of(store, "d/") == []


async def test_pages_of_one_revision_do_not_see_what_comes_later(store: Store) -> None:
    await store.commit([Put(f"k/{i:02}", b"old") for i in range(10)])
    page = await store.page("k/", limit=3)
    seen = list(page.records)
    revision = page.revision
    await store.commit([Put("k/03", b"new"), Delete("k/04"), Put("k/055", b"new")])
    while page.more:
        page = await store.page("k/", after=seen[-1].key, limit=3, revision=revision)
        assert page.revision == revision
        seen += page.records
    assert [record.key for record in seen] == [f"k/{i:02}" for i in range(10)]
    assert {record.value for record in seen} == {b"old"}
    assert await keys_of(store, "k/") == ["k/00", "k/01", "k/02", "k/03", "k/05", "k/055"] + [
        f"k/{i:02}" for i in range(6, 10)
    ]


async def test_the_last_page_says_so(store: Store) -> None:
    await store.commit([Put(f"k/{i}", b"") for i in range(4)])
    assert (await store.page("k/", limit=2)).more
    assert not (await store.page("k/", after="k/1", limit=2)).more
    assert not (await store.page("k/", limit=4)).more


async def test_a_list_of_the_future_is_refused(store: Store) -> None:
    revision = await store.commit([Put("a", b"")])
    with pytest.raises(Compacted):
        await store.page("", revision=revision + 100)


# Watches.


async def test_a_watch_gives_a_commit_whole_and_only_its_prefix(store: Store) -> None:
    before = await store.commit([Put("a/0", b"")])
    one = await store.commit([Put("a/1", b"x"), Put("b/1", b""), Put("a/2", b"y")])
    await store.commit([Put("b/2", b"")])
    two = await store.commit([Delete("a/1")])
    assert await gather(store, "a/", before, two) == [
        Batch(one, (Change("a/1", b"x"), Change("a/2", b"y"))),
        Batch(two, (Change("a/1", None),)),
    ]


async def test_a_watch_tells_how_far_it_is_while_nothing_happens_under_its_prefix(store: Store) -> None:
    before = await store.commit([Put("a", b"")])
    async with asyncio.timeout(10), store.watch("a", after=before, progress_s=0.05) as batches:
        other = await store.commit([Put("b", b"")])
        async for batch in batches:
            assert batch.changes == ()
            if batch.revision == other:
                break


async def test_progress_comes_even_while_others_write_all_the_time(store: Store) -> None:
    before = await store.commit([Put("a", b"")])
    stop = asyncio.Event()

    async def write() -> None:
        while not stop.is_set():
            await store.commit([Put("b", b"")])

    writing = asyncio.create_task(write())
    try:
        async with asyncio.timeout(10), store.watch("a", after=before, progress_s=0.1) as batches:
            batch = await anext(batches)
            assert batch.changes == ()
            assert batch.revision >= before
    finally:
        stop.set()
        await writing


@pytest.mark.parametrize("slow", [False, True], ids=["fast reader", "slow reader"])
async def test_no_gap_and_no_duplicate_under_load(engine: Engine, store: Store, slow: bool) -> None:
    """Lists and watches while several write; replaying what the watch gave must make what the store has."""
    random_keys = random.Random(7)
    writers, commits = 4, 150

    async def write(writer: int) -> None:
        for i in range(commits):
            key = f"w/{random_keys.randrange(40):02}"
            if random_keys.random() < 0.3:
                await store.commit([Delete(key), Put(f"w/mark-{writer}", str(i).encode())])
            else:
                await store.commit([Put(key, f"{writer}/{i}".encode()), Put(f"w/mark-{writer}", str(i).encode())])

    await store.commit([Put("w/00", b"first")])
    page = await store.page("w/")
    mirror = {record.key: record.value for record in page.records}
    writing = asyncio.gather(*(write(writer) for writer in range(writers)))
    revisions: list[int] = []
    marks: list[bytes] = []
    async with asyncio.timeout(30), store.watch("w/", after=page.revision, progress_s=0.2) as batches:
        async for batch in batches:
            if batch.changes:
                revisions.append(batch.revision)
            for change in batch.changes:
                if change.value is None:
                    mirror.pop(change.key, None)
                else:
                    mirror[change.key] = change.value
                if change.key.startswith("w/mark-"):
                    assert change.value is not None
                    marks.append(change.key.encode() + change.value)
            if slow and len(revisions) == 20:
                await writing  # far more than is kept for a watch in memory
            if writing.done() and not batch.changes:
                break
    await writing
    assert revisions == sorted(set(revisions))  # in order, none twice
    if not engine.shares_revisions:
        assert revisions == list(range(page.revision + 1, page.revision + 1 + writers * commits))  # each once
    assert len(set(marks)) == len(marks) == writers * commits
    assert mirror == {record.key: record.value for record in (await store.page("w/")).records}


async def test_a_watch_begins_in_the_past_as_well(store: Store) -> None:
    before = (await store.page("")).revision
    last = before
    for i in range(700):  # more than an engine reads at once
        last = await store.commit([Put("k", str(i).encode())])
    batches = await gather(store, "k", before, last)
    assert [batch.changes[0].value for batch in batches] == [str(i).encode() for i in range(700)]


async def test_a_watch_of_the_future_is_refused(store: Store) -> None:
    revision = await store.commit([Put("a", b"")])
    with pytest.raises(Compacted):
        async with store.watch("", after=revision + 100):
            pass


# Compaction.


async def test_compaction_forgets_the_past_and_keeps_the_present(store: Store) -> None:
    old = await store.commit([Put("a", b"1"), Put("b", b"1"), Put("c", b"1")])
    await store.commit([Put("a", b"2")])
    kept = await store.commit([Delete("b")])
    await store.compact(kept)
    with pytest.raises(Compacted):
        await store.page("", revision=old)
    with pytest.raises(Compacted):
        async with store.watch("", after=old):
            pass
    page = await store.page("", revision=kept)
    assert [(record.key, record.value, record.mod_revision) for record in page.records] == [
        ("a", b"2", old + 1),
        ("c", b"1", old),
    ]
    last = await store.commit([Put("a", b"3")])
    assert [batch.revision for batch in await gather(store, "", kept, last)] == [last]


async def test_compacting_backwards_or_into_the_future_harms_nothing(store: Store) -> None:
    first = await store.commit([Put("a", b"1")])
    last = await store.commit([Put("a", b"2")])
    await store.compact(last)
    await store.compact(first)
    with pytest.raises(Compacted):
        await store.page("", revision=first)
    assert await keys_of(store, "", revision=last) == ["a"]


async def test_what_was_deleted_stays_deleted_through_compaction(engine: Engine) -> None:
    async with engine.open() as store:
        for value in (b"1", b"2", b"3"):
            await store.commit([Put("a", value)])
        await store.commit([Delete("a")])
        last = await store.commit([Put("b", b"")])
        await store.compact(last)
        assert await keys_of(store) == ["b"]
    async with engine.open() as store:
        assert await keys_of(store) == ["b"]
        with pytest.raises(Compacted):
            async with store.watch("", after=last - 1):
                pass


async def test_paging_on_after_compaction_is_refused_not_wrong(store: Store) -> None:
    await store.commit([Put(f"k/{i}", b"") for i in range(6)])
    page = await store.page("k/", limit=2)
    await store.commit([Delete("k/4")])
    await store.compact(await store.commit([Put("x", b"")]))
    with pytest.raises(Compacted):
        await store.page("k/", after=page.records[-1].key, limit=2, revision=page.revision)


# Leases.


async def test_a_lease_that_is_not_kept_takes_its_keys_with_it(store: Store) -> None:
    lease = await store.grant_lease(1)
    before = await store.commit([Put("alive", b"", lease), Put("stays", b"")])
    record = await store.get("alive")
    assert record is not None and record.lease == lease
    (batch,) = await gather(store, "", before, before + 1)
    assert batch.changes == (Change("alive", None),)
    assert await keys_of(store) == ["stays"]
    with pytest.raises(NotFound):
        await store.keep_lease(lease)
    with pytest.raises(NotFound):
        await store.commit([Put("alive", b"", lease)])
    assert await store.get("alive") is None


async def test_a_kept_lease_holds(store: Store) -> None:
    lease = await store.grant_lease(1)
    await store.commit([Put("alive", b"", lease)])
    loop = asyncio.get_running_loop()
    end_s = loop.time() + 1.6
    while loop.time() < end_s:
        await store.keep_lease(lease)
        await asyncio.sleep(0.1)
    assert await store.get("alive") is not None


async def test_a_revoked_lease_ends_at_once_and_only_what_it_still_holds(store: Store) -> None:
    lease = await store.grant_lease(60)
    await store.commit([Put("a", b"", lease), Put("b", b"", lease), Put("c", b"", lease)])
    await store.commit([Put("b", b"mine now")])  # put without the lease: no longer held by it
    await store.revoke_lease(lease)
    await store.revoke_lease(lease)
    assert await keys_of(store) == ["b"]


async def test_leases_survive_opening_again(engine: Engine) -> None:
    async with engine.open() as store:
        lease = await store.grant_lease(1)
        await store.commit([Put("alive", b"", lease)])
    async with engine.open() as store:
        await store.keep_lease(lease)
        revision = (await store.page("")).revision
        await gather(store, "", revision, revision + 1)
        assert await keys_of(store) == []
