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


SIZES = ("8192", "7680", "7616", "512", "9999", "9487")
"""What hosts have, have left or reserve in the test below."""


async def test_what_is_refused_tells_a_tenant_no_host_and_no_size_of_one(plane: Plane) -> None:
    client, operator = await plane.client(Role.TENANT, "acme"), await plane.client()
    await plane.host("loom-1")
    second = await plane.host("weft-2")
    second.memory_mib = 9999
    await second.report()
    await client.import_image()
    await operator.import_image()
    texts: list[str] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(client, "big", memory_mib=100_000)
    failure = parse_error(caught.value)
    assert (failure.reason, failure.detail("hosts_ShortOfMemory"), failure.detail("needed_mib")) == (
        "NoHostHasRoom", "2", "100000",
    )  # fmt: skip
    assert "100000 MiB guaranteed" in failure.message and "ShortOfMemory on 2 hosts" in failure.message
    texts += [failure.message, str(failure.details)]
    box = await client.create("box", memory_mib=256, max_mib=9800)
    own = box.assignment.host
    told = await explain(client, "box")
    assert [part.what for part in told.placed_because] == ["start", "memory", "image"]
    texts.append(str(told).replace(own, ""))
    ask = pb.ResizeSandboxRequest(name="box", memory_min_mib=9800, memory_mib=9800)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.ResizeSandbox(ask, timeout=20)
    failure = parse_error(caught.value)
    assert failure.reason == "NoHostHasRoom" and "9544 MiB more" in failure.message
    texts += [failure.message.replace(own, ""), str(failure.details)]
    for host in ("loom-1", "weft-2"):
        plane.parts.view.alive.discard(host)
        plane.parts.view.census.touch(host)
    waiting = await create(client, "waiting")
    assert waiting.status.phase == pb.PENDING and "HostLost on 2 hosts" in waiting.status.message
    texts += [waiting.status.message, str(await explain(client, "waiting"))]
    events = client.sandboxes.WatchEvents(pb.WatchEventsRequest(), timeout=20)
    texts += [event.message async for event in events if event.subject != "box"]
    for text in texts:
        assert "loom-1" not in text and "weft-2" not in text, text
        assert not [size for size in SIZES if size in text], text
    await create(operator, "waiting")
    assert {verdict.host for verdict in (await explain(operator, "waiting")).verdicts} == {"loom-1", "weft-2"}


async def test_an_operator_is_told_the_hosts_and_what_they_have(plane: Plane) -> None:
    client, _ = await ready(plane)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(client, "big", memory_mib=100_000)
    failure = parse_error(caught.value)
    assert "h1: " in failure.message and "total 8192" in failure.message
    assert (failure.detail("most_room_mib"), failure.detail("needed_mib")) == ("7680", "100000")


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
