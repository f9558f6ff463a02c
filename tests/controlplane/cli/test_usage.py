"""`sandloom usage`, and the plan that replays it, over a real connection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.api.v1 import hosts_pb2, images_pb2, sandboxes_pb2
from tests.controlplane.cli.conftest import NOW_S, Cli
from tests.controlplane.cli.fakefabric import FakeFabric


def at(message: object, seconds_ago: float) -> None:
    message.FromNanoseconds(int((NOW_S - seconds_ago) * 1e9))  # type: ignore[attr-defined]


@pytest.fixture
def lived(fabric: FakeFabric) -> FakeFabric:
    web = fabric.add("web")
    setattr(web.spec, "class", sandboxes_pb2.GUEST_KERNEL)
    at(web.created_at, 3600)
    at(web.status.started_at, 3600)
    for age_s in (7200, 10_800, 20_000):  # three that are gone: the fake gives pages of two
        gone = sandboxes_pb2.Usage(name=f"job-{age_s}", uid=f"u{age_s}", tenant="default", image="debian")
        gone.resources.CopyFrom(sandboxes_pb2.Resources(memory_min_mib=1024, memory_max_mib=2048, cpu_milli=500))
        setattr(gone, "class", sandboxes_pb2.HOST_KERNEL)
        at(gone.created_at, age_s)
        at(gone.started_at, age_s)
        at(gone.ended_at, age_s - 1800)
        fabric.usage.append(gone)
    return fabric


def test_present_and_gone_are_listed_by_age_and_summed(lived: FakeFabric, cli: Cli) -> None:
    done = cli("usage")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "job-20000", "job-10800", "job-7200", "web"]
    assert lines[1].split() == ["job-20000", "debian", "host-kernel", "1G", "0.5", *lines[1].split()[5:6], "30m",
                                "0.500", "0.250"]  # fmt: skip
    assert "4 sandboxes: 1.750 GiB h guaranteed, 1.750 CPU h" in done.err
    rows = json.loads(cli.ok("usage", "--since", "1h", "-o", "json"))
    assert [(row["name"], row["ran_s"], row["class"]) for row in rows] == [("web", 3600.0, "guest-kernel")]


def test_a_replay_of_the_fabric_knows_those_that_are_gone(lived: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    lived.images["debian"].layers.append(images_pb2.Layer(digest="sha256:1", size_bytes=100 << 20))
    sizes = hosts_pb2.HostCapacity(
        memory_mib=4096, memory_available_mib=4000, cpu_milli=4000, system_reserve_mib=512, vm_overhead_mib=64
    )
    classes = [sandboxes_pb2.GUEST_KERNEL, sandboxes_pb2.HOST_KERNEL]
    lived.hosts["loom"] = hosts_pb2.Host(
        name="loom", state=hosts_pb2.READY, capacity=sizes, classes=classes, accel="tcg"
    )
    data = json.loads(cli.ok("plan", "replay", "live", "-o", "json"))
    assert (data["arrivals"], data["waiting"]) == (4, 0)
    trace = tmp_path / "trace.csv"
    trace.write_text(cli.ok("usage", "-o", "csv"))
    assert "sha256:1=100" in trace.read_text()
    again = json.loads(cli.ok("plan", "replay", str(trace), "-o", "json"))
    assert (again["arrivals"], again["waiting"]) == (4, 0)
