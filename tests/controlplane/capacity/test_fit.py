"""How many fit: the same as the scheduler would place one by one, with the resource that binds named, whichever it
is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.capacity import cluster as clusters
from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Cluster, Planning, empty_host
from controlplane.capacity.fit import fit, staged
from controlplane.capacity.packing import pack
from controlplane.capacity.workload import Image, Workload, demand_of
from controlplane.errors import ConfigError
from controlplane.model import LayerSize
from controlplane.scheduler_values import MIB, HostState
from tests.bench.milp import bound

CALIBRATION = Calibration()
BASE = LayerSize("base", 100 * MIB)


def workload(
    name: str = "web", memory_mib: int = 256, most_mib: int = 256, cpu_milli: int = 100, own_mib: int = 50
) -> Workload:
    image = Image(name, (BASE, LayerSize(f"{name}-own", own_mib * MIB)))
    return Workload(name, memory_mib, most_mib, cpu_milli, image)


def host(name: str = "h", memory_mib: int = 8192, cpu_milli: int = 8000, **how: object) -> HostState:
    return empty_host(name, memory_mib, cpu_milli, CALIBRATION, reserve_mib=512, **how)  # type: ignore[arg-type]


works = st.builds(
    workload, st.sampled_from(("web", "db")), st.integers(16, 900), st.integers(900, 2000), st.integers(1, 3000),
    st.integers(0, 700),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    works, works, st.integers(0, 12),
    st.lists(st.tuples(st.integers(600, 9000), st.integers(500, 4000)), min_size=1, max_size=4),
    st.sampled_from((Planning(), Planning(share=False), Planning(cpu_overcommit=2.0))), st.integers(8, 60),
)  # fmt: skip
def test_as_many_fit_as_the_scheduler_places_one_by_one(
    wanted: Workload, other: Workload, running: int, sizes: list[tuple[int, int]], planning: Planning, pids: int
) -> None:
    hosts = tuple(host(f"h{at}", *size, limits={"pids": pids}) for at, size in enumerate(sizes))
    cluster = Cluster(hosts, {}, ((other, running),), planning)
    found = fit(cluster, wanted, CALIBRATION)
    index, _ = staged(cluster, CALIBRATION)
    demand = demand_of(planning.apply(wanted), CALIBRATION, quantile=planning.quantile)
    placed = 0
    while (placement := index.place(demand)) is not None:
        index.assume(placement.host, demand)
        placed += 1
    assert found.total == placed
    assert sum(count for _, count in found.bindings) == len(hosts)


@pytest.mark.parametrize(
    ("changes", "limits", "slots", "binding"),
    [
        ({}, {}, 0, "memory"),
        ({"cpu_milli": 4000}, {}, 0, "CPU"),
        ({}, {"pids": 20}, 0, "pids"),
        ({}, {"file_descriptors": 200}, 0, "file descriptors"),
        ({}, {"shared_memory_files": 5}, 0, "shared-memory files"),
        ({}, {"disk_mib": 40}, 0, "disk"),
        ({}, {}, 1, "pmem slots of a guest"),
    ],
)
def test_every_hidden_limit_is_named_when_it_binds(
    changes: dict[str, int], limits: dict[str, int], slots: int, binding: str
) -> None:
    one = host(cpu_milli=1000 if "cpu_milli" in changes else 8000, limits=limits, pmem_slots=slots)
    wanted = workload(**{"cpu_milli": 100, **dict.fromkeys(changes, 1000)})  # type: ignore[arg-type]
    found = fit(Cluster((one,), {}), wanted, CALIBRATION)
    assert dict(found.bindings) == {binding: 1}
    assert found.hosts[0].message
    assert found.total == (0 if slots else min(count for _, count in found.hosts[0].alone))


def test_sharing_and_page_tables_are_counted() -> None:
    cluster = Cluster((host(),), {})
    wanted = workload(most_mib=1024)
    shared = fit(cluster, wanted, CALIBRATION)
    assert shared.need.page_tables_mib == -(-(1024 + 150) // 512)
    assert shared.total == (8192 - 512 - 150) // (256 + 64 + 3)
    blind = fit(replace(cluster, planning=Planning(share=False)), wanted, CALIBRATION)
    assert blind.total == (8192 - 512) // (256 + 64 + 3 + 150)
    some = fit(cluster, wanted, CALIBRATION, diverging=0.1).total
    assert blind.total < some < shared.total


def test_measured_use_is_charged_by_the_policys_quantile() -> None:
    measured = replace(workload(most_mib=1024), use_mib=400.0, use_std_mib=100.0)
    half = fit(Cluster((host(),), {}, planning=Planning(quantile=0.5)), measured, CALIBRATION)
    most = fit(Cluster((host(),), {}, planning=Planning(quantile=0.99)), measured, CALIBRATION)
    assert half.need.measured_mib == 400 - 256
    assert most.need.measured_mib == 633 - 256
    assert (
        most.total
        < half.total
        < fit(Cluster((host(),), {}, planning=Planning(quantile=0)), measured, CALIBRATION).total
    )


def test_a_packing_is_within_5_percent_of_what_can_be_proved() -> None:
    hosts = [host("a", 4096), host("b", 6144), host("c", 3072)]
    wanted = [
        (demand_of(workload(name, 150 * (at + 1), 150 * (at + 1), 500, 40 + 300 * (at % 2)), CALIBRATION), 6 + at)
        for at, name in enumerate(("a", "b", "c", "d"))
    ]
    found = pack(wanted, hosts, Planning().policy)
    best = bound(wanted, hosts, time_s=20)
    assert 0.95 * best <= found.total <= best + 1e-6
    everything = pack([(demand, 1) for demand, _ in wanted], hosts, Planning().policy)
    assert everything.complete


GOOD = """
[[hosts]]
name = "big"
count = 2
memory = "8G"
cpus = 4
labels = ["zone=eu"]
pids = 100
[images.debian]
layers = ["base=100M"]
[classes.web]
memory = "256M:1G"
cpus = 0.5
image = "debian"
spread = "host"
[[running]]
class = "web"
count = 3
"""


def test_a_cluster_file_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(GOOD)
    cluster = clusters.load(path)
    assert [one.name for one in cluster.hosts] == ["big-0001", "big-0002"]
    assert cluster.hosts[0].limits == {"pids": 100}
    assert (cluster.classes["web"].memory_max_mib, cluster.running[0][1]) == (1024, 3)
    assert sum(row.promised_mib > 0 for row in staged(cluster, CALIBRATION)[0].rows()) == 2
    for wrong, complaint in (
        (GOOD + "[nonsense]\n", "unknown key 'nonsense'"),
        (GOOD.replace('memory = "8G"', 'memory = "8"'), "hosts 1: memory"),
        (GOOD.replace("cpus = 4", ""), "cpus is missing"),
        (GOOD.replace('image = "debian"', 'image = "other"'), "no [images.other]"),
        (GOOD.replace("count = 3", "count = -3"), "running 1: count"),
        (GOOD.replace('spread = "host"', 'spread = ":"'), "spread"),
        (GOOD.replace("count = 2", "cuont = 2"), "cuont"),
        ("= 3", "is not TOML"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=complaint.replace("[", r"\[")):
            clusters.load(path)
