"""What operators decide of hosts: the table, cordon, drain, removal, and what becomes of what a lost host had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from controlplane import membership
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import hosts_pb2, images_pb2, sandboxes_pb2
from controlplane.errors import Precondition
from controlplane.membership import TRANSITIONS, Member, Standing, admits, moved, plan_drain
from controlplane.model import (
    DesiredState,
    Phase,
    Resources,
    RestartPolicy,
    Sandbox,
    SandboxSpec,
    SandboxStatus,
)
from tests.controlplane.conftest import Client, Configured, Plane, planed
from tests.controlplane.fakehost import FakeHost, keep_reporting

pb = sandboxes_pb2


def test_every_standing_has_a_way_on_and_the_table_holds() -> None:
    assert set(TRANSITIONS) == set(Standing) and all(TRANSITIONS.values())
    for standing in Standing:
        for to in Standing:
            member = Member("h1", standing)
            if to is standing:
                assert moved(member, to, 5.0) is member
            elif to in TRANSITIONS[standing]:
                assert moved(member, to, 5.0) == Member("h1", to, since_s=5.0)
            else:
                with pytest.raises(Precondition):
                    moved(member, to, 5.0)


def test_only_a_present_certificate_speaks_for_a_host() -> None:
    assert admits(None, "a1") and admits(Member("h1"), "a1")
    assert admits(Member("h1", serials=("a1",)), "a1") and not admits(Member("h1", serials=("a1",)), "b2")
    assert not admits(Member("h1", Standing.REMOVED), "a1")


def box(name: str, **changes: Any) -> Sandbox:
    spec = SandboxSpec("i", Resources(1, 1, 1, 100), restart=RestartPolicy.ON_HOST_LOSS)
    made = Sandbox(name, name, "t", spec, 0.0, 1, host="h1", epoch=5, status=SandboxStatus(Phase.RUNNING))
    return replace(made, **changes)


def test_a_drain_moves_a_few_names_the_rest_and_waits_for_what_ends() -> None:
    never = replace(box("a").spec, restart=RestartPolicy.NEVER)
    there = [
        box("a", spec=never), box("b"), box("c"), box("d"), box("e", desired=DesiredState.STOPPED),
        box("f", status=SandboxStatus(Phase.EXITED)), box("g", spec=replace(box("g").spec, checkpoint="c1")),
    ]  # fmt: skip
    plan = plan_drain(there, 1, 2, lambda sandbox: sandbox.name != "b")
    assert [s.name for s in plan.move] == ["c"]  # one leaves already, and two at a time is the most
    assert [(b.sandbox.name, b.reason.partition(":")[0]) for b in plan.blockers] == [
        ("a", "its restart policy is never"), ("b", "no other host can take it now"),
        ("g", "it goes on from a checkpoint, which is on this host"),
    ]  # fmt: skip
    assert not plan.empty
    assert not plan_drain([], 1, 2, lambda _: True).empty and plan_drain([there[5]], 0, 2, lambda _: True).empty


# On a running control plane.


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def create(client: Client, name: str, *, restart: bool = True, **changes: Any) -> pb.Sandbox:
    spec = pb.SandboxSpec(
        image="base", resources=pb.Resources(memory_min_mib=64), process=pb.Process(argv=["sleep", "1"]), **changes
    )
    spec.restart = pb.RESTART_ON_HOST_LOSS if restart else pb.RESTART_NEVER
    return await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(name=name, spec=spec), timeout=60)


async def until(plane: Plane, condition: Any) -> Any:
    """What `condition` gives of the view, as soon as it is not None."""
    async with asyncio.timeout(60):
        return await plane.parts.view.until(condition)


def seen(plane: Plane, uid: str) -> Sandbox:
    return plane.parts.view.sandboxes[uid]


def placed_on(plane: Plane, uid: str, host: str) -> Any:
    return lambda: seen(plane, uid) if seen(plane, uid).host == host else None


async def two_hosts(plane: Plane) -> tuple[Client, FakeHost, FakeHost]:
    """Two hosts that hold the image."""
    client, one, two = await plane.client(), await plane.host("h1"), await plane.host("h2")
    for host in ("h1", "h2"):
        start = plane_import(host)
        async for _ in client.images.ImportImage(iter(start), timeout=60):
            pass
    return client, one, two


def plane_import(host: str) -> list[Any]:
    start = images_pb2.ImportImageRequest.Start(name="base", host=host)
    return [images_pb2.ImportImageRequest(start=start), images_pb2.ImportImageRequest(chunk=b"x")]


async def runs_on(host: FakeHost, box: pb.Sandbox) -> None:
    await host.until(lambda: box.uid in host.assigned, 60)
    await host.tell(box.uid, pb.RUNNING)


async def both_on(client: Client, here: FakeHost, there: FakeHost) -> tuple[pb.Sandbox, pb.Sandbox]:
    """A sandbox that begins anew and one that does not, both on one host."""
    await client.hosts.CordonHost(hosts_pb2.CordonHostRequest(name=there.name))
    kept, lost = await create(client, "kept"), await create(client, "lost", restart=False)
    await client.hosts.UncordonHost(hosts_pb2.UncordonHostRequest(name=there.name))
    assert kept.assignment.host == lost.assignment.host == here.name
    return kept, lost


def host_of(box: pb.Sandbox, *hosts: FakeHost) -> tuple[FakeHost, FakeHost]:
    """The one it is on, and the other."""
    one, two = hosts
    return (one, two) if box.assignment.host == one.name else (two, one)


async def test_a_cordoned_host_gets_nothing_new_and_keeps_what_it_has(plane: Plane) -> None:
    client, one, two = await two_hosts(plane)
    first = await create(client, "first")
    here, there = host_of(first, one, two)
    await runs_on(here, first)
    cordoned = await client.hosts.CordonHost(hosts_pb2.CordonHostRequest(name=here.name))
    assert cordoned.state == hosts_pb2.CORDONED
    for number in range(3):
        assert (await create(client, f"next-{number}")).assignment.host == there.name
    assert seen(plane, first.uid).host == here.name
    await here.report()  # no report takes the decision back
    assert (await client.hosts.GetHost(hosts_pb2.GetHostRequest(name=here.name))).state == hosts_pb2.CORDONED
    back = await client.hosts.UncordonHost(hosts_pb2.UncordonHostRequest(name=here.name))
    assert back.state == hosts_pb2.READY
    missing = client.hosts.CordonHost(hosts_pb2.CordonHostRequest(name="nowhere"))
    assert (await refused(missing)).condition is Condition.NOT_FOUND


async def test_a_drain_ends_a_sandbox_before_it_begins_elsewhere(plane: Plane) -> None:
    client, one, two = await two_hosts(plane)
    moving = await create(client, "moving")
    here, there = host_of(moving, one, two)
    await runs_on(here, moving)
    await client.hosts.DrainHost(hosts_pb2.DrainHostRequest(name=here.name))
    await here.until(lambda: here.assigned[moving.uid].desired_state == pb.DESIRED_STOPPED, 60)
    assert here.assigned[moving.uid].assignment.epoch == moving.assignment.epoch, "its old epoch is what it must end"
    assert (seen(plane, moving.uid).host, seen(plane, moving.uid).status.reason) == ("", "Moving")
    assert moving.uid not in there.assigned
    await here.tell(moving.uid, pb.STOPPING)  # taken, and not enough
    await here.tell(moving.uid, pb.EXITED, exit_code=0)
    moved_to = await until(plane, placed_on(plane, moving.uid, there.name))
    assert moved_to.epoch > moving.assignment.epoch and moved_to.desired is DesiredState.RUNNING
    await here.until(lambda: moving.uid not in here.assigned, 60)
    await runs_on(there, moving)
    member = await until(plane, lambda: _in(plane, here.name, Standing.DRAINED))
    assert not member.takes_new


def _in(plane: Plane, host: str, standing: Standing) -> Member | None:
    member = plane.parts.view.member(host)
    return member if member.standing is standing else None


async def test_what_cannot_be_moved_is_named_and_stopped_by_force_only(plane: Plane) -> None:
    client, one, two = await two_hosts(plane)
    stays = await create(client, "stays", restart=False)
    here, _ = host_of(stays, one, two)
    await runs_on(here, stays)
    drain = hosts_pb2.DrainHostRequest(name=here.name)
    answer = await client.hosts.DrainHost(drain)
    assert answer.state == hosts_pb2.DRAINING
    (blocker,) = answer.blockers
    assert (blocker.sandbox, blocker.uid) == ("stays", stays.uid) and "never" in blocker.reason
    assert seen(plane, stays.uid).desired is DesiredState.RUNNING
    drain.force = True
    await client.hosts.DrainHost(drain)
    await here.until(lambda: here.assigned[stays.uid].desired_state == pb.DESIRED_STOPPED, 60)
    await here.tell(stays.uid, pb.EXITED, exit_code=137)
    await until(plane, lambda: _in(plane, here.name, Standing.DRAINED))


async def test_a_host_that_holds_sandboxes_is_not_removed_unless_forced(plane: Plane) -> None:
    client, here, there = await two_hosts(plane)
    kept, lost = await both_on(client, here, there)
    for sandbox in (kept, lost):
        await runs_on(here, sandbox)
    remove = hosts_pb2.RemoveHostRequest(name=here.name)
    failure = await refused(client.hosts.RemoveHost(remove))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "HostHolds")
    assert "kept, lost" in failure.message
    remove.force = True
    await client.hosts.RemoveHost(remove)
    moved_to = await until(plane, placed_on(plane, kept.uid, there.name))
    assert moved_to.epoch > kept.assignment.epoch
    ended = await until(plane, lambda: _phase_is(plane, lost.uid, Phase.FAILED))
    assert (ended.status.reason, ended.host) == ("HostRemoved", "")
    assert (await refused(here.report())).reason == "HostRemoved"
    assert [host.name for host in (await client.hosts.ListHosts(hosts_pb2.ListHostsRequest())).hosts] == [there.name]
    assert (await refused(client.hosts.RemoveHost(remove))).condition is Condition.NOT_FOUND
    await client.hosts.RemoveHost(hosts_pb2.RemoveHostRequest(name=here.name, allow_missing=True))


def _phase_is(plane: Plane, uid: str, phase: Phase) -> Sandbox | None:
    sandbox = seen(plane, uid)
    return sandbox if sandbox.status.phase is phase else None


async def test_the_last_host_that_has_an_image_is_not_removed_unless_forced(plane: Plane) -> None:
    client, _, there = await two_hosts(plane)
    await client.hosts.RemoveHost(hosts_pb2.RemoveHostRequest(name="h1"))  # h2 has it, too
    last = hosts_pb2.RemoveHostRequest(name=there.name)
    failure = await refused(client.hosts.RemoveHost(last))
    assert (failure.reason, failure.detail("images")) == ("HostHolds", "base") and "--force" in failure.message
    last.force = True
    await client.hosts.RemoveHost(last)


async def test_an_upload_goes_to_a_host_that_takes_new_things(plane: Plane) -> None:
    client, one, two = await two_hosts(plane)
    uploads = len(one.imports)
    for cordoned in ("h2", "h1"):  # then the other; then whichever is alive
        await client.hosts.CordonHost(hosts_pb2.CordonHostRequest(name=cordoned))
        await client.import_image(f"after-{cordoned}")
    assert len(one.imports) >= uploads + 1 and len(one.imports) + len(two.imports) == 4


async def test_a_removed_host_is_told_no_more(plane: Plane) -> None:
    """Its open watch ends, too: nothing that comes later reaches it."""
    client, one, _ = await two_hosts(plane)
    watch = one.sync.WatchAssignments(hosts_pb2.WatchAssignmentsRequest(host="h1"))
    assert (await anext(aiter(watch))).kind == pb.SandboxEvent.BOOKMARK
    await client.hosts.RemoveHost(hosts_pb2.RemoveHostRequest(name="h1"))
    await create(client, "wakes-it")

    async def rest() -> None:
        async for _ in watch:
            pass

    async with asyncio.timeout(60):
        assert (await refused(rest())).reason == "HostRemoved"


@pytest.fixture
async def brief(configured: Configured, certificates: Any) -> AsyncIterator[Plane]:
    """A control plane whose hosts are LOST after 2 s, and given up 1 s later."""
    async with planed(configured(lease_s=2, lost_grace_s=1), certificates) as plane:
        yield plane


async def test_what_a_lost_host_had_begins_anew_elsewhere_as_its_policy_says(brief: Plane) -> None:
    client, here, there = await two_hosts(brief)
    kept, lost = await both_on(client, here, there)
    for sandbox in (kept, lost):
        await runs_on(here, sandbox)
    beating = asyncio.create_task(keep_reporting(there, 0.5))
    try:
        moved_to = await until(brief, placed_on(brief, kept.uid, there.name))
        ended = await until(brief, lambda: _phase_is(brief, lost.uid, Phase.FAILED))
    finally:
        beating.cancel()
    assert (moved_to.uid, moved_to.name) == (kept.uid, "kept") and moved_to.epoch > kept.assignment.epoch
    assert ended.status.reason == "HostLost"
    failure = await refused(here.tell(kept.uid, pb.RUNNING, epoch=kept.assignment.epoch))
    assert failure.reason == "StaleEpoch", "what the lost host still says is refused"


def test_the_sandboxes_of_a_lost_host_begin_anew_only_while_they_are_wanted() -> None:
    assert membership.begins_anew(box("a"))
    for changes in (
        {"desired": DesiredState.STOPPED},
        {"status": SandboxStatus(Phase.EXITED)},
        {"spec": replace(box("a").spec, restart=RestartPolicy.NEVER)},
        {"spec": replace(box("a").spec, checkpoint="c1")},
    ):
        assert not membership.begins_anew(box("a", **changes))
