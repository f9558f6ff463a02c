"""Sandboxes through the API: create, find, list, watch, resize, stop, delete, report; idempotence, fencing, tenancy."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from controlplane import keys
from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import sandboxes_pb2
from controlplane.quotas import Quota
from controlplane.store.contract import Put
from tests.controlplane.conftest import Client, Configured, Plane, planed
from tests.controlplane.fakehost import DIGEST, FakeHost

pb = sandboxes_pb2
PUT, DELETE, BOOKMARK = pb.SandboxEvent.PUT, pb.SandboxEvent.DELETE, pb.SandboxEvent.BOOKMARK


async def refused(call: Any) -> Failure:
    """What a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def ready(plane: Plane) -> tuple[Client, FakeHost]:
    """One host that holds the image `base`."""
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    return client, host


async def begun(host: FakeHost, box: pb.Sandbox, phase: pb.Phase.ValueType = pb.RUNNING, **status: Any) -> None:
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, phase, **status)


# Create.


async def test_a_created_sandbox_is_placed_and_reaches_its_host_complete(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", memory_mib=256, max_mib=1024, argv=("sleep", "9"))
    assert (box.name, box.tenant, box.status.phase) == ("box", "default", pb.SCHEDULED)
    assert (box.assignment.host, box.spec.image, box.spec.image_digest) == ("h1", "base", DIGEST)
    assert box.assignment.epoch > 0
    sizes = box.spec.resources
    assert (sizes.memory_min_mib, sizes.memory_mib, sizes.memory_max_mib, sizes.cpu_milli) == (256, 256, 1024, 1000)
    assert getattr(box.spec, "class") == pb.GUEST_KERNEL
    await host.until(lambda: box.uid in host.assigned)
    there = host.assigned[box.uid]
    assert (there.spec, there.assignment, there.desired_state) == (box.spec, box.assignment, pb.DESIRED_RUNNING)
    assert await client.get("box") == box == await client.get(box.uid)


async def test_a_repeat_with_the_same_request_id_gives_the_first_calls_sandbox(plane: Plane) -> None:
    client, host = await ready(plane)
    first, second = await asyncio.gather(*(client.create("box", request_id="r-1") for _ in range(2)))
    assert first.uid == second.uid
    await begun(host, first)
    again = await client.create("box", request_id="r-1")
    assert (again.uid, again.status.phase) == (first.uid, pb.RUNNING)
    failure = await refused(client.create("box", request_id="r-2"))
    assert (failure.condition, failure.reason) == (Condition.ALREADY_EXISTS, "SandboxExists")
    failure = await refused(client.create("other", request_id="r-1"))
    assert (failure.condition, failure.reason) == (Condition.INVALID, "RequestIdReused")


async def test_a_nameless_repeat_with_the_same_request_id_makes_no_second_one(plane: Plane) -> None:
    client, _ = await ready(plane)
    boxes = [await client.create(request_id="r-1") for _ in range(2)]
    assert boxes[0].uid == boxes[1].uid
    assert "-" in boxes[0].name


async def test_a_request_whose_sandbox_is_gone_is_not_run_again(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", request_id="r-1", remove_on_exit=True)
    await begun(host, box)
    await host.tell(box.uid, pb.EXITED, removed=True)
    assert (await refused(client.create("box", request_id="r-1", remove_on_exit=True))).reason == "SandboxRemoved"
    assert box.uid != (await client.create("box")).uid


async def test_validate_only_records_nothing_and_still_says_what_is_wrong(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", validate_only=True)
    assert (box.name, box.uid, box.status.phase, box.assignment.host) == ("box", "", pb.SCHEDULED, "h1")
    assert (await refused(client.get("box"))).condition is Condition.NOT_FOUND
    assert (await refused(client.create("box", image="none", validate_only=True))).condition is Condition.NOT_FOUND
    assert host.assigned == {}


async def test_a_name_is_free_again_once_its_sandbox_has_ended(plane: Plane) -> None:
    client, host = await ready(plane)
    old = await client.create("box")
    await begun(host, old, pb.EXITED, exit_code=0)
    new = await client.create("box")
    assert new.uid != old.uid
    assert (await client.get("box")).uid == new.uid  # the live one
    assert (await client.get(old.uid)).uid == old.uid
    assert (await refused(client.create("box"))).condition is Condition.ALREADY_EXISTS


async def test_names_made_up_are_readable_and_differ(plane: Plane) -> None:
    client, _ = await ready(plane)
    names = {(await client.create(memory_mib=16)).name for _ in range(20)}
    assert len(names) == 20
    assert all(name.replace("-", "").isalnum() and name.islower() for name in names)


async def test_of_many_that_take_one_name_at_once_one_gets_it(plane: Plane) -> None:
    client, _ = await ready(plane)
    outcomes = await asyncio.gather(*(client.create("box") for _ in range(10)), return_exceptions=True)
    made = [outcome for outcome in outcomes if isinstance(outcome, pb.Sandbox)]
    failures = [parse_error(o).condition for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
    assert len(made) == 1
    assert failures == [Condition.ALREADY_EXISTS] * 9


async def test_more_than_there_is_is_refused_with_numbers(plane: Plane) -> None:
    client, _ = await ready(plane)
    failure = await refused(client.create("big", memory_mib=921600))
    assert (failure.condition, failure.reason) == (Condition.EXHAUSTED, "NoHostHasRoom")
    assert "921600 MiB guaranteed" in failure.message
    assert "7680 MiB not promised" in failure.message
    assert (failure.detail("needed_mib"), failure.detail("most_room_mib")) == ("921600", "7680")
    assert (await refused(client.get("big"))).condition is Condition.NOT_FOUND


async def test_creates_at_once_never_promise_more_than_the_host_has(plane: Plane) -> None:
    client, host = await ready(plane)  # 8192 - 512 MiB: seven of 1000 + 64
    outcomes = await asyncio.gather(
        *(client.create(f"b{i}", memory_mib=1000) for i in range(12)), return_exceptions=True
    )
    made = [outcome for outcome in outcomes if isinstance(outcome, pb.Sandbox)]
    assert len(made) == 7
    await host.until(lambda: len(host.assigned) == 7)


async def test_room_comes_back_when_a_sandbox_ends(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", memory_mib=7000)
    assert (await refused(client.create("next", memory_mib=7000))).condition is Condition.EXHAUSTED
    await begun(host, box, pb.EXITED, exit_code=0)
    await client.create("next", memory_mib=7000)


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("spec.image", {}),
        ("spec.resources.memory_min_mib", {"image": "base"}),
        (
            "spec.resources.memory_max_mib",
            {"image": "base", "resources": pb.Resources(memory_min_mib=10, memory_max_mib=9)},
        ),
        (
            "spec.resources.memory_mib",
            {"image": "base", "resources": pb.Resources(memory_min_mib=10, memory_max_mib=20, memory_mib=30)},
        ),
        (
            "spec.resources.cpu_milli",
            {"image": "base", "resources": pb.Resources(memory_min_mib=10, cpu_milli=64_001)},
        ),
        (
            "spec.process.argv",
            {"image": "base", "resources": pb.Resources(memory_min_mib=10), "process": pb.Process(argv=["a\0b"])},
        ),
        (
            "spec.process.env",
            {"image": "base", "resources": pb.Resources(memory_min_mib=10), "process": pb.Process(env={"": "x"})},
        ),
        ("spec.hostname", {"image": "base", "resources": pb.Resources(memory_min_mib=10), "hostname": "No!"}),
        ("spec.class", {"image": "base", "resources": pb.Resources(memory_min_mib=10), "class": 99}),
    ],
)
async def test_a_spec_that_cannot_be_is_refused_with_its_field(plane: Plane, field: str, spec: dict[str, Any]) -> None:
    client = await plane.client()
    failure = await refused(client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(spec=pb.SandboxSpec(**spec))))
    assert failure.condition is Condition.INVALID
    assert [problem.field for problem in failure.fields] == [field]


async def test_an_image_without_a_command_needs_one(plane: Plane) -> None:
    client, host = await ready(plane)
    del host.images[-1].config.cmd[:]
    await client.import_image()
    assert (await refused(client.create("box", argv=()))).reason == "NoCommand"
    await client.create("box", argv=("sh",))


async def test_without_a_host_a_sandbox_waits_and_is_placed_when_one_comes(plane: Plane) -> None:
    client, host = await ready(plane)
    host.memory_mib = 1024
    await host.report()
    plane.parts.view.alive.discard("h1")
    box = await client.create("box", memory_mib=256)
    assert box.status.phase == pb.PENDING
    assert (box.status.reason, box.assignment.host) == ("NoHost", "")
    assert "HostLost on 1 host" in box.status.message
    plane.parts.view.alive.add("h1")
    await host.report()
    await host.until(lambda: box.uid in host.assigned)
    assert (await client.get("box")).status.phase == pb.SCHEDULED


# List.


async def test_pages_are_of_one_revision_and_in_name_order(plane: Plane) -> None:
    client, host = await ready(plane)
    names = ["a", "a-b", "a0", "b", "c", "d", "e"]
    for name in reversed(names):
        await client.create(name, memory_mib=16)
    page = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_size=3))
    await client.create("a1", memory_mib=16)
    gone = await client.get("d")
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="d", force=True))
    await host.until(lambda: host.assigned[gone.uid].desired_state == pb.DESIRED_REMOVED)
    await host.tell(gone.uid, pb.EXITED, removed=True)
    seen, revision = [s.name for s in page.sandboxes], page.resource_version
    while page.next_page_token:
        request = pb.ListSandboxesRequest(page_size=3, page_token=page.next_page_token)
        page = await client.sandboxes.ListSandboxes(request)
        assert page.resource_version == revision
        seen += [s.name for s in page.sandboxes]
    assert seen == names
    now = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest())
    assert [s.name for s in now.sandboxes] == ["a", "a-b", "a0", "a1", "b", "c", "e"]


async def test_ended_ones_are_listed_only_when_asked_for(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await client.create("live")
    await begun(host, box, pb.FAILED, reason="VmmExited")
    for ended, names in ((False, ["live"]), (True, ["box", "live"])):
        listed = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(ended=ended))
        assert [s.name for s in listed.sandboxes] == names


async def test_a_page_token_is_checked(plane: Plane) -> None:
    client, _ = await ready(plane)
    for name in "abc":
        await client.create(name, memory_mib=16)
    page = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_size=1))
    token = page.next_page_token
    acme = await plane.client(Role.TENANT, "acme")
    for caller, request in (
        (client, pb.ListSandboxesRequest(page_token="rubbish")),
        (client, pb.ListSandboxesRequest(page_token=token, ended=True)),
        (client, pb.ListSandboxesRequest(page_size=-1)),
        (acme, pb.ListSandboxesRequest(page_token=token)),
    ):
        assert (await refused(caller.sandboxes.ListSandboxes(request))).condition is Condition.INVALID
    await client.create("d", memory_mib=16)
    await plane.parts.store.compact((await plane.parts.store.page("")).revision)
    failure = await refused(client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_token=token)))
    assert failure.condition is Condition.OUT_OF_RANGE


# Watch.


async def test_a_watch_begins_with_what_is_and_goes_on(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", remove_on_exit=True)
    watch: Any = client.sandboxes.WatchSandboxes(pb.WatchSandboxesRequest(), timeout=20)
    first, mark = await watch.read(), await watch.read()
    assert (first.kind, first.sandbox) == (PUT, box)
    assert mark.kind == BOOKMARK
    assert mark.resource_version >= box.resource_version
    await begun(host, box)
    event = await watch.read()
    assert (event.kind, event.sandbox.status.phase) == (PUT, pb.RUNNING)
    assert event.resource_version == event.sandbox.resource_version
    await host.tell(box.uid, pb.EXITED, removed=True)
    event = await watch.read()
    assert (event.kind, event.sandbox.name, event.sandbox.uid) == (DELETE, "box", box.uid)
    watch.cancel()


async def test_a_watch_goes_on_after_a_revision_without_gap(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box, pb.STARTING)
    await host.tell(box.uid, pb.RUNNING)
    request = pb.WatchSandboxesRequest(resource_version=box.resource_version)
    watch: Any = client.sandboxes.WatchSandboxes(request, timeout=20)
    assert [(await watch.read()).sandbox.status.phase for _ in range(2)] == [pb.STARTING, pb.RUNNING]
    watch.cancel()


async def test_a_watch_from_what_is_compacted_is_out_of_range(plane: Plane) -> None:
    client, _ = await ready(plane)
    box = await client.create("box")
    await client.create("other")
    await plane.parts.store.compact((await plane.parts.store.page("")).revision)
    for revision in (box.resource_version, 1 << 40):
        watch: Any = client.sandboxes.WatchSandboxes(pb.WatchSandboxesRequest(resource_version=revision), timeout=20)
        assert (await refused(watch.read())).condition is Condition.OUT_OF_RANGE


async def test_bookmarks_come_while_nothing_happens(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlplane.watching.watch_sandboxes.__kwdefaults__", {"bookmark_s": 0.05})
    monkeypatch.setattr("controlplane.watching.watch_assignments.__kwdefaults__", {"bookmark_s": 0.05})
    client, host = await ready(plane)
    watch: Any = client.sandboxes.WatchSandboxes(pb.WatchSandboxesRequest(), timeout=20)
    events = [await watch.read() for _ in range(4)]
    assert [event.kind for event in events] == [BOOKMARK] * 4
    assert not events[1].HasField("sandbox")
    await plane.parts.store.commit([Put("elsewhere", b"")])
    while (await watch.read()).resource_version <= events[-1].resource_version:
        pass  # the bookmark moves on with what happens elsewhere
    watch.cancel()
    host.listed.clear()
    async with asyncio.timeout(5):
        await host.listed.wait()  # hosts get them too


async def test_a_tenant_watches_its_own_only(plane: Plane) -> None:
    client, _ = await ready(plane)
    acme = await plane.client(Role.TENANT, "acme")
    await acme.import_image()
    watch: Any = acme.sandboxes.WatchSandboxes(pb.WatchSandboxesRequest(), timeout=20)
    assert (await watch.read()).kind == BOOKMARK
    await client.create("box")
    mine = await acme.create("box")
    event = await watch.read()
    assert (event.sandbox.uid, event.sandbox.tenant) == (mine.uid, "acme")
    watch.cancel()


# Resize, stop, delete.


async def test_a_resize_is_a_target_that_the_host_then_meets(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", memory_mib=256, max_mib=1024)
    await begun(host, box)
    done = pb.ResizeStatus(
        state=pb.RESIZE_DONE, desired_memory_mib=256, allocated_memory_mib=256, actual_memory_mib=256, cpu_milli=1000
    )
    await host.tell(box.uid, pb.RUNNING, resize=done)
    before = await client.get("box")
    asked = pb.ResizeSandboxRequest(name="box", memory_mib=512, etag=before.etag)
    resized = await client.sandboxes.ResizeSandbox(asked)
    assert resized.spec.resources.memory_mib == 512
    assert (resized.status.resize.state, resized.status.resize.desired_memory_mib) == (pb.RESIZE_IN_PROGRESS, 512)
    assert resized.status.resize.actual_memory_mib == 256
    await host.until(lambda: host.assigned[box.uid].spec.resources.memory_mib == 512)
    assert host.assigned[box.uid].assignment == box.assignment  # the same epoch: the host obeys
    await host.tell(box.uid, pb.RUNNING, resize=done)  # a report from before must not look like the end of it
    late = (await client.get("box")).status.resize
    assert (late.state, late.desired_memory_mib) == (pb.RESIZE_IN_PROGRESS, 512)
    done.desired_memory_mib = done.allocated_memory_mib = done.actual_memory_mib = 512
    await host.tell(box.uid, pb.RUNNING, resize=done)
    assert (await client.get("box")).status.resize == done
    failure = await refused(client.sandboxes.ResizeSandbox(asked))
    assert (failure.condition, failure.reason) == (Condition.CONFLICT, "EtagMismatch")
    same = await client.sandboxes.ResizeSandbox(pb.ResizeSandboxRequest(name="box", memory_mib=512))
    assert same.status.resize == done  # nothing to do: it stays done


@pytest.mark.parametrize(
    ("wish", "condition", "text"),
    [
        ({}, Condition.INVALID, "nothing to change"),
        ({"memory_mib": 1025}, Condition.PRECONDITION, "1024 MiB"),
        ({"cpu_milli": 4001}, Condition.PRECONDITION, "has room for"),
        ({"memory_mib": 100}, Condition.INVALID, "guaranteed 256"),
        ({"memory_min_mib": 300}, Condition.INVALID, "below the guaranteed 300"),
    ],
)
async def test_a_resize_that_cannot_be_is_refused(
    plane: Plane, wish: dict[str, Any], condition: Condition, text: str
) -> None:
    client, host = await ready(plane)
    await begun(host, await client.create("box", memory_mib=256, max_mib=1024))
    failure = await refused(client.sandboxes.ResizeSandbox(pb.ResizeSandboxRequest(name="box", **wish)))
    assert failure.condition is condition
    assert text in failure.message


async def test_a_larger_guarantee_needs_room_and_an_ended_one_needs_nothing(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box", memory_mib=256, max_mib=100_000)
    await begun(host, box)
    wish = pb.ResizeSandboxRequest(name="box", memory_mib=90_000, memory_min_mib=90_000)
    assert (await refused(client.sandboxes.ResizeSandbox(wish))).condition is Condition.EXHAUSTED
    await client.sandboxes.ResizeSandbox(pb.ResizeSandboxRequest(name="box", memory_mib=4000, memory_min_mib=4000))
    await host.tell(box.uid, pb.EXITED, exit_code=0)
    failure = await refused(client.sandboxes.ResizeSandbox(pb.ResizeSandboxRequest(name="box", memory_mib=5000)))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "SandboxEnded")


async def test_stop_is_asked_of_the_host_with_its_grace(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box)
    stopped = await client.sandboxes.StopSandbox(pb.StopSandboxRequest(name="box", grace=Duration(seconds=3)))
    assert (stopped.desired_state, stopped.stop_grace_s, stopped.status.phase) == (pb.DESIRED_STOPPED, 3, pb.RUNNING)
    await host.until(lambda: host.assigned[box.uid].desired_state == pb.DESIRED_STOPPED)
    assert host.assigned[box.uid].stop_grace_s == 3
    await host.tell(box.uid, pb.EXITED, exit_code=143, reason="Stopped")
    again = await client.sandboxes.StopSandbox(pb.StopSandboxRequest(name="box"))
    assert (again.status.phase, again.status.exit_code) == (pb.EXITED, 143)
    assert again.stop_grace_s == 3  # an ended one is returned as it is


async def test_delete_needs_force_while_it_lives_and_the_record_goes_when_the_host_let_go(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box)
    failure = await refused(client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box")))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "SandboxLive")
    assert "force" in failure.message
    for _ in range(2):  # idempotent
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box", force=True))
    assert (await client.get("box")).desired_state == pb.DESIRED_REMOVED
    assert "being removed" in (await refused(client.create("box"))).message
    await host.until(lambda: host.assigned[box.uid].desired_state == pb.DESIRED_REMOVED)
    await host.tell(box.uid, pb.EXITED, removed=True)
    assert (await refused(client.get("box"))).condition is Condition.NOT_FOUND
    assert (await refused(client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box")))).condition is (
        Condition.NOT_FOUND
    )
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box", allow_missing=True))
    await host.until(lambda: box.uid not in host.assigned)
    left = [record.key for record in (await plane.parts.store.page("")).records]
    assert not [key for key in left if key.startswith((keys.SANDBOXES, keys.UIDS, keys.NAMES))]


async def test_what_waits_for_a_host_is_stopped_and_removed_at_once(plane: Plane) -> None:
    client, _ = await ready(plane)
    plane.parts.view.alive.discard("h1")
    await client.create("box")
    stopped = await client.sandboxes.StopSandbox(pb.StopSandboxRequest(name="box"))
    assert (stopped.status.phase, stopped.status.reason, stopped.status.exit_code) == (pb.EXITED, "Stopped", 137)
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box"))
    assert (await refused(client.get("box"))).condition is Condition.NOT_FOUND


# Reports.


async def test_a_report_is_seen_whole(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await host.until(lambda: box.uid in host.assigned)
    status: dict[str, Any] = {
        "accel": "tcg",
        "host_pid": 4711,
        "restarts_of_host": 2,
        "start_phases": [pb.StartPhase(name="vmm", seconds=0.25), pb.StartPhase(name="kernel", seconds=4.5)],
    }
    await host.tell(box.uid, pb.RUNNING, **status)
    seen = (await client.get("box")).status
    wanted = pb.SandboxStatus(phase=pb.RUNNING, observed_epoch=box.assignment.epoch, **status)
    assert seen == wanted


async def test_a_report_of_another_epoch_host_or_sandbox_is_refused(plane: Plane) -> None:
    client, host = await ready(plane)
    other = await plane.host("h2")
    box = await client.create("box")
    await begun(host, box)
    for speaker, epoch in ((host, box.assignment.epoch - 1), (host, box.assignment.epoch + 1)):
        failure = await refused(speaker.tell(box.uid, pb.FAILED, epoch=epoch))
        assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "StaleEpoch")
    failure = await refused(other.tell(box.uid, pb.FAILED, epoch=box.assignment.epoch))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "StaleEpoch")
    assert (await refused(host.tell("0" * 16, pb.RUNNING, epoch=1))).condition is Condition.NOT_FOUND
    assert (await client.get("box")).status.phase == pb.RUNNING


async def test_how_a_sandbox_ended_stays(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box, pb.EXITED, exit_code=7, reason="Completed")
    await host.tell(box.uid, pb.EXITED, exit_code=137, reason="Stopped")  # a host that lost its record of it
    status = (await client.get("box")).status
    assert (status.exit_code, status.reason) == (7, "Completed")


async def test_a_host_that_begins_anew_what_ran_has_lost_it(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box)
    failure = await refused(host.tell(box.uid, pb.STARTING))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "BadTransition")
    status = (await client.get("box")).status
    assert (status.phase, status.reason) == (pb.FAILED, "HostForgot")
    await host.until(lambda: box.uid not in host.assigned)


async def test_a_host_that_lets_go_of_what_is_wanted_has_failed_it(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box)
    await host.tell(box.uid, pb.RUNNING, removed=True)
    status = (await client.get("box")).status
    assert (status.phase, status.reason) == (pb.FAILED, "HostLetGo")


async def test_an_ended_sandbox_is_never_assigned_as_to_be_run(plane: Plane) -> None:
    client, host = await ready(plane)
    box = await client.create("box")
    await begun(host, box, pb.EXITED, exit_code=0)
    host.listed.clear()
    host.assigned.clear()
    watching = asyncio.create_task(host.watch())  # as a host that was reinstalled and lists again
    try:
        await host.until(lambda: box.uid in host.assigned)
        assert host.assigned[box.uid].desired_state == pb.DESIRED_STOPPED
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


# Tenants and roles.


async def test_two_tenants_have_the_same_names_and_never_meet(plane: Plane) -> None:
    client, host = await ready(plane)
    acme = await plane.client(Role.TENANT, "acme")
    assert (await refused(acme.create("box"))).reason == "ImageNotFound"  # the other one's image is not theirs
    await acme.import_image()
    mine, theirs = await client.create("box"), await acme.create("box")
    assert mine.uid != theirs.uid
    assert (theirs.tenant, (await acme.get("box")).uid) == ("acme", theirs.uid)
    assert (await refused(acme.get(mine.uid))).condition is Condition.NOT_FOUND
    request = pb.DeleteSandboxRequest(name=mine.uid, force=True)
    assert (await refused(acme.sandboxes.DeleteSandbox(request))).condition is Condition.NOT_FOUND
    listed = await acme.sandboxes.ListSandboxes(pb.ListSandboxesRequest())
    assert [s.uid for s in listed.sandboxes] == [theirs.uid]
    await host.until(lambda: {mine.uid, theirs.uid} <= set(host.assigned))


async def test_an_operator_may_act_for_a_tenant_and_a_tenant_for_nobody_else(plane: Plane) -> None:
    await ready(plane)
    acme, operator = await plane.client(Role.TENANT, "acme"), await plane.client()
    await acme.import_image()
    theirs = await acme.create("box")
    get = pb.GetSandboxRequest(name="box")
    seen = await operator.sandboxes.GetSandbox(get, metadata=(("sandloom-tenant", "acme"),))
    assert seen.uid == theirs.uid
    failure = await refused(acme.sandboxes.GetSandbox(get, metadata=(("sandloom-tenant", "default"),)))
    assert (failure.condition, failure.reason) == (Condition.DENIED, "WrongTenant")


async def test_hosts_and_control_planes_are_not_users(plane: Plane) -> None:
    for role, name in ((Role.HOST, "h1"), (Role.CONTROLPLANE, "cp")):
        caller = await plane.client(role, name)
        failure = await refused(caller.get("box"))
        assert (failure.condition, failure.reason) == (Condition.DENIED, "WrongRole")


async def test_everything_is_as_it_was_after_a_restart(configured: Configured, certificates: Any) -> None:
    async with planed(configured(), certificates) as plane:
        client, host = await ready(plane)
        box = await client.create("box", request_id="r-1")
        await begun(host, box, pb.RUNNING, host_pid=12)
        before = await client.get("box")
    async with planed(configured(), certificates) as plane:
        client = await plane.client()
        assert await client.get("box") == before
        assert (await client.create("box", request_id="r-1")).uid == box.uid
        host = await plane.host()
        await host.until(lambda: box.uid in host.assigned)
        assert host.assigned[box.uid].assignment == box.assignment
        await host.tell(box.uid, pb.STOPPING)


async def test_a_quota_bounds_what_a_tenant_has_at_once(configured: Configured, certificates: Any) -> None:
    config = configured(quotas=(("acme", Quota(sandboxes=2, memory_min_mib=600)),))
    async with planed(config, certificates) as plane:
        client, host = await ready(plane)
        acme = await plane.client(Role.TENANT, "acme")
        await acme.import_image()
        failure = await refused(acme.create("big", memory_mib=601))
        assert (failure.condition, failure.reason) == (Condition.EXHAUSTED, "QuotaExceeded")
        one = await acme.create("one", max_mib=600)
        await acme.create("two")
        assert (await refused(acme.create("three", memory_mib=16))).detail("quota") == "sandboxes"
        wish = pb.ResizeSandboxRequest(name="one", memory_mib=400, memory_min_mib=400)
        assert (await refused(acme.sandboxes.ResizeSandbox(wish))).detail("quota") == "memory_min_mib"
        await begun(host, one, pb.EXITED, exit_code=0)
        await acme.create("three", memory_mib=16)
        await client.create("other", memory_mib=2000)  # nobody else's quota
