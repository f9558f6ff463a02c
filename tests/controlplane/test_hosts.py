"""Hosts: registration, leases, what becomes of a lost host's sandboxes, and what a host may not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, images_pb2, sandboxes_pb2
from tests.controlplane.conftest import Client, Configured, Plane, planed
from tests.controlplane.fakehost import FakeHost, image_of

pb = sandboxes_pb2


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def until(condition: Callable[[], Awaitable[bool]], plane: Plane, deadline_s: float = 10.0) -> None:
    """Asks again after every change of the store."""
    async with asyncio.timeout(deadline_s):
        while True:
            moved = plane.parts.view.moved
            if await condition():
                return
            await moved.wait()


async def phase_of(client: Client, name: str) -> str:
    return pb.Phase.Name((await client.get(name)).status.phase)


async def is_gone(client: Client, name: str) -> bool:
    try:
        await client.get(name)
    except grpc.aio.AioRpcError as error:
        assert parse_error(error).condition is Condition.NOT_FOUND
        return True
    return False


async def events_of(client: Client, subject: str) -> list[str]:
    call: Any = client.sandboxes.WatchEvents(pb.WatchEventsRequest(subject=subject), timeout=10)
    return [event.reason async for event in call]


@pytest.fixture
async def brief(configured: Configured, certificates: Any) -> AsyncIterator[Plane]:
    """A control plane whose hosts are LOST after 1 s, and given up at once then."""
    async with planed(configured(lease_s=1, lost_grace_s=0), certificates) as plane:
        yield plane


async def lose(plane: Plane, host: str) -> None:
    """Ends a host's lease, as if it had run out."""
    record = await plane.parts.store.get(f"alive/{host}")
    assert record is not None
    await plane.parts.store.revoke_lease(record.lease)


@asynccontextmanager
async def one_running(plane: Plane, **how: Any) -> AsyncIterator[tuple[Client, FakeHost, pb.Sandbox]]:
    """A sandbox that runs on the one host, whose heartbeats go on in the block."""
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box", **how)
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, pb.RUNNING)
    yield client, host, box


async def test_a_registered_host_is_seen_with_what_it_has(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    host.limits = {"pids": 900, "pmem_slots": 32}
    assert await host.report() == 15
    seen = await client.hosts.GetHost(hosts_pb2.GetHostRequest(name="h1"))
    wanted = host.description()
    assert [(one.name, one.left, one.of_a_guest) for one in seen.limits] == [
        ("pids", 900, False), ("pmem_slots", 32, True),
    ]  # fmt: skip
    assert (seen.state, seen.capacity, seen.runtime_address) == (hosts_pb2.READY, wanted.capacity, host.address)
    assert (seen.accel, list(seen.classes), list(seen.image_digests)) == (
        "tcg",
        [pb.GUEST_KERNEL],
        list(wanted.image_digests),
    )
    assert seen.last_seen.seconds > 0
    assert (await refused(client.hosts.GetHost(hosts_pb2.GetHostRequest(name="h9")))).reason == "HostNotFound"


async def test_a_guest_of_more_layers_than_its_host_has_slots_is_refused_by_name(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    layers = len(image_of().layers)
    host.limits = {"pmem_slots": layers - 1}
    await host.report()
    failure = await refused(client.create("wide"))
    assert (failure.condition, failure.detail("hosts_ShortOfPmemSlots")) == (Condition.EXHAUSTED, "1")
    host.limits = {"pmem_slots": layers, "pids": 6}  # a guest takes one more, for its vCPU
    await host.report()
    failure = await refused(client.create("many"))
    assert (failure.condition, failure.detail("hosts_ShortOfPids")) == (Condition.EXHAUSTED, "1")
    host.limits = {"pmem_slots": layers, "pids": 7}
    await host.report()
    assert (await client.create("fits")).assignment.host == "h1"


async def test_hosts_are_listed_in_pages(plane: Plane) -> None:
    client = await plane.client()
    for name in ("h3", "h1", "h2"):
        await plane.host(name)
    page = await client.hosts.ListHosts(hosts_pb2.ListHostsRequest(page_size=2))
    assert [host.name for host in page.hosts] == ["h1", "h2"]
    rest = await client.hosts.ListHosts(hosts_pb2.ListHostsRequest(page_token=page.next_page_token))
    assert [host.name for host in rest.hosts] == ["h3"]
    assert rest.next_page_token == ""


async def test_a_host_that_is_silent_is_lost_and_its_sandboxes_fail(brief: Plane) -> None:
    async with one_running(brief) as (client, host, box):
        # No more heartbeats from here on: the lease of 1 s runs out by itself.
        await until(lambda: _is(phase_of(client, "box"), "FAILED"), brief)
        status = (await client.get("box")).status
        assert status.reason == "HostLost"
        assert "h1" in status.message
        seen = await client.hosts.GetHost(hosts_pb2.GetHostRequest(name="h1"))
        assert seen.state == hosts_pb2.LOST
        assert "HostLost" in await events_of(client, "h1")
        assert "HostLost" in await events_of(client, "box")
        # It returns: it is told to let go, and what it still says is refused.
        await host.report()
        await host.until(lambda: box.uid not in host.assigned)
        failure = await refused(host.tell(box.uid, pb.RUNNING, epoch=box.assignment.epoch))
        assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "StaleEpoch")
        assert await phase_of(client, "box") == "FAILED"
        again = await client.hosts.GetHost(hosts_pb2.GetHostRequest(name="h1"))
        assert again.state == hosts_pb2.READY


async def _is(value: Awaitable[str], wanted: str) -> bool:
    return await value == wanted


async def test_a_host_that_returns_in_time_keeps_its_sandboxes(configured: Configured, certificates: Any) -> None:
    async with planed(configured(lost_grace_s=30), certificates) as plane, one_running(plane) as (client, host, box):
        await lose(plane, "h1")
        await until(lambda: _has_event(client, "h1", "HostLost"), plane)
        assert await phase_of(client, "box") == "RUNNING"
        await host.report()
        await host.tell(box.uid, pb.RUNNING, host_pid=5)
        assert (await client.get("box")).status.host_pid == 5
        assert (await events_of(client, "h1"))[-1] == "HostReady"


async def _has_event(client: Client, subject: str, reason: str) -> bool:
    return reason in await events_of(client, subject)


async def test_what_was_to_be_removed_on_exit_is_removed_with_its_host(brief: Plane) -> None:
    async with one_running(brief, remove_on_exit=True) as (client, _, _):
        await lose(brief, "h1")
        await until(lambda: is_gone(client, "box"), brief)


async def test_an_ended_sandbox_of_a_lost_host_is_removed_at_once(configured: Configured, certificates: Any) -> None:
    async with planed(configured(lost_grace_s=3600), certificates) as plane, one_running(plane) as (client, host, box):
        await host.tell(box.uid, pb.EXITED, exit_code=0)
        await lose(plane, "h1")
        await until(lambda: _true("h1" not in plane.parts.view.alive), plane)
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box"))
        assert await is_gone(client, "box")
        assert "Removed" in await events_of(client, "box")


async def _true(value: bool) -> bool:
    return value


async def test_a_removal_that_the_host_did_not_live_to_do_is_finished(
    configured: Configured, certificates: Any
) -> None:
    """Ended, asked to be removed, then the host is lost before it let go."""
    async with planed(configured(lost_grace_s=3600), certificates) as plane, one_running(plane) as (client, host, box):
        await host.tell(box.uid, pb.EXITED, exit_code=0)
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box"))
        assert not await is_gone(client, "box")
        await lose(plane, "h1")
        await until(lambda: is_gone(client, "box"), plane)


async def test_a_live_sandbox_of_a_lost_host_is_removed_by_force(brief: Plane) -> None:
    async with one_running(brief) as (client, _, _):
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box", force=True))
        await lose(brief, "h1")
        await until(lambda: is_gone(client, "box"), brief)


async def test_two_hosts_share_the_work_and_only_the_ready_one_gets_more(plane: Plane) -> None:
    one, client = await plane.host("h1"), await plane.client()
    await client.import_image()
    two = await plane.host("h2")
    await import_to(client, "h2")
    big = [await client.create(f"b{i}", memory_mib=3000) for i in range(3)]
    assert {box.assignment.host for box in big} == {"h1", "h2"}
    await lose(plane, "h2")
    await until(lambda: _true("h2" not in plane.parts.view.alive), plane)
    assert (await client.create("small", memory_mib=16)).assignment.host == "h1"
    waiting = await client.create("later", memory_mib=2000)  # h1 is full; h2 could take it when it returns
    assert waiting.status.phase == pb.PENDING
    await two.report()
    await two.until(lambda: waiting.uid in two.assigned)
    assert waiting.uid not in one.assigned


async def import_to(client: Client, host: str) -> None:
    start = images_pb2.ImportImageRequest.Start(name="base", host=host)
    messages = [images_pb2.ImportImageRequest(start=start), images_pb2.ImportImageRequest(chunk=b"x")]
    async for _ in client.images.ImportImage(iter(messages), timeout=10):
        pass


async def test_a_host_speaks_for_itself_only(plane: Plane) -> None:
    one, two = await plane.host("h1"), await plane.host("h2")
    pretends = two.description()
    pretends.name = "h1"
    calls: list[Any] = [
        two.sync.ReportHost(hosts_pb2.ReportHostRequest(host=pretends)),
        two.sync.ReportSandbox(hosts_pb2.ReportSandboxRequest(host="h1", uid="x")),
        two.sync.RecordEvent(hosts_pb2.RecordEventRequest(event=pb.Event(kind="host", subject="h1", host="h1"))),
        two.sync.WatchAssignments(hosts_pb2.WatchAssignmentsRequest(host="h1")).read(),
    ]
    for call in calls:
        failure = await refused(call)
        assert (failure.condition, failure.reason) == (Condition.DENIED, "WrongHost")
    await one.report()


async def test_users_may_not_speak_for_hosts_and_tenants_do_not_see_them(plane: Plane) -> None:
    host = await plane.host()
    for role, name in ((Role.OPERATOR, "op"), (Role.TENANT, "h1"), (Role.CONTROLPLANE, "cp")):
        client = await plane.client(role, name)
        sync: Any = hosts_pb2_grpc.HostSyncStub(client.channel)
        failure = await refused(sync.ReportHost(hosts_pb2.ReportHostRequest(host=host.description())))
        assert (failure.condition, failure.reason) == (Condition.DENIED, "WrongRole")
    acme = await plane.client(Role.TENANT, "acme")
    failure = await refused(acme.hosts.ListHosts(hosts_pb2.ListHostsRequest()))
    assert failure.condition is Condition.DENIED


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("host.runtime_address", {"runtime_address": "nowhere"}),
        ("host.image_digests", {"image_digests": ["md5:1"]}),
        ("host.classes", {"classes": [77]}),
        ("host.limits", {"limits": {"Not a name": 1}}),
    ],
)
async def test_a_host_that_describes_itself_wrong_is_told_how(plane: Plane, field: str, change: dict[str, Any]) -> None:
    host = await plane.host()
    host.limits = change.pop("limits", {})
    wrong = host.description()
    for name, value in change.items():
        if isinstance(value, list):
            getattr(wrong, name)[:] = value
        else:
            setattr(wrong, name, value)
    failure = await refused(host.sync.ReportHost(hosts_pb2.ReportHostRequest(host=wrong)))
    assert failure.condition is Condition.INVALID
    assert [problem.field for problem in failure.fields] == [field]
