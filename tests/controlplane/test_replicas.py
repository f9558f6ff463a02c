"""Several control planes on one real etcd: what any of them promises holds whichever is asked, and whichever dies."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane import keys
from controlplane.api.channel import connect
from controlplane.api.identity import Role
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import sandboxes_pb2, sandboxes_pb2_grpc
from controlplane.quotas import Quota
from controlplane.store.contract import Put, Store
from controlplane.store.etcd import open_etcd
from controlplane.store.etcdlink import EtcdAccess
from tests.contract.engines import shared_etcd
from tests.controlplane.conftest import Certificates, Client, Configured, Plane, client_at, planed
from tests.controlplane.fakehost import FakeHost, fake_host, keep_reporting
from tests.controlplane.test_server import process, written
from tests.etcdserver import Member, cluster

DEADLINE_S = 90.0


@dataclass(frozen=True)
class Pair:
    """Two control planes on one store; `first` leads."""

    first: Plane
    second: Plane


@pytest.fixture
async def pair(configured: Configured, certificates: Certificates) -> AsyncIterator[Pair]:
    quotas = (("small", Quota(sandboxes=5)),)
    changes = {"store": f"etcd:{shared_etcd()}", "etcd_prefix": f"{secrets.token_hex(6)}/", "quotas": quotas}
    one = configured(**changes, name="one", etcd_deadline_s=30)
    async with planed(one, certificates) as first:
        await until(lambda: first.parts.leadership.leads)
        async with planed(replace(one, name="two"), certificates) as second:
            yield Pair(first, second)


async def until(condition: Callable[[], bool]) -> None:
    """Looks until it holds: for what nothing tells of."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_phase(client: Client, name: str, phase: int) -> sandboxes_pb2.Sandbox:
    """The sandbox once it is in a phase."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await client.get(name)
            if found.status.phase == phase:
                return found
            await asyncio.sleep(0.02)


async def refused(call: Awaitable[object]) -> Condition:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value).condition


# Any replica.


async def test_any_replica_writes_and_reads_and_the_leader_places(pair: Pair) -> None:
    ours, theirs = await pair.first.client(), await pair.second.client()
    await pair.first.host("h1")
    await ours.import_image()
    watch: Any = theirs.sandboxes.WatchSandboxes(sandboxes_pb2.WatchSandboxesRequest(), timeout=DEADLINE_S)
    by_leader = await ours.create("led")
    assert by_leader.status.phase == sandboxes_pb2.SCHEDULED
    made = await theirs.create("followed")
    assert (made.status.phase, made.assignment.host) == (sandboxes_pb2.PENDING, "")
    assert "leading" in made.status.message
    placed = await until_phase(theirs, "followed", sandboxes_pb2.SCHEDULED)
    assert placed.assignment.host == "h1"
    assert (await ours.get("followed")).uid == placed.uid
    seen = {}
    async for event in watch:
        if event.kind != sandboxes_pb2.SandboxEvent.BOOKMARK:
            seen[event.sandbox.name] = event.sandbox.status.phase
        if seen == {"led": sandboxes_pb2.SCHEDULED, "followed": sandboxes_pb2.SCHEDULED}:
            break


async def test_a_host_may_be_on_any_replica(pair: Pair) -> None:
    ours = await pair.first.client()
    host = await pair.second.host("h1")
    await ours.import_image()
    made = await ours.create("box")
    await host.until(lambda: made.uid in host.assigned, DEADLINE_S)
    await host.tell(made.uid, sandboxes_pb2.RUNNING)
    assert (await ours.get("box")).status.phase == sandboxes_pb2.RUNNING


async def test_a_name_and_a_request_are_good_for_one_whoever_is_asked(pair: Pair) -> None:
    clients = [await pair.first.client(), await pair.second.client()]
    await pair.first.host("h1")
    await clients[0].import_image()
    outcomes = await asyncio.gather(*(clients[i % 2].create("same") for i in range(12)), return_exceptions=True)
    made = [outcome for outcome in outcomes if isinstance(outcome, sandboxes_pb2.Sandbox)]
    assert len(made) == 1
    lost = [parse_error(error).condition for error in outcomes if isinstance(error, grpc.aio.AioRpcError)]
    assert lost == [Condition.ALREADY_EXISTS] * 11
    again = await asyncio.gather(*(clients[i % 2].create("again", request_id="r-1") for i in range(12)))
    assert len({sandbox.uid for sandbox in again}) == 1


async def test_a_quota_holds_across_replicas(pair: Pair) -> None:
    await pair.first.host("h1")
    clients = [await plane.client(Role.TENANT, "small") for plane in (pair.first, pair.second)]
    await clients[0].import_image()
    outcomes = await asyncio.gather(*(clients[i % 2].create(f"box-{i}") for i in range(16)), return_exceptions=True)
    made = [outcome for outcome in outcomes if isinstance(outcome, sandboxes_pb2.Sandbox)]
    lost = {parse_error(error).condition for error in outcomes if isinstance(error, grpc.aio.AioRpcError)}
    assert (len(made), lost) == (5, {Condition.EXHAUSTED})
    assert await refused(clients[1].create("one-more")) is Condition.EXHAUSTED


async def test_a_follower_says_at_once_what_no_host_can_take(pair: Pair) -> None:
    theirs = await pair.second.client()
    await pair.first.host("h1")
    await theirs.import_image()
    assert await refused(theirs.create("huge", memory_mib=1 << 20)) is Condition.EXHAUSTED


async def test_what_others_keep_in_the_same_etcd_holds_nobody_up(pair: Pair) -> None:
    """Their changes make revisions that no change of ours tells of."""
    async with open_etcd(EtcdAccess((shared_etcd(),), prefix=f"{secrets.token_hex(6)}/", deadline_s=30)) as other:
        revision = await other.commit([Put("theirs", b"")])
    view = pair.second.parts.view
    async with asyncio.timeout(DEADLINE_S):
        await view.reached(revision)
    assert view.revision >= revision


# Leaders that die, on processes of their own.


@dataclass
class Replica:
    """A control plane process."""

    name: str
    process: asyncio.subprocess.Process
    client: Any
    address: str


@asynccontextmanager
async def replicas(
    folder: Path, certificates: Certificates, access: EtcdAccess, count: int, **extra: object
) -> AsyncIterator[list[Replica]]:
    """So many processes on one etcd, each with an operator's connection."""
    async with AsyncExitStack() as stack:
        found = []
        for i in range(count):
            place = folder / f"cp{i}"
            place.mkdir()
            values: dict[str, object] = {
                "store": f"etcd:{','.join(access.endpoints)}", "etcd_prefix": access.prefix, "name": f"cp{i}", **extra
            }  # fmt: skip
            config = written(place, certificates.of(Role.CONTROLPLANE, "cp"), **values)
            running, address = await stack.enter_async_context(process(config))
            channel = await stack.enter_async_context(connect(address, certificates.of(Role.OPERATOR, "op")))
            found.append(Replica(f"cp{i}", running, sandboxes_pb2_grpc.SandboxesStub(channel), address))
        yield found


async def leader_of(store: Store, *, but: str = "") -> str:
    """Who leads, once somebody else than `but` does."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            record = await store.get(keys.LEADER)
            if record is not None and record.value.decode() != but:
                return record.value.decode()
            await asyncio.sleep(0.02)


def wish(name: str) -> sandboxes_pb2.CreateSandboxRequest:
    spec = sandboxes_pb2.SandboxSpec(image="base", resources=sandboxes_pb2.Resources(memory_min_mib=16, cpu_milli=10))
    return sandboxes_pb2.CreateSandboxRequest(name=name, spec=spec, request_id=f"r-{name}")


async def insisted(clients: list[Any], name: str) -> sandboxes_pb2.Sandbox:
    """Creates it as a client does that retries at any replica with the same request_id."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for client in clients:
                try:
                    return await client.CreateSandbox(wish(name), timeout=3)  # type: ignore[no-any-return]
                except grpc.aio.AioRpcError as error:
                    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error
            await asyncio.sleep(0.05)


@asynccontextmanager
async def standing_host(address: str, certificates: Certificates) -> AsyncIterator[FakeHost]:
    """A host that reports for as long as the block runs, with an image that everybody may run."""
    async with fake_host("h1", address, certificates.of(Role.HOST, "h1")) as host:
        host.memory_mib = 1 << 20
        await host.report()
        task = asyncio.create_task(keep_reporting(host, 0.5))
        try:
            yield host
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def import_image(address: str, certificates: Certificates) -> None:
    async with connect(address, certificates.of(Role.OPERATOR, "op")) as channel:
        await client_at(channel).import_image()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused"])
async def test_a_leader_that_is_killed_or_paused_is_replaced_and_what_it_says_later_is_refused(
    tmp_path: Path, certificates: Certificates, fault: signal.Signals
) -> None:
    access = EtcdAccess((shared_etcd(),), prefix=f"{secrets.token_hex(6)}/", deadline_s=30)
    async with replicas(tmp_path, certificates, access, 2) as both, open_etcd(access) as store:
        old_name = await leader_of(store)
        old = next(replica for replica in both if replica.name == old_name)
        new = next(replica for replica in both if replica is not old)
        async with standing_host(new.address, certificates):
            await import_image(new.address, certificates)
            clients = [old.client, new.client]
            storm = [asyncio.create_task(insisted(clients, f"box-{i:03}")) for i in range(60)]
            await insisted([old.client], "before")
            old.process.send_signal(fault)  # in the middle of what it does
            assert await leader_of(store, but=old_name) == new.name
            after = await insisted([new.client], "after")
            if fault == signal.SIGSTOP:
                old.process.send_signal(signal.SIGCONT)  # it does not know yet that it was replaced
            made = [*await asyncio.gather(*storm), after]
            placed = await all_placed(new.client, {sandbox.name for sandbox in made} | {"before"})
        assert {sandbox.name: sandbox.uid for sandbox in made}.items() <= placed.items()
        events = [json.loads(record.value)["value"] for record in (await store.page(keys.EVENTS)).records]
        scheduled = [event["subject"] for event in events if event["reason"] == "Scheduled"]
        assert sorted(scheduled) == sorted(placed)  # each placed, and once


async def all_placed(client: Any, names: set[str]) -> dict[str, str]:
    """uid by name, once all of these are SCHEDULED and there are no others."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            request = sandboxes_pb2.ListSandboxesRequest(page_size=1000)
            listed = (await client.ListSandboxes(request, timeout=DEADLINE_S)).sandboxes
            assert {sandbox.name for sandbox in listed} <= names
            done = [sandbox for sandbox in listed if sandbox.status.phase == sandboxes_pb2.SCHEDULED]
            if len(done) == len(names):
                return {sandbox.name: sandbox.uid for sandbox in done}
            await asyncio.sleep(0.05)


# An etcd that fails.


async def test_without_quorum_sandboxes_run_on_creates_are_unavailable_and_none_is_made_twice(
    tmp_path: Path, certificates: Certificates, configured: Configured
) -> None:
    with cluster(tmp_path / "etcd", 3) as members:
        endpoints = ",".join(member.client for member in members)
        config = configured(store=f"etcd:{endpoints}", etcd_deadline_s=3, lease_s=3, lost_grace_s=30)
        async with planed(config, certificates) as plane:
            client = await plane.client()
            async with running_host(plane, client) as (host, uid):
                for member in members[1:]:
                    member.kill()
                wishes = [client.sandboxes.CreateSandbox(wish(f"box-{i}"), timeout=30) for i in range(8)]
                outcomes = await asyncio.gather(*wishes, return_exceptions=True)
                codes = {error.code() for error in outcomes if isinstance(error, grpc.aio.AioRpcError)}
                assert codes == {grpc.StatusCode.UNAVAILABLE}
                assert len([outcome for outcome in outcomes if isinstance(outcome, BaseException)]) == 8
                for member in members[1:]:
                    member.start()
                made = [await insisted([client.sandboxes], f"box-{i}") for i in range(8)]
                placed = await all_live(client, {sandbox.name for sandbox in made} | {"before"})
                assert placed == {sandbox.name: sandbox.uid for sandbox in made} | {"before": uid}
                await unharmed(client, host, uid)


async def test_an_etcd_that_stands_still_longer_than_any_lease_moves_nothing(
    tmp_path: Path, certificates: Certificates, configured: Configured
) -> None:
    """As a disk does that stalls: leases run out, and they are about who is alive, never about who owns what."""
    with cluster(tmp_path / "etcd") as (etcd,):
        config = configured(store=f"etcd:{etcd.client}", etcd_deadline_s=2, lease_s=2, lost_grace_s=8)
        async with planed(config, certificates) as plane:
            client = await plane.client()
            async with running_host(plane, client) as (host, uid):
                term = await term_of(plane)
                await stand_still(etcd, plane)
                await until(lambda: plane.parts.leadership.leads)  # it lost its lease, too, and leads anew
                assert await term_of(plane) > term
                await until(lambda: "h1" in plane.parts.view.alive)
                await insisted([client.sandboxes], "after")
                await unharmed(client, host, uid)


async def stand_still(etcd: Member, plane: Plane) -> None:
    """Stops etcd until every lease has run out by its clock, and seen to be."""
    etcd.pause()
    try:
        await until(lambda: not plane.parts.leadership.leads)
        enough_s = asyncio.get_running_loop().time() + 3
        await until(lambda: asyncio.get_running_loop().time() >= enough_s)
    finally:
        etcd.resume()


async def term_of(plane: Plane) -> int:
    record = await plane.parts.store.get(keys.LEADER)
    return record.mod_revision if record else 0


@asynccontextmanager
async def running_host(plane: Plane, client: Client) -> AsyncIterator[tuple[FakeHost, str]]:
    """A host that reports whatever happens, and runs the sandbox `before`; its uid."""
    host = await plane.host("h1")
    await client.import_image()
    made = await insisted([client.sandboxes], "before")
    await host.until(lambda: made.uid in host.assigned, DEADLINE_S)
    await host.tell(made.uid, sandboxes_pb2.RUNNING)

    async def report() -> None:
        while True:
            try:
                await host.report()
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.3)

    task = asyncio.create_task(report())
    try:
        yield host, made.uid
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def unharmed(client: Client, host: FakeHost, uid: str) -> None:
    """The sandbox runs where it ran, under the epoch it had, and its host was told nothing else."""
    before = await client.get("before")
    assert (before.uid, before.status.phase) == (uid, sandboxes_pb2.RUNNING)
    assert host.assigned[uid].assignment.epoch == before.assignment.epoch
    assert before.assignment.host == "h1"


async def all_live(client: Client, names: set[str]) -> dict[str, str]:
    listed = (await client.sandboxes.ListSandboxes(sandboxes_pb2.ListSandboxesRequest(), timeout=30)).sandboxes
    assert {sandbox.name for sandbox in listed} == names
    return {sandbox.name: sandbox.uid for sandbox in listed}
