"""Checkpoints over real gRPC: whose they are, where they are restored, what is refused, all or none."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import checkpoints_pb2, checkpoints_pb2_grpc, images_pb2, sandboxes_pb2
from tests.controlplane.conftest import Client, Plane
from tests.controlplane.fakehost import FakeHost


@dataclass
class Scene:
    """A host with a running sandbox `web`, and a client."""

    plane: Plane
    host: FakeHost
    client: Client
    stub: checkpoints_pb2_grpc.CheckpointsAsyncStub
    web: sandboxes_pb2.Sandbox

    async def take(self, name: str = "warm", sandbox: str = "web", request_id: str = "") -> checkpoints_pb2.Checkpoint:
        request = checkpoints_pb2.CreateCheckpointRequest(sandbox=sandbox, name=name, request_id=request_id)
        return await self.stub.CreateCheckpoint(request, timeout=10)

    async def listed(self) -> list[str]:
        answer = await self.stub.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(), timeout=10)
        return [each.name for each in answer.checkpoints]

    async def restore(self, checkpoint: str = "warm", **fields: object) -> sandboxes_pb2.Sandbox:
        request = checkpoints_pb2.RestoreCheckpointRequest(checkpoint=checkpoint, **fields)  # type: ignore[arg-type]
        return await self.stub.RestoreCheckpoint(request, timeout=10)

    async def fork(self, count: int = 2, **fields: object) -> list[sandboxes_pb2.Sandbox]:
        request = checkpoints_pb2.ForkSandboxRequest(sandbox="web", count=count, **fields)  # type: ignore[arg-type]
        return list((await self.stub.ForkSandbox(request, timeout=10)).sandboxes)


async def run(client: Client, host: FakeHost, name: str = "web", memory_mib: int = 256) -> sandboxes_pb2.Sandbox:
    """A sandbox that its host says is running."""
    made = await client.create(name, memory_mib=memory_mib)
    await host.until(lambda: made.uid in host.assigned)
    await host.tell(made.uid, phase=sandboxes_pb2.RUNNING)
    host.checkpoints.sandboxes[made.uid] = host.assigned[made.uid]
    return made


@pytest_asyncio.fixture
async def world(plane: Plane) -> Scene:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    web = await run(client, host)
    return Scene(plane, host, client, checkpoints_pb2_grpc.CheckpointsStub(client.channel), web)


def refusal(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), parse_error(error.value).reason


async def test_a_checkpoint_is_taken_where_its_source_is(world: Scene) -> None:
    taken = await world.take()
    assert (taken.name, taken.sandbox, taken.host, taken.tenant) == ("warm", "web", "h1", "default")
    assert (taken.spec.image, taken.spec.checkpoint, taken.ephemeral) == ("base", taken.id, False)
    assert await world.listed() == ["warm"]


async def test_a_repeat_with_the_same_request_id_is_the_same_checkpoint(world: Scene) -> None:
    first = await world.take("", request_id="r-1")
    assert (await world.take("", request_id="r-1")).id == first.id
    assert (await world.take("", request_id="r-2")).id != first.id
    assert len(await world.listed()) == 2


async def test_a_restored_sandbox_goes_to_its_checkpoints_host(world: Scene) -> None:
    await world.plane.host("h0")  # has as much room, and comes first by name
    taken = await world.take()
    made = await world.restore(name="web-2", remove_on_exit=True)
    assert (made.name, made.assignment.host, made.status.phase) == ("web-2", "h1", sandboxes_pb2.SCHEDULED)
    assert made.spec.checkpoint == taken.id and made.spec.remove_on_exit
    assert made.spec.image_digest == (await world.client.get("web")).spec.image_digest
    await world.host.until(lambda: made.uid in world.host.assigned)
    assert world.host.assigned[made.uid].spec.checkpoint == taken.id
    assert (await world.restore(taken.id)).name not in ("web", "web-2")


async def test_a_restore_needs_no_image_any_more_for_the_checkpoint_keeps_its_layers(world: Scene) -> None:
    await world.take()
    await world.host.tell(world.web.uid, sandboxes_pb2.EXITED, exit_code=0)
    await world.client.images.DeleteImage(images_pb2.DeleteImageRequest(name="base"), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.client.create("web-1")
    assert refusal(caught)[1] == "ImageNotFound"
    made = await world.restore(name="web-2")
    assert (made.assignment.host, made.status.phase) == ("h1", sandboxes_pb2.SCHEDULED)


async def test_a_restore_is_idempotent_by_request_id(world: Scene) -> None:
    await world.take()
    first = await world.restore(request_id="r-1", name="web-2")
    assert (await world.restore(request_id="r-1", name="web-2")).uid == first.uid
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.restore(request_id="r-1", name="web-3")
    assert refusal(caught) == (grpc.StatusCode.INVALID_ARGUMENT, "RequestIdReused")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.restore(name="web")
    assert refusal(caught) == (grpc.StatusCode.ALREADY_EXISTS, "SandboxExists")


async def test_nobody_sees_or_uses_another_tenants(world: Scene) -> None:
    await world.take()
    other = await world.plane.client(Role.TENANT, "other")
    stub = checkpoints_pb2_grpc.CheckpointsStub(other.channel)
    assert not (await stub.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(), timeout=10)).checkpoints
    for call in (
        stub.RestoreCheckpoint(checkpoints_pb2.RestoreCheckpointRequest(checkpoint="warm"), timeout=10),
        stub.DeleteCheckpoint(checkpoints_pb2.DeleteCheckpointRequest(name="warm"), timeout=10),
        stub.CreateCheckpoint(checkpoints_pb2.CreateCheckpointRequest(sandbox=world.web.uid), timeout=10),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert await world.listed() == ["warm"]


async def test_a_deleted_one_is_gone(world: Scene) -> None:
    await world.take()
    await world.stub.DeleteCheckpoint(checkpoints_pb2.DeleteCheckpointRequest(name="warm"), timeout=10)
    assert world.host.checkpoints.kept == {}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.DeleteCheckpoint(checkpoints_pb2.DeleteCheckpointRequest(name="warm"), timeout=10)
    assert refusal(caught) == (grpc.StatusCode.NOT_FOUND, "CheckpointNotFound")
    again = checkpoints_pb2.DeleteCheckpointRequest(name="warm", allow_missing=True)
    await world.stub.DeleteCheckpoint(again, timeout=10)


async def test_only_a_running_sandbox_has_one(world: Scene) -> None:
    await world.client.create("late")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.take(sandbox="late")
    assert refusal(caught) == (grpc.StatusCode.FAILED_PRECONDITION, "SandboxNotRunning")


async def test_what_the_host_refuses_is_told_as_it_is(world: Scene) -> None:
    world.host.checkpoints.failure = Failure(Condition.PRECONDITION, "InteractiveSession", "exec of sh on a terminal")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.take()
    assert refusal(caught) == (grpc.StatusCode.FAILED_PRECONDITION, "InteractiveSession")


async def test_a_host_that_does_not_answer_is_named(world: Scene) -> None:
    world.host.checkpoints.silent = True
    answer = await world.stub.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(), timeout=10)
    assert (list(answer.silent_hosts), answer.silent) == (["h1"], 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.restore()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_tenant_is_told_how_many_hosts_do_not_answer_and_not_which(world: Scene, plane: Plane) -> None:
    world.host.checkpoints.silent = True
    stub = checkpoints_pb2_grpc.CheckpointsStub((await plane.client(Role.TENANT, "acme")).channel)
    answer = await stub.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(), timeout=10)
    assert (list(answer.silent_hosts), answer.silent) == ([], 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DeleteCheckpoint(checkpoints_pb2.DeleteCheckpointRequest(name="warm"), timeout=10)
    failure = parse_error(caught.value)
    assert failure.condition is Condition.UNAVAILABLE and "1 host did not answer" in failure.message
    assert "h1" not in failure.message


async def test_forks_are_all_there(world: Scene) -> None:
    made = await world.fork(3, prefix="try")
    assert [each.name for each in made] == ["try-1", "try-2", "try-3"]
    (kept,) = world.host.checkpoints.kept.values()
    assert kept.ephemeral and {each.spec.checkpoint for each in made} == {kept.id}
    assert {each.assignment.host for each in made} == {"h1"}


@pytest.mark.parametrize("why", ["room", "name"])
async def test_forks_are_all_there_or_none_is(world: Scene, why: str) -> None:
    if why == "name":
        await run(world.client, world.host, "try-2")
    else:
        world.host.memory_mib = 512 + 3 * (256 + 64)
        await world.host.report()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.fork(4, prefix="try")
    wanted = grpc.StatusCode.ALREADY_EXISTS if why == "name" else grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.code() is wanted
    assert world.host.checkpoints.kept == {}
    listed = await world.client.sandboxes.ListSandboxes(sandboxes_pb2.ListSandboxesRequest(), timeout=10)
    left = {each.name: each.desired_state for each in listed.sandboxes if each.name.startswith("try-")}
    left.pop("try-2" if why == "name" else "", None)
    assert set(left.values()) <= {sandboxes_pb2.DESIRED_REMOVED}


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"count": 0}, "count"), ({"count": 101}, "count"), ({"prefix": "A"}, "prefix"), ({"prefix": "a" * 60}, "prefix")],
)
async def test_bad_requests_name_the_field(world: Scene, fields: dict[str, object], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.fork(**{"count": 2, **fields})  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert parse_error(caught.value).fields[0].field == field
