"""Where a sandbox goes: pure functions over values, used by the control plane and by the planner alike.

A host is filtered by what its hostd will admit (guarantees plus overhead, never more than is promised or available)
and scored by *marginal memory*: what this sandbox adds there. Layers that a live sandbox of the same sharing domain
already maps there add nothing, so sandboxes of one image gather until a host with more room costs less. A ready member
of a warm pool that fits adds nothing at all, for its guarantee is promised already, and starts the sandbox at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane import lifecycle
from controlplane.model import Capacity, Host, HostPool, LayerSize, Phase, Residency, Sandbox, SandboxClass

CPU_OVERCOMMIT = 16.0
"""CPU is shared by time, so far more may be asked for than there is; this bounds how slow it can get."""
CPU_WEIGHT = 0.1
WARM_PREFERENCE = 0.5
"""How much of a host's room a start in milliseconds is worth."""
MIB = 1 << 20


@dataclass(frozen=True)
class Demand:
    """What a sandbox asks of a host. Sizes in MiB, CPU in thousandths."""

    tenant: str
    sandbox_class: SandboxClass
    memory_min_mib: int
    cpu_milli: int
    image_digest: str
    layers: tuple[LayerSize, ...]
    memory_max_mib: int = 0
    vcpus: int = 1
    cold: bool = False  # it boots, or goes on from a checkpoint: no pool is of any use to it

    @staticmethod
    def of(sandbox: Sandbox) -> Demand:
        """What a recorded sandbox asks."""
        spec = sandbox.spec
        sizes = spec.resources
        return Demand(
            sandbox.tenant, spec.sandbox_class, sizes.memory_min_mib, sizes.cpu_milli, spec.image_digest,
            sandbox.layers, sizes.memory_max_mib, sizes.vcpus, spec.cold or bool(spec.checkpoint),
        )  # fmt: skip


@dataclass(frozen=True)
class HostState:
    """A host as the scheduler sees it. `promised_mib`: guarantees and overhead of all live sandboxes and pool members
    there; `unsettled_mib`: what the host's last report of available memory cannot know yet; `settling`: how many
    sandboxes that are, any of which may have claimed a member that the report still calls ready."""

    name: str
    ready: bool
    capacity: Capacity
    classes: frozenset[SandboxClass]
    images: frozenset[tuple[str, str]]  # (tenant, digest) in its store
    mapped_layers: frozenset[tuple[str, str]]  # (tenant, layer digest) in its memory
    promised_mib: int = 0
    unsettled_mib: int = 0
    cpu_asked_milli: int = 0
    pools: tuple[HostPool, ...] = ()
    settling: int = 0

    @property
    def unpromised_mib(self) -> int:
        """What may still be guaranteed there."""
        return self.capacity.memory_mib - self.capacity.system_reserve_mib - self.promised_mib

    @property
    def usable_mib(self) -> int:
        """What is available there now, above the reserve."""
        return self.capacity.memory_available_mib - self.capacity.system_reserve_mib - self.unsettled_mib

    @property
    def room_mib(self) -> int:
        """The smaller of the two: what the next sandbox's guarantee and overhead must fit into."""
        return min(self.unpromised_mib, self.usable_mib)


@dataclass(frozen=True)
class Refusal:
    """Why a host cannot take a demand. `for_now`: it could, were it only READY."""

    host: str
    reason: str  # HostLost, ClassNotOffered, ImageNotResident, ShortOfCpu, ShortOfMemory
    message: str
    for_now: bool = False


@dataclass(frozen=True)
class Placement:
    """The chosen host, how much memory the sandbox adds there, and the pool (its name) that has a member for it."""

    host: str
    marginal_mib: int
    pool: str = ""


@dataclass(frozen=True)
class Decision:
    """Either a placement, or why every host refused (empty when there are none)."""

    placement: Placement | None
    refusals: tuple[Refusal, ...] = ()

    @property
    def may_wait(self) -> bool:
        """Nothing fits now, but a host that is away could take it, or no host is known yet."""
        return self.placement is None and (not self.refusals or any(refusal.for_now for refusal in self.refusals))


def survey(
    hosts: Iterable[Host], alive: Iterable[str], sandboxes: Iterable[Sandbox], residency: Iterable[Residency]
) -> list[HostState]:
    """The hosts' states from what is recorded, by name."""
    living = frozenset(alive)
    by_host: dict[str, list[Sandbox]] = {}
    for sandbox in sandboxes:
        by_host.setdefault(sandbox.host, []).append(sandbox)
    held: dict[str, list[Residency]] = {}
    for one in residency:
        held.setdefault(one.host, []).append(one)
    return [
        host_state(host, host.name in living, by_host.get(host.name, []), held.get(host.name, []))
        for host in sorted(hosts, key=lambda host: host.name)
    ]


def host_state(host: Host, ready: bool, there: Iterable[Sandbox], held: Iterable[Residency]) -> HostState:
    """One host's state: `there` is assigned to it (what has ended does not count), `held` is what it holds."""
    live = [sandbox for sandbox in there if sandbox.status.phase not in lifecycle.ENDED]

    def charge(sandboxes: Iterable[Sandbox]) -> int:
        return sum(s.spec.resources.memory_min_mib + host.capacity.vm_overhead_mib for s in sandboxes)

    unsettled = [sandbox for sandbox in live if _unsettled(sandbox, host.last_seen_s)]
    overhead_mib = host.capacity.vm_overhead_mib
    pooled_mib = sum((pool.ready + pool.making) * (pool.memory_min_mib + overhead_mib) for pool in host.pools)
    return HostState(
        name=host.name,
        ready=ready,
        capacity=host.capacity,
        classes=frozenset(host.classes),
        images=frozenset((residency.tenant, residency.digest) for residency in held),
        mapped_layers=frozenset((s.tenant, layer.digest) for s in live for layer in s.layers),
        promised_mib=charge(live) + pooled_mib,
        unsettled_mib=charge(unsettled),
        cpu_asked_milli=sum(s.spec.resources.cpu_milli for s in live),
        pools=host.pools,
        settling=len(unsettled),
    )


def _unsettled(sandbox: Sandbox, reported_at_s: float) -> bool:
    if sandbox.status.phase in (Phase.SCHEDULED, Phase.STARTING):
        return True
    return sandbox.status.started_at_s is not None and sandbox.status.started_at_s >= reported_at_s


def refusal(demand: Demand, host: HostState) -> Refusal | None:
    """Why `host` cannot take it, or None when it can."""
    problem = _unfit(demand, host)
    if not host.ready:
        text = "its lease ran out" if problem is None else f"its lease ran out, and: {problem[1]}"
        return Refusal(host.name, "HostLost", f"{host.name} is LOST: {text}", for_now=problem is None)
    return None if problem is None else Refusal(host.name, problem[0], f"{host.name}: {problem[1]}")


def _unfit(demand: Demand, host: HostState) -> tuple[str, str] | None:
    sizes = host.capacity
    if demand.sandbox_class not in host.classes:
        offered = ", ".join(sorted(kind.value for kind in host.classes)) or "none"
        return "ClassNotOffered", f"it does not offer {demand.sandbox_class.value} (it offers {offered})"
    if (demand.tenant, demand.image_digest) not in host.images:
        return "ImageNotResident", "it does not hold the image"
    if demand.cpu_milli > sizes.cpu_milli:
        return "ShortOfCpu", f"{demand.cpu_milli / 1000:g} CPUs needed, it has {sizes.cpu_milli / 1000:g}"
    cpu_left = int(sizes.cpu_milli * CPU_OVERCOMMIT) - host.cpu_asked_milli
    if demand.cpu_milli > cpu_left:
        return "ShortOfCpu", (
            f"{demand.cpu_milli / 1000:g} CPUs needed, {max(0, cpu_left) / 1000:g} left of"
            f" {sizes.cpu_milli / 1000:g} times {CPU_OVERCOMMIT:g}"
        )
    need_mib = guarantee_mib(demand, host)
    if need_mib - _held_mib(demand, host) > host.unpromised_mib:
        return "ShortOfMemory", (
            f"{need_mib} MiB needed ({demand.memory_min_mib} MiB guaranteed + {sizes.vm_overhead_mib} MiB overhead),"
            f" {max(0, host.unpromised_mib)} MiB not promised (total {sizes.memory_mib},"
            f" reserve {sizes.system_reserve_mib}, promised {host.promised_mib})"
        )
    if need_mib > host.usable_mib:
        return "ShortOfMemory", (
            f"{need_mib} MiB needed, {max(0, host.usable_mib)} MiB usable now (available {sizes.memory_available_mib},"
            f" reserve {sizes.system_reserve_mib}, about to be used {host.unsettled_mib})"
        )
    return None


def claimable(demand: Demand, host: HostState) -> HostPool | None:
    """The pool of `host` that surely has a ready member that can become the sandbox; the first by name."""
    if demand.cold or demand.sandbox_class is not SandboxClass.GUEST_KERNEL:
        return None
    fitting = (
        pool
        for pool in host.pools
        if (pool.tenant, pool.image_digest, pool.vcpus) == (demand.tenant, demand.image_digest, demand.vcpus)
        and pool.fits_above_mib < demand.memory_max_mib <= pool.fits_to_mib
        and pool.ready > host.settling
    )
    return min(fitting, key=lambda pool: (pool.name, pool.uid), default=None)


def _held_mib(demand: Demand, host: HostState) -> int:
    """What is promised already to the member that the sandbox would claim."""
    pool = claimable(demand, host)
    return 0 if pool is None else pool.memory_min_mib + host.capacity.vm_overhead_mib


def guarantee_mib(demand: Demand, host: HostState) -> int:
    """What hostd charges at admission: the guarantee and the overhead of a guest."""
    return demand.memory_min_mib + host.capacity.vm_overhead_mib


def marginal_mib(demand: Demand, host: HostState) -> int:
    """What the sandbox adds to the host's memory: guarantee, overhead, and the layers that nobody maps there yet."""
    missing = sum(
        layer.size_bytes
        for layer in {layer.digest: layer for layer in demand.layers}.values()
        if (demand.tenant, layer.digest) not in host.mapped_layers
    )
    return max(0, guarantee_mib(demand, host) - _held_mib(demand, host)) + -(-missing // MIB)


def cost(demand: Demand, host: HostState) -> float:
    """Lower is better: the part of the host's room that it takes, a little for busy CPUs, less for a warm start."""
    warm = 0.0 if claimable(demand, host) is None else WARM_PREFERENCE
    busy = (host.cpu_asked_milli + demand.cpu_milli) / max(1, host.capacity.cpu_milli)
    return marginal_mib(demand, host) / max(1, host.room_mib) + CPU_WEIGHT * busy - warm


def place(demand: Demand, hosts: Iterable[HostState]) -> Decision:
    """The cheapest host that can take it; equal costs go by name, so that the answer never depends on the order."""
    fit: list[HostState] = []
    refusals: list[Refusal] = []
    for host in hosts:
        problem = refusal(demand, host)
        if problem is None:
            fit.append(host)
        else:
            refusals.append(problem)
    if not fit:
        return Decision(None, tuple(sorted(refusals, key=lambda problem: problem.host)))
    best = min(fit, key=lambda host: (cost(demand, host), host.name))
    pool = claimable(demand, best)
    return Decision(Placement(best.name, marginal_mib(demand, best), pool.name if pool else ""), tuple(refusals))


def summary(refusals: Iterable[Refusal], most: int = 4) -> str:
    """The refusals for people, the first few of them."""
    texts = [problem.message for problem in refusals]
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def by_reason(refusals: Iterable[Refusal]) -> Mapping[str, int]:
    """How many hosts refused for each reason."""
    counts: dict[str, int] = {}
    for problem in refusals:
        counts[problem.reason] = counts.get(problem.reason, 0) + 1
    return counts
