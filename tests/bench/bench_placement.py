"""Placement: decisions a second and their slowest hundredth at 10,000 hosts, how a decision's cost grows with the
hosts, and how many more sandboxes of the openb trace are placed than by best fit that is blind to sharing.

The stream of openb: its pods in the file's order, drawn again and again with a seed until twice the hosts' memory is
asked for (the inflation of "Beware of Fragmentation"), tagged with images by the rule of capacity/trace_public.py. Both
sides get the same stream and the same hosts, honour the same guarantees (a pod's memory, all of it, and all pages of
its layers), and allow CPU to be asked for 16 times over. Best fit, written plainly here, charges every sandbox its own
copy of its layers, as block devices and page caches of guests do, and takes the host with the least room that fits.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Planning, empty_host
from controlplane.capacity.trace import Arrival
from controlplane.capacity.trace_public import Assumed, openb_hosts, read
from controlplane.capacity.workload import Image, Workload, demand_of
from controlplane.model import LayerSize
from controlplane.scheduler_index import Index
from controlplane.scheduler_values import MIB, Demand, HostState, layer_mib
from tests.bench.report import CannotMeasure, Report, Runs, run
from tests.bench.traces import OPENB_NODES, OPENB_PODS, folder

HOSTS, DECISIONS = 10_000, 20_000
GROWTH = (1_000, 10_000, 100_000)
ROUNDS = 3
BARS = (("placed_per_s", 1000), ("openb_more_placed", 1.15))
CALIBRATION = Calibration()


def synthetic(count: int, seed: int) -> tuple[list[HostState], list[Demand]]:
    """Hosts of three sizes in four zones, and classes of 200 images of 20 tenants, most of which share a base."""
    random = Random(seed)
    hosts = [
        empty_host(
            f"h{number:06}",
            random.choice((65_536, 131_072, 262_144)),
            random.choice((16_000, 32_000, 64_000)),
            CALIBRATION,
            labels=(("zone", "abcd"[number % 4]),),
            accel="kvm",
        )
        for number in range(count)
    ]
    demands = []
    for number in range(200):
        layers = (
            LayerSize(f"base-{number % 5}", (120 + 40 * (number % 5)) * MIB),
            LayerSize(f"own-{number}", random.randint(10, 900) * MIB),
        )
        least_mib = random.choice((256, 512, 1024, 4096))
        work = Workload(
            f"w{number}",
            least_mib,
            2 * least_mib,
            random.choice((500, 1000, 2000)),
            Image(f"i{number}", layers),
            f"t{number % 20}",
        )
        demands.append(demand_of(work, CALIBRATION))
    return hosts, demands


def decide(index: Index, demands: Sequence[Demand], decisions: int, seed: int) -> list[float]:
    """CPU seconds of each decision (it waits for nothing, so on a quiet machine that is what it takes), the taking of
    its room included; every third is followed by an end, timed apart."""
    random, taken_s, there = Random(seed), [], []
    for number in range(decisions):
        demand = random.choice(demands)
        begun = time.thread_time()
        placement = index.place(demand)
        if placement is not None:
            index.assume(placement.host, demand)
        taken_s.append(time.thread_time() - begun)
        if placement is not None:
            there.append((placement.host, demand))
        if number % 3 == 2 and there:
            at = random.randrange(len(there))
            there[at], there[-1] = there[-1], there[at]
            index.release(*there.pop())
    return taken_s


def speed(report: Report) -> None:
    rates: list[float] = []
    slowest_ms: list[float] = []
    means: dict[int, list[float]] = {count: [] for count in GROWTH}
    for turn in range(ROUNDS):
        for count in GROWTH:
            hosts, demands = synthetic(count, seed=turn)
            index = Index(Planning().policy, hosts)
            decide(index, demands, 2000, seed=turn)  # an index that has seen its images
            taken_s = decide(index, demands, DECISIONS if count == HOSTS else 6000, seed=turn + 100)
            means[count].append(1e6 * sum(taken_s) / len(taken_s))
            if count == HOSTS:
                rates.append(len(taken_s) / sum(taken_s))
                slowest_ms.append(1e3 * sorted(taken_s)[int(0.99 * len(taken_s))])
    for count in GROWTH:
        report.row(f"a decision at {count:,} hosts", Runs(tuple(means[count]), "us"))
    report.bar("placed_per_s", Runs(tuple(rates), "/s"), at_least=1000, peer="at 10,000 hosts")
    report.bar("placed_p99_ms", Runs(tuple(slowest_ms), "ms"), at_most=5, peer="at 10,000 hosts")
    small, large = GROWTH[0], GROWTH[-1]
    growth = tuple(b / a for a, b in zip(means[small], means[large], strict=True))
    most = math.log(large) / math.log(small)
    report.bar(
        "cost_growth", Runs(growth, "x"), at_most=round(most, 2), peer=f"log({large:,}) / log({small:,}) of the hosts"
    )


class BlindBestFit:
    """The host with the least room that holds all of it; everybody pays its own layers."""

    def __init__(self, hosts: Sequence[HostState]) -> None:
        self.cpu_left = {host.name: 16 * host.capacity.cpu_milli for host in hosts}
        self.rooms = sorted((host.capacity.memory_mib - host.capacity.system_reserve_mib, host.name) for host in hosts)
        self.largest = {host.name: host.capacity.cpu_milli for host in hosts}

    def place(self, demand: Demand) -> bool:
        need_mib = (
            demand.charge_mib + CALIBRATION.guest_overhead_mib + demand.extra_mib + sum(map(layer_mib, demand.layers))
        )
        for at in range(bisect_left(self.rooms, (need_mib, "")), len(self.rooms)):
            room_mib, name = self.rooms[at]
            if demand.cpu_milli <= min(self.cpu_left[name], self.largest[name]):
                del self.rooms[at]
                insort(self.rooms, (room_mib - need_mib, name))
                self.cpu_left[name] -= demand.cpu_milli
                return True
        return False


def stream(arrivals: Sequence[Arrival], hosts: Sequence[HostState], seed: int) -> list[Demand]:
    """Pods until twice the hosts' memory is asked for."""
    random, left_mib, demands = Random(seed), 2 * sum(host.capacity.memory_mib for host in hosts), []
    made: dict[Workload, Demand] = {}
    while left_mib > 0:
        work = random.choice(arrivals).workload
        if work not in made:
            made[work] = demand_of(work, CALIBRATION)
        demands.append(made[work])
        left_mib -= work.memory_min_mib
    return demands


def openb(report: Report) -> None:
    data = folder()
    hosts = openb_hosts(data / OPENB_NODES, CALIBRATION)
    variants = {"": Assumed(), "images half as large": Assumed(image_scale=0.5), "four tenants": Assumed(tenants=4)}
    for variant, assumed in variants.items():
        ours, blind, more = [], [], []
        for seed in range(1, ROUNDS + 1):
            arrivals = read(data / OPENB_PODS, {}, replace(assumed, seed=seed)).arrivals
            demands = stream(arrivals, hosts, seed)
            placed = [one for one in Index(Planning().policy, hosts).place_all(demands) if one is not None]
            other = BlindBestFit(hosts)
            placed_blind = sum(other.place(demand) for demand in demands)
            ours.append(float(len(placed)))
            blind.append(float(placed_blind))
            more.append(len(placed) / placed_blind)
        if variant:
            report.row(f"openb, {variant}: ratio", Runs(tuple(more), "x"))
            continue
        report.row("openb: blind best fit", Runs(tuple(blind), "pods"))
        report.row("openb: sharing-aware", Runs(tuple(ours), "pods"))
        report.bar("openb_more_placed", Runs(tuple(more), "x"), at_least=1.15, peer="best fit blind to sharing")


def body(report: Report) -> None:
    speed(report)
    try:
        openb(report)
    except CannotMeasure as lack:
        report.unmeasured("openb_more_placed", str(lack), at_least=1.15, peer="best fit blind to sharing")


if __name__ == "__main__":
    raise SystemExit(run("placement", body, promised=BARS))
