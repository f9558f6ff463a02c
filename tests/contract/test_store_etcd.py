"""What only the etcd engine promises: it outlives restarts, pauses, compactions and partitions of real members, never
in silence and never by repeating a commit; it speaks TLS and authenticates; and its pure parts."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from controlplane.errors import Compacted, NotFound, StoreError
from controlplane.store.contract import Batch, Delete, Expect, Put, Store, Write
from controlplane.store.etcd import open_etcd
from controlplane.store.etcdcommits import GROUP_COMMITS, Job, take_group
from controlplane.store.etcdlink import EtcdAccess, EtcdLink, Verdict, backoff_s, judge
from controlplane.store.etcdproto import load
from tests.contract.engines import etcd_access
from tests.etcdserver import Member, cluster
from tests.servercert import issue_server
from tests.tcpproxy import proxied


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Member]:
    with cluster(tmp_path / "etcd") as (member,):
        yield member


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Member]]:
    with cluster(tmp_path / "etcd", 3) as members:
        yield members


def access_of(*members: Member) -> EtcdAccess:
    return EtcdAccess(tuple(member.client for member in members), prefix="t/")


class Seen:
    """Follows a prefix in a task: what came, and how it ended."""

    def __init__(self, store: Store, after: int) -> None:
        self._store, self._after = store, after
        self.batches: list[Batch] = []
        self.error: Exception | None = None
        self.entered = asyncio.Event()
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        try:
            async with self._store.watch("", after=self._after, progress_s=0.5) as batches:
                self.entered.set()
                async for batch in batches:
                    if batch.changes:
                        self.batches.append(batch)
                    async with self._moved:
                        self._moved.notify_all()
        except (Compacted, StoreError) as error:
            self.error = error
            async with self._moved:
                self._moved.notify_all()

    @property
    def keys(self) -> list[str]:
        return [change.key for batch in self.batches for change in batch.changes]

    async def until(self, condition: Callable[[], bool], deadline_s: float = 60) -> None:
        async with asyncio.timeout(deadline_s), self._moved:
            await self._moved.wait_for(condition)


@contextlib.asynccontextmanager
async def seeing(store: Store) -> AsyncIterator[Seen]:
    seen = Seen(store, (await store.page("")).revision)
    task = asyncio.create_task(seen.run())
    try:
        async with asyncio.timeout(60):
            await seen.entered.wait()
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def insisted(work: Callable[[], Awaitable[int]], deadline_s: float = 60) -> int:
    """Repeats what fails with StoreError, as a client would."""
    async with asyncio.timeout(deadline_s):
        while True:
            try:
                return await work()
            except StoreError:
                await asyncio.sleep(0.05)


# Members that fail.


async def test_a_restart_of_etcd_breaks_nothing_off_and_nothing_spins(
    one: Member, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_etcd(access_of(one)) as store, seeing(store) as seen:
        await store.commit([Put("before", b"")])
        one.kill()
        with pytest.raises(StoreError, match="etcd at 127"):
            await store.commit([Put("lost", b"")])
        refused = sum("broke off" in record.message for record in caplog.records)
        assert refused < 40  # in the 5 s of the deadline above: backs off
        one.start()
        await insisted(lambda: store.commit([Put("after", b"")]))
        await seen.until(lambda: "after" in seen.keys)
        assert seen.keys == ["before", "after"]
        assert seen.error is None


@pytest.mark.parametrize("fault", ["killed", "paused"])
async def test_a_member_that_is_killed_or_paused_is_left_for_another(three: list[Member], fault: str) -> None:
    loop = asyncio.get_running_loop()
    async with open_etcd(access_of(*three)) as store, seeing(store) as seen:
        acknowledged = []
        await store.commit([Put("n/first", b"")])
        first = next(member for member in three if member.client == store._link.where)
        first.kill() if fault == "killed" else first.pause()
        begun_s = loop.time()
        for i in range(20):
            try:
                await store.commit([Put(f"n/{i:02}", b"")], [Expect(f"n/{i:02}", 0)])
                acknowledged.append(f"n/{i:02}")
            except StoreError as error:  # it was under way: its outcome is not known
                assert "not known" in str(error) or "no answer" in str(error)
        assert len(acknowledged) >= 18
        assert loop.time() - begun_s < 30  # far below 20 deadlines
        assert store._link.where != first.client
        await seen.until(lambda: acknowledged[-1] in seen.keys)
        there = [record.key for record in (await store.page("n/")).records]
        assert set(acknowledged) <= set(there)
        assert sorted(seen.keys) == there  # each once
        if fault == "paused":
            first.resume()


async def test_a_call_that_grpc_cuts_off_is_a_failed_one_and_cancels_nobody(
    one: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpc.aio raises CancelledError in a task that nobody cancelled, when it gives up the connection of its call."""
    async with open_etcd(access_of(one)) as store:
        await store.commit([Put("k", b"v")])
        member, cuts = store._link._members[0], [1]
        real = member.method

        def method(service: str, name: str) -> Any:
            async def cut(*_: Any, **__: Any) -> Any:
                raise asyncio.CancelledError

            return cut if name in ("Range", "Txn") and cuts and cuts.pop() else real(service, name)

        monkeypatch.setattr(member, "method", method)
        record = await store.get("k")
        assert record is not None and record.value == b"v" and not cuts
        cuts.append(1)
        with pytest.raises(StoreError, match="not known"):
            await store.commit([Put("k", b"w")])


async def test_without_quorum_nothing_is_written_and_nothing_twice_when_it_is_back(three: list[Member]) -> None:
    async with open_etcd(replace(access_of(*three), deadline_s=2.0)) as store, seeing(store) as seen:
        await store.commit([Put("ours", b"0")])
        three[1].kill()
        three[2].kill()
        outcomes = await asyncio.gather(
            *(store.commit([Put(f"q/{i}", b"")], [Expect(f"q/{i}", 0)]) for i in range(5)), return_exceptions=True
        )
        assert all(isinstance(outcome, StoreError) for outcome in outcomes), outcomes
        with pytest.raises(StoreError):
            await store.get("ours")  # what a minority says may be old
        three[1].start()
        three[2].start()
        last = await insisted(lambda: store.commit([Put("last", b"")]))
        await seen.until(lambda: "last" in seen.keys)
        page = await store.page("q/", revision=last)
        assert all(record.create_revision == record.mod_revision for record in page.records)  # no commit twice
        assert sorted(key for key in seen.keys if key.startswith("q/")) == [record.key for record in page.records]


async def test_a_stream_that_is_cut_off_fails_and_does_not_end_its_owner(one: Member) -> None:
    """grpc.aio raises CancelledError then, and a task group takes a task that ends by it for one that is done."""
    async with open_etcd(access_of(one)) as store:

        async def cut_off() -> None:
            async with store._link.stream("Lease", "LeaseKeepAlive") as (call, _):
                call.cancel()
                await call.read()

        owner = asyncio.create_task(cut_off())
        await asyncio.wait({owner})
        assert not owner.cancelled()
        with pytest.raises(StoreError, match="cut the stream off"):
            await owner


async def test_a_lease_that_etcd_let_run_out_is_told_to_whoever_keeps_it(one: Member) -> None:
    async with open_etcd(access_of(one)) as store, seeing(store) as seen:
        lease = await store.grant_lease(2)
        await store.commit([Put("alive", b"", lease)])
        await store.keep_lease(lease)
        one.pause()
        with pytest.raises(StoreError):  # a deadline later, which is longer than the lease
            async with asyncio.timeout(60):
                while True:  # an answer may have been on its way
                    await store.keep_lease(lease)
        one.resume()
        async with asyncio.timeout(60):
            while True:
                try:
                    await store.keep_lease(lease)
                    await asyncio.sleep(0.05)
                except StoreError:
                    continue
                except NotFound:
                    break
        await seen.until(lambda: len(seen.batches) == 2)
        assert seen.batches[-1].changes[0].value is None  # its key went with it


# Partitions.


async def test_a_partition_that_heals_loses_nothing(one: Member) -> None:
    async with (
        proxied(one.client) as proxy,
        open_etcd(EtcdAccess((proxy.address,), prefix="t/")) as cut_off,
        open_etcd(access_of(one)) as whole,
        seeing(cut_off) as seen,
    ):
        proxy.cut()
        await whole.commit([Put("during", b"")])
        proxy.heal()
        await whole.commit([Put("after", b"")])
        await seen.until(lambda: seen.keys == ["during", "after"])
        proxy.drop()
        await whole.commit([Put("later", b"")])
        await seen.until(lambda: seen.keys == ["during", "after", "later"])


async def test_a_connection_that_has_gone_mute_is_not_trusted(one: Member) -> None:
    """The worst partition: nobody closes anything, and what was open never speaks again."""
    access = replace(EtcdAccess(("",), prefix="t/"), deadline_s=2.0)
    async with (
        proxied(one.client) as proxy,
        open_etcd(replace(access, endpoints=(proxy.address,))) as cut_off,
        open_etcd(access_of(one)) as whole,
        seeing(cut_off) as seen,
    ):
        await whole.commit([Put("before", b"")])
        await seen.until(lambda: seen.keys == ["before"])
        proxy.cut()
        proxy.heal(forget=True)
        await whole.commit([Put("after", b"")])
        await seen.until(lambda: seen.keys == ["before", "after"])
        assert proxy.connections < 10


async def test_a_watch_that_falls_behind_a_compaction_says_so_and_the_next_one_works(one: Member) -> None:
    async with (
        proxied(one.client) as proxy,
        open_etcd(EtcdAccess((proxy.address,), prefix="t/")) as cut_off,
        open_etcd(access_of(one)) as whole,
        seeing(cut_off) as seen,
    ):
        proxy.cut()
        proxy.drop()
        for i in range(3):
            last = await whole.commit([Put("k", str(i).encode())])
        await whole.compact(last)
        proxy.heal()
        await seen.until(lambda: seen.error is not None)
        assert isinstance(seen.error, Compacted)
        async with seeing(cut_off) as again:
            await whole.commit([Put("k", b"new")])
            await again.until(lambda: again.keys == ["k"])


async def test_a_watch_from_before_what_is_kept_reads_it_from_etcd() -> None:
    access = etcd_access()
    async with open_etcd(access) as early:
        before = (await early.page("")).revision
        for i in range(30):
            await early.commit([Put(f"k/{i:02}", b"")])
    async with open_etcd(access) as late, late.watch("k/", after=before, progress_s=0.2) as batches:
        assert before < late._feed.floor
        seen: list[str] = []
        async with asyncio.timeout(60):
            async for batch in batches:
                seen += [change.key for change in batch.changes]
                if len(seen) == 30:
                    break
        await late.commit([Put("k/30", b"")])
        async with asyncio.timeout(60):
            async for batch in batches:
                seen += [change.key for change in batch.changes]
                if len(seen) == 31:
                    break
        assert seen == [f"k/{i:02}" for i in range(31)]


# The door.


async def test_tls_and_authentication(tmp_path: Path) -> None:
    tls = issue_server(tmp_path / "tls")
    flags = ["--cert-file", str(tls.cert), "--key-file", str(tls.key)]
    with cluster(tmp_path / "etcd", 1, *flags, scheme="https") as (member,):
        plain = EtcdAccess((member.client,), prefix="t/", deadline_s=10.0)
        open_door = replace(plain, ca=tls.ca)
        async with open_etcd(open_door) as store:
            await enable_auth(store._link, b"t/")
        with pytest.raises(StoreError, match="user name is empty"):
            async with open_etcd(open_door):
                pass
        with pytest.raises(StoreError, match="check etcd_user"):
            async with open_etcd(replace(open_door, user="sandloom", password="wrong")):
                pass
        async with open_etcd(replace(open_door, user="sandloom", password="secret")) as store, seeing(store) as seen:
            await store.commit([Put("a", b"1")])
            lease = await store.grant_lease(30)
            await store.commit([Put("b", b"", lease)])
            await store.keep_lease(lease)
            store._link._token = "stale"  # as after a restart of etcd, which forgets its tokens
            await store.commit([Put("c", b"")])
            await seen.until(lambda: seen.keys == ["a", "b", "c"])
        with pytest.raises(StoreError, match="permission denied"):
            async with open_etcd(replace(open_door, user="sandloom", password="secret", prefix="other/")):
                pass
        with pytest.raises(StoreError):
            async with open_etcd(replace(plain, deadline_s=1.0)):
                pass


async def enable_auth(link: EtcdLink, prefix: bytes) -> None:
    """A user `sandloom` with a role for one prefix, and root, without whom etcd does not enable it."""
    proto = link.proto
    end = prefix[:-1] + bytes([prefix[-1] + 1])
    permission = proto.AuthRoleGrantPermissionRequest(name="sandloom")
    permission.perm.permType, permission.perm.key, permission.perm.range_end = 2, prefix, end
    for name, request in (
        ("UserAdd", proto.AuthUserAddRequest(name="root", password="root")),
        ("RoleAdd", proto.AuthRoleAddRequest(name="root")),
        ("UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root")),
        ("UserAdd", proto.AuthUserAddRequest(name="sandloom", password="secret")),
        ("RoleAdd", proto.AuthRoleAddRequest(name="sandloom")),
        ("RoleGrantPermission", permission),
        ("UserGrantRole", proto.AuthUserGrantRoleRequest(user="sandloom", role="sandloom")),
        ("AuthEnable", proto.AuthEnableRequest()),
    ):
        await link.call("Auth", name, request, safe=True)


async def test_nobody_there_is_an_error_that_names_the_endpoint(tmp_path: Path) -> None:
    access = EtcdAccess(("127.0.0.1:1", "127.0.0.1:2"), deadline_s=1.0)
    with pytest.raises(StoreError, match=r"etcd at 127\.0\.0\.1:[12]"):
        async with open_etcd(access):
            pass


async def test_a_store_may_be_opened_before_its_etcd_runs(one: Member) -> None:
    one.kill()
    opened = asyncio.ensure_future(revision_of(replace(access_of(one), deadline_s=0.5)))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.5):  # some of its tries
            await asyncio.shield(opened)
    assert not opened.done()
    one.start()
    async with asyncio.timeout(60):
        assert await opened > 0


async def revision_of(access: EtcdAccess) -> int:
    async with open_etcd(access, patience_s=60) as store:
        return store._feed.cursor


async def test_a_closed_store_says_so() -> None:
    async with open_etcd(etcd_access()) as store:
        pass
    with pytest.raises(StoreError, match="closed"):
        await store.commit([Put("a", b"")])


# The pure parts.


def test_the_package_is_read_and_never_imported() -> None:
    proto = load()
    request = proto.TxnRequest(success=[proto.RequestOp(request_put=proto.PutRequest(key=b"k"))])
    assert proto.TxnRequest.FromString(request.SerializeToString()) == request
    assert set(proto.stubs) >= {"KVStub", "WatchStub", "LeaseStub", "AuthStub"}
    assert "etcd3" not in sys.modules
    with pytest.raises(AttributeError, match="Nothing"):
        _ = proto.Nothing


@pytest.mark.parametrize(
    ("code", "details", "verdict"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Verdict.UNDONE),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader", Verdict.UNDONE),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed", Verdict.UNSURE),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Verdict.UNSURE),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out", Verdict.UNSURE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", Verdict.UNSURE),
        (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", Verdict.STRANGER),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", Verdict.STRANGER),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Verdict.UNDONE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Verdict.REFUSED),
        (grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Verdict.REFUSED),
        (grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", Verdict.REFUSED),
    ],
)
def test_what_a_status_means(code: grpc.StatusCode, details: str, verdict: Verdict) -> None:
    assert judge(code, details) is verdict


def test_a_backoff_grows_and_is_bounded() -> None:
    assert [round(backoff_s(rounds, 1.0), 2) for rounds in (0, 1, 2, 5, 50)] == [0.05, 0.1, 0.2, 1.0, 1.0]
    assert backoff_s(50, 0.0) == 0.5


def job(writes: str, reads: str = "", *, value: bytes = b"", lease: int = 0) -> Job:
    puts: tuple[Write, ...] = tuple(Put(key, value, lease) for key in writes)
    done: Any = None
    return Job(puts, tuple(Expect(key, 0) for key in reads), done)


def taken(*jobs: Job) -> list[list[str]]:
    """The groups that a queue of jobs becomes, each job by its written keys."""
    waiting = deque(jobs)
    groups = []
    while waiting:
        groups.append(["".join(write.key for write in one.writes) for one in take_group(waiting)])
    return groups


def test_only_independent_commits_share_a_transaction_and_none_overtakes_another_of_its_keys() -> None:
    assert taken(job("a"), job("b"), job("c")) == [["a", "b", "c"]]
    assert taken(job("a"), job("a"), job("b")) == [["a", "b"], ["a"]]
    assert taken(job("a"), job("b", "a")) == [["a"], ["b"]]  # it reads what the first writes
    assert taken(job("b", "a"), job("a")) == [["b"], ["a"]]
    assert taken(job("b", "x"), job("c", "x")) == [["b", "c"]]  # both only read x
    assert taken(job("a"), job("ab"), job("b")) == [["a"], ["ab"], ["b"]]  # the last waits for the one before it


def test_leased_large_and_many_commits_are_kept_apart() -> None:
    assert taken(job("a", lease=7), job("b"), job("c", lease=7)) == [["a"], ["b"], ["c"]]
    big = bytes(700 << 10)
    assert taken(job("a", value=big), job("b", value=big), job("c")) == [["a"], ["b", "c"]]
    many = [Job((Delete(f"k{i}"),), (), None) for i in range(2 * GROUP_COMMITS + 1)]  # type: ignore[arg-type]
    assert [len(group) for group in taken(*many)] == [GROUP_COMMITS, GROUP_COMMITS, 1]
