"""How much a tenant may have at once. Pure. A tenant without a quota may have what the hosts have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane import lifecycle
from controlplane.errors import Exhausted
from controlplane.model import Sandbox


@dataclass(frozen=True)
class Quota:
    """Bounds over a tenant's live sandboxes; None is no bound."""

    sandboxes: int | None = None
    memory_min_mib: int | None = None  # the sum of guarantees
    cpu_milli: int | None = None


def require_within(quota: Quota, live: Iterable[Sandbox], wanted: Sandbox) -> None:
    """Exhausted (QuotaExceeded), with numbers, when `wanted` and the tenant's other live sandboxes are too much.

    `live` may hold sandboxes that have ended, or an older version of `wanted`: neither counts."""
    others = [s for s in live if s.status.phase not in lifecycle.ENDED and s.uid != wanted.uid]
    sizes = wanted.spec.resources
    asked = (
        ("sandboxes", quota.sandboxes, len(others), 1),
        ("memory_min_mib", quota.memory_min_mib, sum(_min_mib(s) for s in others), sizes.memory_min_mib),
        ("cpu_milli", quota.cpu_milli, sum(s.spec.resources.cpu_milli for s in others), sizes.cpu_milli),
    )
    for what, most, there, more in asked:
        if most is not None and there + more > most:
            raise Exhausted(
                "QuotaExceeded",
                f"tenant {wanted.tenant} may have {what} {most}; it has {there} and asks for {more} more:"
                " remove some, or have the quota raised",
                quota=what,
                most=most,
                used=there,
                asked=more,
            )


def _min_mib(sandbox: Sandbox) -> int:
    return sandbox.spec.resources.memory_min_mib
