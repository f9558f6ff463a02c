"""Why a sandbox is where it is, through the API; and rules from the request to the decision."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest

from controlplane.api.identity import Role
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import sandboxes_pb2 as pb
from controlplane.rules import Rules, Spread, parse_affinity, parse_pair, parse_spread, parse_trust
from tests.controlplane.conftest import Client, Plane
from tests.controlplane.fakehost import FakeHost


async def ready(plane: Plane) -> tuple[Client, FakeHost]:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    return client, host


async def create(client: Client, name: str, memory_mib: int = 256, **rules: Any) -> pb.Sandbox:
    spec = pb.SandboxSpec(
        image="base", resources=pb.Resources(memory_min_mib=memory_mib), process=pb.Process(argv=["true"]),
        rules=pb.PlacementRules(**rules),
    )  # fmt: skip
    return await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(name=name, spec=spec), timeout=20)


async def explain(client: Client, name: str, hosts: int = 0) -> pb.Explanation:
    return await client.sandboxes.ExplainSandbox(pb.ExplainSandboxRequest(name=name, hosts=hosts), timeout=20)


async def test_what_spoke_for_a_host_is_kept(plane: Plane) -> None:
    client, _ = await ready(plane)
    box = await create(client, "box", affinity=["!slow"], spread="host")
    assert (list(box.spec.rules.affinity), box.spec.rules.spread) == (["!slow"], "host")
    told = await explain(client, "box")
    assert (told.host, told.hosts_then, told.charge_mib) == ("h1", 1, 256)
    assert told.marginal_mib >= 256 + 64
    assert [part.what for part in told.placed_because] == ["spread", "start", "strain", "memory", "image", "fit"]
    await create(client, "second")
    again = await explain(client, "box")
    assert list(again.placed_because) == list(told.placed_because)  # as it was then, not as it is now
    second = await explain(client, "second")
    assert second.shared_mib > 0


async def test_a_waiting_one_is_told_what_each_host_lacks(plane: Plane) -> None:
    client, _ = await ready(plane)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(client, "box", memory_mib=100_000)
    failure = parse_error(caught.value)
    assert (failure.condition, failure.reason) == (Condition.EXHAUSTED, "NoHostHasRoom")
    assert ("hosts_ShortOfMemory", "1") in failure.details
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(client, "box", affinity=["zone=eu"])
    assert ("hosts_AffinityNotMet", "1") in parse_error(caught.value).details


async def test_a_tenant_is_told_of_no_host_but_its_own(plane: Plane) -> None:
    client = await plane.client(Role.TENANT, "acme")
    await plane.host()
    await plane.host("h2")
    await client.import_image()
    await create(client, "box")
    told = await explain(client, "box")
    assert told.host
    assert not told.verdicts
    assert sum(count.hosts for count in told.refused) + told.fitting == 1
    other = await plane.client(Role.TENANT, "other")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explain(other, "box")
    assert parse_error(caught.value).condition is Condition.NOT_FOUND


@pytest.mark.parametrize(
    ("field", "rules"),
    [
        ("spec.rules.affinity", {"affinity": ["zone="]}),
        ("spec.rules.affinity", {"affinity": ["a"] * 33}),
        ("spec.rules.spread", {"spread": "zone:x"}),
        ("spec.rules.trust", {"trust": ["me"]}),
        ("spec.rules.tolerations", {"tolerations": ["a=b=c"]}),
    ],
)
async def test_wrong_rules_are_refused_by_field(plane: Plane, field: str, rules: dict[str, Any]) -> None:
    client, _ = await ready(plane)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(client, "box", **rules)
    failure = parse_error(caught.value)
    assert (failure.condition, failure.fields[0].field) == (Condition.INVALID, field)


def test_rules_are_written_as_they_are_read() -> None:
    for text in ("zone=eu", "zone!=eu", "ssd", "!ssd"):
        assert str(parse_affinity(text)) == text
    for text in ("zone", "zone:2", "host:1"):
        assert str(parse_spread(text)) == text
    assert parse_spread("zone") == Spread("zone", 0)
    assert parse_trust(["kvm", "no-smt"]).words == ("no-smt", "kvm")
    assert Rules(tolerations=(parse_pair("gpu"),)).tolerates(("gpu", "a100"))
    assert not Rules(tolerations=(parse_pair("gpu=a100"),)).tolerates(("gpu", "h100"))
    assert parse_affinity("zone!=eu").holds({})
