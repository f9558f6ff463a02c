"""Where a sandbox goes: pure functions over values, used by the control plane and by the planner alike.

A host is filtered by what its hostd will admit and by the sandbox's rules (scheduler_filters.py), and scored
(scheduler_values.Score): first the evenness of its spread, then a ready member of a warm pool, then how strained the
host would be, then *marginal memory*: what this sandbox adds there. Layers that a live sandbox of the same sharing
domain already maps there add nothing, so sandboxes of one image gather while the host is not strained by it. The
tightest fit wins among equals, so that large rooms stay whole for large sandboxes.

`place` here looks at every host and is the definition; `scheduler_index.Index` gives the same answers in a time that
grows with the logarithm of the hosts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from controlplane import lifecycle
from controlplane import scheduler_filters as filters
from controlplane.model import Host, Phase, Residency, Sandbox
from controlplane.scheduler_filters import NO_SPREAD, SpreadCounts
from controlplane.scheduler_filters import claimable as claimable
from controlplane.scheduler_values import DEFAULT_POLICY as DEFAULT_POLICY
from controlplane.scheduler_values import Decision as Decision
from controlplane.scheduler_values import Demand as Demand
from controlplane.scheduler_values import HostFacts, Score, layer_mib
from controlplane.scheduler_values import HostState as HostState
from controlplane.scheduler_values import Placement as Placement
from controlplane.scheduler_values import Policy as Policy
from controlplane.scheduler_values import Refusal as Refusal

Expected = Mapping[tuple[str, str], int]
"""The charged quantile of measured use in MiB, by (tenant, image digest)."""
NOTHING_MEASURED: Expected = {}


def survey(
    hosts: Iterable[Host], alive: Iterable[str], sandboxes: Iterable[Sandbox], residency: Iterable[Residency],
    expected: Expected = NOTHING_MEASURED,
) -> list[HostState]:  # fmt: skip
    """The hosts' states from what is recorded, by name."""
    living = frozenset(alive)
    by_host: dict[str, list[Sandbox]] = {}
    for sandbox in sandboxes:
        by_host.setdefault(sandbox.host, []).append(sandbox)
    held: dict[str, list[Residency]] = {}
    for one in residency:
        held.setdefault(one.host, []).append(one)
    return [
        host_state(host, host.name in living, by_host.get(host.name, []), held.get(host.name, []), expected)
        for host in sorted(hosts, key=lambda host: host.name)
    ]


def host_state(
    host: Host, ready: bool, there: Iterable[Sandbox], held: Iterable[Residency], expected: Expected = NOTHING_MEASURED,
    *, cordoned: bool = False,
) -> HostState:  # fmt: skip
    """One host's state: `there` is assigned to it (what has ended does not count), `held` is what it holds."""
    live = [sandbox for sandbox in there if sandbox.status.phase not in lifecycle.ENDED]
    demands = [_present(sandbox, expected) for sandbox in live]
    unsettled = [demand for sandbox, demand in zip(live, demands, strict=True) if _unsettled(sandbox, host.last_seen_s)]
    pooled_mib = sum(
        (pool.ready + pool.making) * (pool.memory_min_mib + host.capacity.vm_overhead_mib) for pool in host.pools
    )
    empty = HostState(
        name=host.name,
        ready=ready,
        capacity=host.capacity,
        classes=frozenset(host.classes),
        images=frozenset((residency.tenant, residency.digest) for residency in held),
        mapped_layers=frozenset(),
        promised_mib=pooled_mib,
        ceilings_mib=pooled_mib,
        pools=host.pools,
        labels=host.labels,
        taints=host.taints,
        accel=host.accel,
        smt=host.smt,
        cordoned=cordoned,
        limits=_reported(host, demands, unsettled),
        guest_limits=tuple((limit.name, limit.left) for limit in host.limits if limit.of_a_guest),
    )
    return loaded(empty, demands, unsettled)


def _reported(host: Host, demands: Iterable[Demand], unsettled: Iterable[Demand]) -> dict[str, int]:
    """What an empty host would have of each counted thing: a report tells what is left beside those it knows."""
    known = Counter[str]()
    for demand in demands:
        known.update(dict(demand.extras))
    for demand in unsettled:
        known.subtract(dict(demand.extras))
    return {limit.name: limit.left + known[limit.name] for limit in host.limits if not limit.of_a_guest}


def loaded(
    empty: HostState, demands: Sequence[Demand], unsettled: Sequence[Demand], *, share: bool = True
) -> HostState:
    """A host on which nothing runs, with these running there; its last report knows nothing of the unsettled ones."""
    overhead_mib = empty.capacity.vm_overhead_mib

    def own(some: Iterable[Demand]) -> int:
        return sum(demand.charge_mib + overhead_mib + demand.extra_mib for demand in some)

    maps = [((demand.domain, layer.digest), layer_mib(layer)) for demand in demands for layer in demand.layers]
    groups = Counter((demand.tenant, demand.group) for demand in demands)
    taken = Counter[str]()
    for demand in demands:
        taken.update(dict(demand.extras))
    return replace(
        empty,
        mapped_layers=frozenset(dict(maps)),
        promised_mib=empty.promised_mib + own(demands),
        unsettled_mib=empty.unsettled_mib + own(unsettled),
        cpu_asked_milli=sum(demand.cpu_milli for demand in demands),
        settling=len(unsettled),
        mapped_mib=sum(dict(maps).values()) if share else sum(size_mib for _, size_mib in maps),
        ceilings_mib=empty.ceilings_mib + own(demands) + sum(d.ceiling_mib - d.charge_mib for d in demands),
        dedicated_to=min((demand.tenant for demand in demands if demand.rules.trust.dedicated), default=""),
        groups=groups,
        tenants=frozenset(demand.tenant for demand in demands),
        limits={name: left - taken[name] for name, left in empty.limits.items()},
    )


def demand_of(sandbox: Sandbox, expected: Expected = NOTHING_MEASURED) -> Demand:
    """What a recorded sandbox asks, with what its workload was measured to use."""
    return Demand.of(sandbox, expected.get((sandbox.tenant, sandbox.spec.image_digest), 0))


def _present(sandbox: Sandbox, expected: Expected) -> Demand:
    """What a sandbox takes on its host: a parked one no memory and CPU, but it is its tenant's still."""
    demand = demand_of(sandbox, expected)
    if sandbox.status.phase is not Phase.PARKED:
        return demand
    return replace(demand, memory_min_mib=0, memory_max_mib=0, expected_mib=0, cpu_milli=0, layers=())


def _unsettled(sandbox: Sandbox, reported_at_s: float) -> bool:
    if sandbox.status.phase in (Phase.SCHEDULED, Phase.STARTING):
        return True
    return sandbox.status.started_at_s is not None and sandbox.status.started_at_s >= reported_at_s


def refusal(
    demand: Demand, host: HostFacts, policy: Policy = DEFAULT_POLICY, spread: SpreadCounts = NO_SPREAD
) -> Refusal | None:
    """Why `host` cannot take it, or None when it can."""
    return filters.refusal_of(demand, host, policy, spread)


def marginal_mib(demand: Demand, host: HostFacts, policy: Policy = DEFAULT_POLICY) -> int:
    """What the sandbox adds to the host's memory: guarantee, overhead, and the layers that nobody maps there yet."""
    return filters.marginal_mib(demand, host, policy)


def score(demand: Demand, host: HostFacts, policy: Policy = DEFAULT_POLICY, spread: SpreadCounts = NO_SPREAD) -> Score:
    """How good a host that can take it is; the least is the best."""
    return Score(
        spread=filters.spread_count(demand, host, spread),
        cold=not host.pools or claimable(demand, host) is None,
        level=filters.level_of(demand, host, policy),
        marginal_mib=filters.marginal_mib(demand, host, policy),
        fetch=demand.fetchable and (demand.tenant, demand.image_digest) not in host.images,
        room_mib=min(host.unpromised_mib, host.usable_mib),
        host=host.name,
    )


def placement_on(
    demand: Demand, host: HostFacts, policy: Policy = DEFAULT_POLICY, spread: SpreadCounts = NO_SPREAD
) -> Placement:
    """The demand on this host, which can take it."""
    pool = claimable(demand, host) if host.pools else None
    shared = sum(map(layer_mib, {layer.digest: layer for layer in demand.layers}.values()))
    shared -= filters.missing_mib(demand, host, policy)
    why = score(demand, host, policy, spread)
    return Placement(host.name, why.marginal_mib, pool.name if pool else "", why, shared)


def place(demand: Demand, hosts: Iterable[HostFacts], policy: Policy = DEFAULT_POLICY) -> Decision:
    """The best host that can take it. The order of `hosts` never matters: equal scores go by name."""
    hosts = list(hosts)
    spread = filters.counted(demand, hosts)
    best: tuple[Score, HostFacts] | None = None
    refusals: list[Refusal] = []
    for host in hosts:
        problem = filters.refusal_of(demand, host, policy, spread)
        if problem is not None:
            refusals.append(problem)
            continue
        mine = score(demand, host, policy, spread)
        if best is None or mine < best[0]:
            best = mine, host
    refused = tuple(sorted(refusals, key=lambda problem: problem.host))
    if best is None:
        return Decision(None, refused)
    return Decision(placement_on(demand, best[1], policy, spread), refused)


def summary(refusals: Iterable[Refusal], most: int = 4) -> str:
    """The refusals for people, the first few of them."""
    texts = [problem.message for problem in refusals]
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def counts(refusals: Iterable[Refusal]) -> str:
    """The refusals for who may not know hosts: what binds, and on how many of them, the most frequent first."""
    found = sorted(by_reason(refusals).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} on {number} host{'s' if number != 1 else ''}" for reason, number in found)


def by_reason(refusals: Iterable[Refusal]) -> Mapping[str, int]:
    """How many hosts refused for each reason."""
    counts: dict[str, int] = {}
    for problem in refusals:
        counts[problem.reason] = counts.get(problem.reason, 0) + 1
    return counts
