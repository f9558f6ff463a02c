"""How a warm pool's size is spread over the hosts, and how it stands. Pure, so that every part of the control plane and
every host's watch comes to the same answer from the same records.

Members go only where their image is: to READY hosts that hold it and offer the class, one after the other, the largest
host first, and on none more than its memory could ever hold. What hosts run meanwhile does not move members about; a
host that has no room for its share says so. Of a tenant's members only as many are wanted as its quota leaves room for
beside its sandboxes (quotas.members_of).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from controlplane import lifecycle
from controlplane.model import Host, HostPool, Image, Pool, Sandbox
from controlplane.quotas import UNBOUNDED, Quota, members_of
from controlplane.scheduler import HostState


@dataclass(frozen=True)
class PoolShare:
    """A pool, and how many of its members one host is to keep."""

    pool: Pool
    wanted: int


@dataclass(frozen=True)
class Spread:
    """Members wanted by host (only hosts that are to have some), and why they are fewer than the pool's size."""

    wanted: Mapping[str, int]
    message: str = ""


@dataclass(frozen=True)
class PoolOnHost:
    """A pool on one host: what is wanted of it, and what it last said."""

    host: str
    wanted: int
    ready: int = 0
    making: int = 0
    message: str = ""


@dataclass(frozen=True)
class PoolState:
    """A pool as users see it."""

    pool: Pool
    hosts: tuple[PoolOnHost, ...]
    message: str = ""

    @property
    def ready(self) -> int:
        """Ready members in all."""
        return sum(host.ready for host in self.hosts)


def most_on(pool: Pool, host: HostState) -> int:
    """How many members the host could hold with nothing else on it."""
    sizes = host.capacity
    each_mib = pool.spec.resources.memory_min_mib + sizes.vm_overhead_mib
    return max(0, (sizes.memory_mib - sizes.system_reserve_mib) // max(1, each_mib))


def spread(pool: Pool, hosts: Iterable[HostState], *, image_bound: bool) -> Spread:
    """See the module. `image_bound`: a name of the tenant still means the pool's digest."""
    spec = pool.spec
    if spec.size == 0:
        return Spread({})
    if not image_bound:
        return Spread({}, f"image {spec.image} has been removed or bound anew: remove the pool and make it again")
    able = [host for host in hosts if host.traits.takes_new and spec.sandbox_class in host.classes]
    able = [host for host in able if (pool.tenant, spec.image_digest) in host.images]
    if not able:
        return Spread({}, f"no READY host holds image {spec.image} and offers {spec.sandbox_class.value}")
    able.sort(key=lambda host: (-host.capacity.memory_mib, host.name))
    wanted = dict.fromkeys((host.name for host in able), 0)
    most = {host.name: most_on(pool, host) for host in able}
    left = spec.size
    while left and any(wanted[name] < most[name] for name in wanted):
        for name in wanted:
            if left and wanted[name] < most[name]:
                wanted[name] += 1
                left -= 1
    message = f"{spec.size - left} of {spec.size} members fit on the hosts that hold its image" if left else ""
    return Spread({name: count for name, count in wanted.items() if count}, message)


def allowed(
    pools: Iterable[Pool], quota_of: Callable[[str], Quota], live_of: Callable[[str], Iterable[Sandbox]]
) -> list[Pool]:
    """The pools, each no larger than its tenant's quota leaves room for. A sandbox that is on its way to claim a member
    does not count yet: the member is to be there still when it comes."""
    by_tenant: dict[str, list[Pool]] = {}
    for pool in pools:
        by_tenant.setdefault(pool.tenant, []).append(pool)
    found: list[Pool] = []
    for tenant, its in by_tenant.items():
        quota = quota_of(tenant)
        if quota == UNBOUNDED:
            found += its
            continue
        members = members_of(quota, (s for s in live_of(tenant) if not _is_claiming(s)), its)
        found += [replace(pool, spec=replace(pool.spec, size=members[pool.uid])) for pool in its]
    return found


def _is_claiming(sandbox: Sandbox) -> bool:
    return sandbox.placed is not None and bool(sandbox.placed.pool) and sandbox.status.phase in lifecycle.UNBEGUN


def is_bound(pool: Pool, images: Iterable[Image]) -> bool:
    """Whether a name of the tenant still means the pool's digest."""
    return any((image.tenant, image.digest) == (pool.tenant, pool.spec.image_digest) for image in images)


def shares_of(
    host: str, pools: Iterable[Pool], hosts: Iterable[HostState], images: Iterable[Image]
) -> tuple[PoolShare, ...]:
    """What one host is to keep of every pool, by tenant and name."""
    states, known = list(hosts), list(images)
    shares: list[PoolShare] = []
    for pool in sorted(pools, key=lambda pool: (pool.tenant, pool.name)):
        wanted = spread(pool, states, image_bound=is_bound(pool, known)).wanted.get(host, 0)
        if wanted:
            shares.append(PoolShare(pool, wanted))
    return tuple(shares)


def state_of(
    pool: Pool, states: Iterable[HostState], hosts: Mapping[str, Host], images: Iterable[Image], size: int | None = None
) -> PoolState:
    """The pool with what its READY hosts said last; `size`: how many members its tenant's quota leaves room for."""
    states = list(states)
    kept = pool if size is None else replace(pool, spec=replace(pool.spec, size=size))
    made = spread(kept, states, image_bound=is_bound(pool, images))
    if kept.spec.size < pool.spec.size:
        text = f"{kept.spec.size} of {pool.spec.size} members fit into the tenant's quota beside its sandboxes"
        made = replace(made, message="; ".join(filter(None, (text, made.message))))
    rows: list[PoolOnHost] = []
    for state in states:
        said = _said(pool, hosts[state.name]) if state.name in hosts and state.ready else None
        wanted = made.wanted.get(state.name, 0)
        if said is not None:
            rows.append(PoolOnHost(state.name, wanted, said.ready, said.making, said.message))
        elif wanted:
            rows.append(PoolOnHost(state.name, wanted))
    return PoolState(pool, tuple(sorted(rows, key=lambda row: row.host)), made.message)


def _said(pool: Pool, host: Host) -> HostPool | None:
    return next((said for said in host.pools if said.uid == pool.uid), None)
