"""`sandloom plan`: answers, exit status, reports, and the running fabric as its state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.api.v1 import hosts_pb2, images_pb2, sandboxes_pb2
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric

CLUSTER = """
[[hosts]]
name = "h"
count = 2
memory = "8G"
cpus = 8
pids = 1000
[images.debian]
layers = ["base=100M", "app=100M"]
[classes.web]
memory = "256M:512M"
cpus = 0.5
image = "debian"
[classes.db]
memory = "1G"
cpus = 1
image = "debian"
"""
TRACE = "time_s,lifetime_s,class\n" + "".join(f"{at},1000,web\n" for at in range(20))


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def test_fit_says_how_many_and_why_no_more(cli: Cli, cluster: str, tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    out = cli.ok(
        "plan", "fit", "web", "--cluster", cluster, "--without-sharing", "--diverge", "10", "--report", str(report)
    )
    assert "more web fit on 2 hosts; without sharing" in out
    assert "memory on 2 hosts" in out
    assert "<svg" in report.read_text()
    data = json.loads(cli.ok("plan", "fit", "web", "--cluster", cluster, "--without-sharing", "-o", "json"))
    assert data["fit"]["total"] == 2 * ((8192 - 200) // (256 + 64 + 2))
    assert data["without_sharing"] < data["fit"]["total"]


def test_what_does_not_fit_ends_with_1(cli: Cli, cluster: str) -> None:
    assert cli("plan", "fit", "web=40", "--cluster", cluster).code == 0
    done = cli("plan", "fit", "web=400", "--cluster", cluster)
    assert (done.code, "400 web do not fit" in done.out) == (1, True)
    assert cli("plan", "fit", "web=10", "db=4", "--cluster", cluster).code == 0
    done = cli("plan", "fit", "web=40", "db=40", "--cluster", cluster)
    assert (done.code, "the demand does not fit" in done.out) == (1, True)


def test_replay_measures_and_finds_hosts(cli: Cli, cluster: str, trace: str, tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    out = cli.ok("plan", "replay", trace, "--cluster", cluster, "--smallest", "--report", str(report))
    assert "20 sandboxes on 2 hosts: 99 % waited 0 s at most, 0 found no place; the target is met" in out
    assert "the smallest number that meets the target: 1 host" in out
    assert report.read_text().count("<svg") == 3
    done = cli("plan", "replay", trace, "--cluster", cluster, "--hosts", "2", "--lose", "1", "-o", "json")
    data = json.loads(done.out)
    assert (done.code, data["evicted"] > 0, data["target_met"]) == (0, True, True)


def test_whatif_shows_both(cli: Cli, cluster: str, trace: str) -> None:
    data = json.loads(cli.ok("plan", "whatif", "web", "--cluster", cluster, "--hosts", "+2", "-o", "json"))
    rows = {row["what"]: (row["before"], row["after"]) for row in data["rows"]}
    assert rows["hosts"] == (2, 4)
    assert rows["web that fit"][1] == 2 * rows["web that fit"][0]
    out = cli.ok("plan", "whatif", trace, "--cluster", cluster, "--set-memory", "1G:2G")
    assert "changed: memory 1024:2048 MiB" in out
    assert cli("plan", "whatif", "web", "--cluster", cluster).code == 2
    assert cli("plan", "whatif", "web", "--cluster", cluster, "--hosts", "-2").code == 2


def test_rightsize_of_a_history(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("workload,time_s,memory_mib\n" + "".join(f"web,{60 * at},{100 + at % 7}\n" for at in range(500)))
    out = cli.ok("plan", "rightsize", str(path))
    assert out.splitlines()[1].split()[0] == "web"
    assert "500" in out


def test_the_running_fabric_is_a_state(fabric: FakeFabric, cli: Cli) -> None:
    layer = images_pb2.Layer(digest="sha256:1", size_bytes=100 << 20)
    fabric.images["debian"].layers.append(layer)
    sizes = hosts_pb2.HostCapacity(
        memory_mib=4096, memory_available_mib=4000, cpu_milli=4000, system_reserve_mib=512, vm_overhead_mib=64,
        disk_free_mib=50_000,
    )  # fmt: skip
    fabric.hosts["loom"] = hosts_pb2.Host(
        name="loom", state=hosts_pb2.READY, capacity=sizes, classes=[sandboxes_pb2.GUEST_KERNEL], accel="tcg"
    )
    fabric.add("box")
    fit = ("plan", "fit", "debian", "--memory", "256M:1G", "-o", "json")
    one = 256 + 64 + 3
    assert json.loads(cli.ok(*fit))["fit"]["total"] == (4096 - 512 - 100 - one) // one
    limits = fabric.hosts["loom"].limits
    limits.add(name="pids", left=3 * 7 + 6)
    limits.add(name="pmem_slots", left=1, of_a_guest=True)
    data = json.loads(cli.ok(*fit))
    assert (data["fit"]["total"], data["fit"]["hosts"][0]["binding"]) == (3, "pids")  # beside those that run
    limits[1].left = 0
    assert "pmem slots of a guest" in cli(*fit[:5]).out
    done = cli("plan", "fit", "nothing", "--memory", "1G")
    assert (done.code, "no class or image nothing" in done.err) == (1, True)
    assert cli("plan", "fit", "debian").code == 2


@pytest.mark.parametrize(
    "line",
    [
        "plan fit web=0",
        "plan fit web db",
        "plan fit web --diverge 200",
        "plan replay x --load 0",
        "plan replay x --lose -1",
    ],
)
def test_a_wrong_line_is_2(cli: Cli, line: str) -> None:
    assert cli(*line.split()).code == 2


def test_a_missing_file_is_named(cli: Cli, tmp_path: Path) -> None:
    done = cli("plan", "fit", "web", "--cluster", str(tmp_path / "none.toml"))
    assert (done.code, "none.toml: cannot be read" in done.err) == (1, True)
