"""How much a tenant may have at once. Pure. A tenant without a quota may have what the hosts have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane import lifecycle
from controlplane.errors import Exhausted
from controlplane.model import Pool, Sandbox


@dataclass(frozen=True)
class Quota:
    """Bounds over a tenant's live sandboxes; None is no bound."""

    sandboxes: int | None = None
    memory_min_mib: int | None = None  # the sum of guarantees
    cpu_milli: int | None = None


def require_within(quota: Quota, live: Iterable[Sandbox], wanted: Sandbox, pools: Iterable[Pool] = ()) -> None:
    """Exhausted (QuotaExceeded), with numbers, when `wanted` and the tenant's other live sandboxes are too much.

    `live` may hold sandboxes that have ended, or an older version of `wanted`: neither counts."""
    others = [s for s in live if s.status.phase not in lifecycle.ENDED and s.uid != wanted.uid]
    sizes = wanted.spec.resources
    asked = (
        ("sandboxes", quota.sandboxes, len(others), 1),
        ("memory_min_mib", quota.memory_min_mib, _held_mib(others, pools), sizes.memory_min_mib),
        ("cpu_milli", quota.cpu_milli, sum(s.spec.resources.cpu_milli for s in others), sizes.cpu_milli),
    )
    _require(wanted.tenant, asked)


def require_pool_within(quota: Quota, live: Iterable[Sandbox], pools: Iterable[Pool], wanted: Pool) -> None:
    """The same for a pool of its full size: its members are guaranteed their memory, too. They are no sandboxes."""
    others = [s for s in live if s.status.phase not in lifecycle.ENDED]
    held_mib = _held_mib(others, (pool for pool in pools if pool.uid != wanted.uid))
    _require(wanted.tenant, (("memory_min_mib", quota.memory_min_mib, held_mib, _pool_mib(wanted)),))


def _require(tenant: str, asked: Iterable[tuple[str, int | None, int, int]]) -> None:
    for what, most, there, more in asked:
        if most is not None and there + more > most:
            raise Exhausted(
                "QuotaExceeded",
                f"tenant {tenant} may have {what} {most}; it has {there} and asks for {more} more:"
                " remove some, or have the quota raised",
                quota=what,
                most=most,
                used=there,
                asked=more,
            )


def _held_mib(live: Iterable[Sandbox], pools: Iterable[Pool]) -> int:
    return sum(s.spec.resources.memory_min_mib for s in live) + sum(map(_pool_mib, pools))


def _pool_mib(pool: Pool) -> int:
    return pool.spec.size * pool.spec.resources.memory_min_mib
