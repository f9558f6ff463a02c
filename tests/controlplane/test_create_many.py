"""CreateSandboxes: many in one call, each made or refused by itself."""

from __future__ import annotations

import grpc.aio
import pytest
from google.rpc import status_pb2

from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, from_status, parse_error
from controlplane.api.v1 import sandboxes_pb2 as pb
from controlplane.quotas import Quota
from tests.controlplane.conftest import Certificates, Client, Configured, Plane, planed

DEADLINE_S = 60.0


def wish(name: str, *, image: str = "base", request_id: str = "", memory_mib: int = 64) -> pb.CreateSandboxRequest:
    sizes = pb.Resources(memory_min_mib=memory_mib, cpu_milli=100)
    spec = pb.SandboxSpec(image=image, resources=sizes, process=pb.Process(argv=["sleep", "1"]))
    return pb.CreateSandboxRequest(name=name, spec=spec, request_id=request_id)


async def create(client: Client, *wishes: pb.CreateSandboxRequest) -> list[pb.CreateOutcome]:
    answer = await client.sandboxes.CreateSandboxes(pb.CreateSandboxesRequest(requests=wishes), timeout=DEADLINE_S)
    return list(answer.outcomes)


def failure(outcome: pb.CreateOutcome) -> Failure:
    assert outcome.WhichOneof("outcome") == "error", outcome
    return from_status(status_pb2.Status.FromString(outcome.error))


async def test_each_is_made_or_refused_by_itself_and_at_its_place(plane: Plane) -> None:
    client = await plane.client()
    host = await plane.host("h1")
    await client.import_image()
    await client.create("there")
    wishes = [
        wish("a"), wish("there"), wish("b", image="nothing"), wish("Bad_Name"), wish("c"), wish(""),
        wish("huge", memory_mib=1 << 20), wish("twin"), wish("twin"),
    ]  # fmt: skip
    outcomes = await create(client, *wishes)
    made = {at: outcome.sandbox.name for at, outcome in enumerate(outcomes) if outcome.HasField("sandbox")}
    twin = made.keys() & {7, 8}
    assert (made[0], made[4], bool(made[5]), len(twin)) == ("a", "c", True, 1)
    assert set(made) == {0, 4, 5, *twin}
    refused = {at: failure(outcomes[at]) for at in range(len(wishes)) if at not in made}
    conditions = {at: one.condition for at, one in refused.items() if at < 7}
    assert conditions == {
        1: Condition.ALREADY_EXISTS, 2: Condition.NOT_FOUND, 3: Condition.INVALID, 6: Condition.EXHAUSTED,
    }  # fmt: skip
    assert refused[3].fields[0].field == "name" and refused[6].detail("needed_mib") == str(1 << 20)
    assert refused[min({7, 8} - twin)].reason == "SandboxExists"
    await host.until(lambda: {one.name for one in host.assigned.values()} >= {"a", "c"}, DEADLINE_S)


async def test_asked_again_it_makes_nothing_twice(plane: Plane) -> None:
    client = await plane.client()
    await plane.host("h1")
    await client.import_image()
    wishes = [wish(f"b{number}", request_id=f"r{number}") for number in range(20)]
    first = await create(client, *wishes)
    again = await create(client, *reversed(wishes), wish("b20", request_id="r20"))
    assert [one.sandbox.uid for one in again[:20]] == [one.sandbox.uid for one in reversed(first)]
    listed = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(), timeout=DEADLINE_S)
    assert len(listed.sandboxes) == 21


async def test_none_and_too_many_are_refused_as_a_whole(plane: Plane) -> None:
    client = await plane.client()
    for count in (0, 257):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await create(client, *(wish(f"b{number}") for number in range(count)))
        assert parse_error(caught.value).condition is Condition.INVALID
    assert not plane.parts.view.sandboxes


async def test_a_quota_takes_as_many_as_it_has_room_for(configured: Configured, certificates: Certificates) -> None:
    async with planed(configured(quotas=(("acme", Quota(sandboxes=5)),)), certificates) as plane:
        acme = await plane.client(Role.TENANT, "acme")
        await plane.host("h1")
        await acme.import_image()
        outcomes = await create(acme, *(wish(f"b{number}") for number in range(8)))
        assert [one.HasField("sandbox") for one in outcomes] == [True] * 5 + [False] * 3
        assert {failure(one).detail("quota") for one in outcomes[5:]} == {"sandboxes"}
