"""The event log: what is told, to whom, for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from controlplane.api.identity import Role
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import hosts_pb2, sandboxes_pb2
from controlplane.events import KEPT_S, EventLog, entry
from controlplane.model import Event
from controlplane.store.sqlite import open_sqlite
from tests.controlplane.conftest import Client, Plane

pb = sandboxes_pb2


async def told(client: Client, subject: str = "") -> list[tuple[str, str, str]]:
    call: Any = client.sandboxes.WatchEvents(pb.WatchEventsRequest(subject=subject), timeout=10)
    return [(event.kind, event.subject, event.reason) async for event in call]


async def test_what_happens_to_a_sandbox_is_told_in_order(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box", max_mib=512)
    await host.until(lambda: box.uid in host.assigned)
    event = pb.Event(kind="sandbox", subject="box", reason="Started", message="vmm 0.10 s", host="h1")
    await host.sync.RecordEvent(hosts_pb2.RecordEventRequest(event=event))
    await client.sandboxes.ResizeSandbox(pb.ResizeSandboxRequest(name="box", memory_mib=300))
    await client.sandboxes.StopSandbox(pb.StopSandboxRequest(name="box"))
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(name="box", force=True))
    reasons = ["Scheduled", "Started", "ResizeAsked", "StopAsked", "RemoveAsked"]
    assert await told(client, "box") == [("sandbox", "box", reason) for reason in reasons]
    everything = await told(client)
    assert everything[:2] == [("host", "h1", "HostReady"), ("image", "base", "Imported")]
    assert await told(client, "nobody") == []


async def test_following_goes_on_from_what_is_stored(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    call: Any = client.sandboxes.WatchEvents(pb.WatchEventsRequest(follow=True, subject="box"), timeout=20)
    await client.create("box")
    first = await call.read()
    assert (first.reason, first.host, first.time.seconds > 0) == ("Scheduled", "h1", True)
    await client.create("other")
    for i in range(3):
        event = pb.Event(kind="sandbox", subject="box", reason=f"R{i}", message="m" * 10_000)
        await host.sync.RecordEvent(hosts_pb2.RecordEventRequest(event=event))
    events = [await call.read() for _ in range(3)]
    assert [event.reason for event in events] == ["R0", "R1", "R2"]
    assert [event.resource_version for event in events] == sorted({event.resource_version for event in events})
    assert len(events[0].message) == 4096
    call.cancel()


async def test_a_tenant_is_told_of_its_own_only(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    acme = await plane.client(Role.TENANT, "acme")
    await client.import_image()
    await acme.import_image("theirs")
    box, same = await client.create("box"), await acme.create("box", image="theirs")
    await host.until(lambda: {box.uid, same.uid} <= set(host.assigned))
    ambiguous = pb.Event(kind="sandbox", subject="box", reason="WhoseIsIt")
    await host.sync.RecordEvent(hosts_pb2.RecordEventRequest(event=ambiguous))
    assert await told(acme) == [("image", "theirs", "Imported"), ("sandbox", "box", "Scheduled")]
    mine = await told(client)
    assert ("image", "theirs", "Imported") not in mine
    assert ("sandbox", "box", "WhoseIsIt") in mine  # nobody's for certain: for operators only
    assert ("host", "h1", "HostReady") in mine


async def test_an_event_that_is_none_is_refused(plane: Plane) -> None:
    host = await plane.host()
    for event in (pb.Event(kind="weather", subject="x"), pb.Event(kind="host", subject="")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await host.sync.RecordEvent(hosts_pb2.RecordEventRequest(event=event))
        assert parse_error(caught.value).condition is Condition.INVALID


async def test_only_so_many_are_kept_and_only_for_so_long(tmp_path: Path) -> None:
    now_s = 1_800_000_000.0
    async with open_sqlite(tmp_path / "store.db") as store:
        log = EventLog(store, now_s=lambda: now_s, kept=600)
        for i in range(3):
            await EventLog(store, now_s=lambda: now_s - KEPT_S - 1).record(Event(now_s, "host", "h", "Old", str(i)))
        await store.commit([entry(Event(now_s + i * 1e-3, "host", "h", "New", str(i))) for i in range(700)])
        assert await log.prune() == 103
        kept = [item async for item in log.stored() if isinstance(item, Event)]
        assert [event.message for event in kept] == [str(i) for i in range(100, 700)]
        assert await log.prune() == 0
