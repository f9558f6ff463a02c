"""How many more sandboxes of a class fit, and what the next one fails at. Pure, by the scheduler's own rules.

What one host can take of a class does not depend on the others (unless a rule spreads the class), so each host is
filled by a division for every resource, and what then stands against one more is asked of the scheduler: its refusal
names the resource that binds, with the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from controlplane import scheduler_filters as filters
from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Cluster
from controlplane.capacity.workload import Workload, demand_of
from controlplane.scheduler_index import Index
from controlplane.scheduler_rows import Row
from controlplane.scheduler_values import Demand, Policy, layer_mib

UNBOUNDED = 1 << 40
BINDING = {
    "ShortOfMemory": "memory", "ShortOfCpu": "CPU", "ShortOfPids": "pids", "ShortOfDiskMib": "disk",
    "ShortOfFileDescriptors": "file descriptors", "ShortOfSharedMemoryFiles": "shared-memory files",
    "ShortOfPmemSlots": "pmem slots of a guest",
}  # fmt: skip
"""What a refusal's reason is called in a plan."""


@dataclass(frozen=True)
class HostFit:
    """One host: how many more, which resource binds, and the scheduler's words for it; `alone`: how many each resource
    would allow if nothing else mattered; the host's memory once it is full."""

    host: str
    more: int
    binding: str
    message: str
    alone: tuple[tuple[str, int], ...]
    memory: HostMemory


@dataclass(frozen=True)
class HostMemory:
    """A host's memory in MiB: what its sandboxes have for themselves, what they share, what is kept back, what is
    left."""

    host: str
    private_mib: int
    shared_mib: int
    reserved_mib: int
    free_mib: int
    unshared_mib: int = 0  # what the shared part would take if nobody shared it


@dataclass(frozen=True)
class Need:
    """What one sandbox of the class takes, MiB: each part of it."""

    guaranteed_mib: int
    measured_mib: int  # charged above the guarantee, by measured use
    overhead_mib: int
    page_tables_mib: int
    layers_mib: int  # once a host and domain


@dataclass(frozen=True)
class Fit:
    """The answer. `bindings`: on how many hosts each resource binds."""

    workload: str
    total: int
    need: Need
    hosts: tuple[HostFit, ...]
    bindings: tuple[tuple[str, int], ...]
    unplaced: int = 0  # of what runs already, how many found no place

    @property
    def alone(self) -> tuple[tuple[str, int], ...]:
        """How many each resource would allow over all hosts if nothing else mattered, the scarcest first."""
        sums: Counter[str] = Counter()
        for host in self.hosts:
            for name, count in host.alone:
                sums[name] += count
        return tuple(sorted(sums.items(), key=lambda item: (item[1], item[0])))


def staged(cluster: Cluster, calibration: Calibration, *, diverging: float = 0.0) -> tuple[Index, int]:
    """An index of the hosts with what runs on them, and how many of that found no place."""
    planning = cluster.planning
    index, unplaced = Index(planning.policy, cluster.hosts), 0
    for host, workload in cluster.assigned:
        demand = demand_of(planning.apply(workload), calibration, quantile=planning.quantile, diverging=diverging)
        index.assume(host, demand)
    for workload, count in cluster.running:
        demand = demand_of(planning.apply(workload), calibration, quantile=planning.quantile, diverging=diverging)
        placed = index.place_all([demand] * count)
        unplaced += placed.count(None)
    return index, unplaced


def fit(cluster: Cluster, workload: Workload, calibration: Calibration, *, diverging: float = 0.0) -> Fit:
    """How many more of `workload` fit into a cluster."""
    index, unplaced = staged(cluster, calibration, diverging=diverging)
    planning = cluster.planning
    demand = demand_of(planning.apply(workload), calibration, quantile=planning.quantile, diverging=diverging)
    rule = demand.rules.spread
    counts = _spread_fill(index, demand) if rule is not None and rule.max_skew else None
    hosts = tuple(filled(index, row.name, demand, counts) for row in sorted(index.rows(), key=lambda row: row.name))
    bindings = Counter(host.binding for host in hosts)
    return Fit(
        workload.name, sum(host.more for host in hosts), need_of(workload, demand, calibration), hosts,
        tuple(sorted(bindings.items(), key=lambda item: (-item[1], item[0]))), unplaced,
    )  # fmt: skip


def need_of(workload: Workload, demand: Demand, calibration: Calibration) -> Need:
    """One sandbox's parts."""
    return Need(
        workload.memory_min_mib, demand.charge_mib - workload.memory_min_mib, calibration.guest_overhead_mib,
        demand.extra_mib, sum(map(layer_mib, demand.layers)),
    )  # fmt: skip


def filled(index: Index, host: str, demand: Demand, counts: Mapping[str, int] | None = None) -> HostFit:
    """Fills one host of the index (it stays so) with as many as it takes; `counts`: it has been filled already."""
    row = index.row(host)
    alone = by_resource(row, demand, index.policy) if _usable(row, demand) else (("placement", 0),)
    more = min(count for _, count in alone) if counts is None else counts.get(host, 0)
    if counts is None and more:
        index.assume(host, demand, more)
    spread = filters.counted(demand, index.rows()) if counts is not None else filters.NO_SPREAD
    refused = filters.refusal_of(demand, row, index.policy, spread)
    reason = refused.reason if refused else "unbounded"
    message = refused.message.partition(": ")[2] if refused else "nothing bounds it"
    return HostFit(host, more, BINDING.get(reason, reason), message, alone, memory_of(row))


def _usable(row: Row, demand: Demand) -> bool:
    return (
        row.traits.takes_new
        and filters.unfit_traits(demand, row.traits) is None
        and filters.unfit_presence(demand, row) is None
    )


def _spread_fill(index: Index, demand: Demand) -> dict[str, int]:
    counts: Counter[str] = Counter()
    while (placement := index.place(demand)) is not None:
        index.assume(placement.host, demand)
        counts[placement.host] += 1
    return dict(counts)


def by_resource(row: Row, demand: Demand, policy: Policy) -> tuple[tuple[str, int], ...]:
    """How many more of the demand each resource of a host allows by itself."""
    own_mib, missing_mib = filters.own_mib(demand, row), filters.missing_mib(demand, row, policy)
    each_mib = own_mib if policy.share else own_mib + missing_mib
    once_mib = missing_mib if policy.share else 0
    sizes = row.capacity
    cpu = (int(sizes.cpu_milli * policy.cpu_overcommit) - row.cpu_asked_milli) // demand.cpu_milli
    counts = [
        ("memory", max(0, min(row.unpromised_mib, row.usable_mib) - once_mib) // max(1, each_mib)),
        ("CPU", max(0, cpu) if demand.cpu_milli <= sizes.cpu_milli else 0),
    ]
    counts += [
        (name.replace("_", " ").removesuffix(" mib"), max(0, row.limits[name]) // amount)
        for name, amount in demand.extras
        if amount and name in row.limits
    ]
    return tuple(counts)


def memory_of(row: Row) -> HostMemory:
    """A host's memory as promised now."""
    sizes = row.capacity
    return HostMemory(
        row.name, row.promised_mib, row.mapped_mib, sizes.system_reserve_mib, max(0, row.unpromised_mib),
        sum(count * bundle.size_mib for bundle, count in row.bundles.items()),
    )  # fmt: skip
