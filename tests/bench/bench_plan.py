"""The planner: its replay against the same simulation written plainly in SimPy, the whole openb trace, a large cluster,
memory over size, and packings against what a MILP can prove.

    speed_vs_simpy     the plain simulation's CPU time over ours, on the first openb pods, arriving 40 times as fast;
    both must
                       come to the same result, sandbox by sandbox
    openb_s            seconds for the whole openb trace over all its nodes, reading it included
    large_vms_per_s    sandboxes a second with 40,000 of them on 20,000 hosts; CloudSim Plus publishes 510 VMs/s (Silva
    Filho et
                       al., "CloudSim Plus", IM 2017, and its site: 20,000 hosts, 40,000 VMs)
    memory_growth      memory a sandbox of a run four times as large, over that of the small one: 1 is linear
    packing            the worst share of a MILP's bound that a packing reaches, over seeded small instances
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from random import Random

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Planning, empty_host
from controlplane.capacity.packing import pack
from controlplane.capacity.replay import replay
from controlplane.capacity.trace import Arrival, Trace, compressed, in_order
from controlplane.capacity.trace_public import openb_hosts, read
from controlplane.capacity.workload import Image, Workload, demand_of
from controlplane.model import LayerSize
from controlplane.scheduler_values import MIB, Demand, HostState
from tests.bench.milp import bound
from tests.bench.plainsim import Plain
from tests.bench.report import CannotMeasure, Report, Runs, interleaved, ratio, run
from tests.bench.traces import OPENB_NODES, OPENB_PODS, folder

ROUNDS = 3
PODS, LOAD = 2500, 40.0
LARGE_HOSTS, LARGE_VMS = 20_000, 40_000
CLOUDSIM_VMS_S = 510
INSTANCES, MILP_S = 6, 60.0
CALIBRATION, PLANNING = Calibration(), Planning()
BARS = (
    ("speed_vs_simpy", 10.0),
    ("openb_s", 60.0),
    ("large_vms_per_s", 510.0),
    ("memory_growth", 1.2),
    ("packing", 0.95),
)


def on_openb(report: Report) -> None:
    data = folder()
    hosts = openb_hosts(data / OPENB_NODES, CALIBRATION)
    whole = read(data / OPENB_PODS, {})
    part = compressed(Trace(whole.arrivals[:PODS], whole.note), LOAD)
    results: dict[str, list[object]] = {}

    def ours() -> float:
        begun = time.process_time()
        results["ours"] = list(replay(hosts, part, PLANNING, CALIBRATION).outcomes)
        return time.process_time() - begun

    def plain() -> float:
        begun = time.process_time()
        results["plain"] = list(Plain(hosts, part, PLANNING, CALIBRATION).run())
        return time.process_time() - begun

    taken = interleaved({"plain": plain, "ours": ours}, ROUNDS, "s")
    if results["ours"] != results["plain"]:
        raise CannotMeasure("the two simulations differ: the speed of a wrong answer is not measured")
    report.row(f"plain SimPy, {PODS:,} pods on {len(hosts):,} hosts", taken["plain"])
    report.row("the planner, to the same result", taken["ours"])
    report.bar(
        "speed_vs_simpy", ratio(taken["plain"], taken["ours"]), at_least=10, peer="the same simulation plainly in SimPy"
    )
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        nodes, events = openb_hosts(data / OPENB_NODES, CALIBRATION), read(data / OPENB_PODS, {})
        replay(nodes, events, PLANNING, CALIBRATION)
        times.append(time.perf_counter() - begun)
    report.bar("openb_s", Runs(tuple(times), "s"), at_most=60, peer="8,152 pods, 1,523 hosts")


def synthetic(hosts: int, vms: int, seed: int) -> tuple[list[HostState], Trace]:
    """Hosts of two sizes, and sandboxes of 100 images that arrive over a day and stay for a quarter of it on
    average."""
    random = Random(seed)
    made = [empty_host(f"h{at:05}", 65_536 << (at % 2), 32_000, CALIBRATION) for at in range(hosts)]
    own = [LayerSize(f"own{at}", random.randint(20, 600) * MIB) for at in range(100)]
    images = [Image(f"i{at}", (LayerSize(f"base{at % 4}", 150 * MIB), own[at])) for at in range(100)]
    works = [
        Workload(f"w{at}", 512 << (at % 4), 1024 << (at % 4), 1000, images[at], f"t{at % 10}") for at in range(100)
    ]  # fmt: skip
    arrivals = (
        Arrival(random.uniform(0, 86_400), random.expovariate(1 / 21_600), f"s{at}", random.choice(works))
        for at in range(vms)
    )
    return made, in_order(arrivals)


def large(report: Report) -> None:
    rates = []
    for turn in range(ROUNDS):
        hosts, trace = synthetic(LARGE_HOSTS, LARGE_VMS, turn)
        begun = time.perf_counter()
        run_ = replay(hosts, trace, PLANNING, CALIBRATION)
        rates.append(LARGE_VMS / (time.perf_counter() - begun))
        if run_.waiting:
            raise CannotMeasure(f"{run_.waiting} sandboxes found no place: the cluster is too small")
    report.bar("large_vms_per_s", Runs(tuple(rates), "/s"), at_least=CLOUDSIM_VMS_S, peer="CloudSim Plus, as published")


def memory(report: Report) -> None:
    def each(hosts: int, vms: int) -> float:
        gc.collect()
        tracemalloc.start()
        try:
            made, trace = synthetic(hosts, vms, 1)
            replay(made, trace, PLANNING, CALIBRATION)
            return tracemalloc.get_traced_memory()[1] / vms
        finally:
            tracemalloc.stop()

    small, big = each(1500, 3000), each(6000, 12_000)
    report.row("memory a sandbox, 3,000 on 1,500 hosts", Runs((small / 1024,), "KiB"))
    report.row("memory a sandbox, 12,000 on 6,000 hosts", Runs((big / 1024,), "KiB"))
    report.bar("memory_growth", Runs((big / small,), "x"), at_most=1.2, peer="linear: 1")


def instance(seed: int) -> tuple[list[tuple[Demand, int]], list[HostState]]:
    """Three to five hosts, and six to eight classes of three images, half as much again as fits."""
    random = Random(seed)
    hosts = [
        empty_host(f"h{at}", random.choice((16_384, 32_768, 49_152)), 64_000, CALIBRATION)
        for at in range(random.randint(3, 5))
    ]
    images = [
        Image(f"i{at}", (LayerSize(f"base{at % 2}", 800 * MIB), LayerSize(f"own{at}", random.randint(300, 4000) * MIB)))
        for at in range(3)
    ]
    classes = []
    for at in range(random.randint(6, 8)):
        size_mib = random.choice((512, 900, 1500, 2500, 4000))
        work = Workload(f"w{at}", size_mib, size_mib, 500, random.choice(images))
        classes.append((demand_of(work, CALIBRATION), random.randint(3, 14)))
    return classes, hosts


def packing(report: Report) -> None:
    shares, worst = [], 1.0
    for seed in range(INSTANCES):
        wanted, hosts = instance(seed)
        best = bound(wanted, hosts, time_s=MILP_S)
        shares.append(pack(wanted, hosts, PLANNING.policy).total / best)
        worst = min(worst, shares[-1])
    report.row(f"packing over the MILP's bound, {INSTANCES} instances", Runs(tuple(shares), "x"))
    report.bar("packing", Runs((worst,), "x"), at_least=0.95, peer="HiGHS's bound; the worst instance")


def body(report: Report) -> None:
    packing(report)
    memory(report)
    large(report)
    try:
        on_openb(report)
    except CannotMeasure as lack:
        report.unmeasured("speed_vs_simpy", str(lack), at_least=10, peer="the same simulation plainly in SimPy")
        report.unmeasured("openb_s", str(lack), at_most=60)


if __name__ == "__main__":
    raise SystemExit(run("plan", body, promised=BARS))
