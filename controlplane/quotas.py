"""How much a tenant may have at once. Pure. A tenant without a quota may have what the hosts have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane import lifecycle
from controlplane.errors import Exhausted
from controlplane.model import Checkpoint, Image, Pool, Sandbox

MIB = 1 << 20


@dataclass(frozen=True)
class Quota:
    """Bounds over what a tenant has at once; None is no bound."""

    sandboxes: int | None = None  # live ones
    memory_min_mib: int | None = None  # the sum of guarantees
    memory_max_mib: int | None = None  # the sum of ceilings
    cpu_milli: int | None = None
    images: int | None = None  # names
    image_mib: int | None = None  # distinct layers
    checkpoint_mib: int | None = None  # on all hosts


UNBOUNDED = Quota()


@dataclass(frozen=True)
class Usage:
    """What a tenant has."""

    sandboxes: int
    memory_min_mib: int
    memory_max_mib: int
    cpu_milli: int
    images: int
    image_mib: int
    pools: int


def usage(live: Iterable[Sandbox], pools: Iterable[Pool], images: Iterable[Image]) -> Usage:
    """Counts a tenant's things; sandboxes that have ended do not count."""
    lives = [s for s in live if s.status.phase not in lifecycle.ENDED]
    kept, named = list(pools), list(images)
    sizes = [s.spec.resources for s in lives]
    return Usage(
        len(lives), _held_mib(lives, kept), sum(size.memory_max_mib for size in sizes),
        sum(size.cpu_milli for size in sizes), len(named), _distinct_mib(named), len(kept),
    )  # fmt: skip


def require_within(quota: Quota, live: Iterable[Sandbox], wanted: Sandbox, pools: Iterable[Pool] = ()) -> None:
    """Exhausted (QuotaExceeded), with numbers, when `wanted` and the tenant's other live sandboxes are too much.

    `live` may hold sandboxes that have ended, or an older version of `wanted`: neither counts."""
    others = [s for s in live if s.status.phase not in lifecycle.ENDED and s.uid != wanted.uid]
    sizes = wanted.spec.resources
    highest_mib = sum(s.spec.resources.memory_max_mib for s in others)
    asked = (
        ("sandboxes", quota.sandboxes, len(others), 1),
        ("memory_min_mib", quota.memory_min_mib, _held_mib(others, pools), sizes.memory_min_mib),
        ("memory_max_mib", quota.memory_max_mib, highest_mib, sizes.memory_max_mib),
        ("cpu_milli", quota.cpu_milli, sum(s.spec.resources.cpu_milli for s in others), sizes.cpu_milli),
    )
    _require(wanted.tenant, asked)


def require_pool_within(quota: Quota, live: Iterable[Sandbox], pools: Iterable[Pool], wanted: Pool) -> None:
    """The same for a pool of its full size: its members are guaranteed their memory, too. They are no sandboxes."""
    others = [s for s in live if s.status.phase not in lifecycle.ENDED]
    held_mib = _held_mib(others, (pool for pool in pools if pool.uid != wanted.uid))
    _require(wanted.tenant, (("memory_min_mib", quota.memory_min_mib, held_mib, _pool_mib(wanted)),))


def require_name_within(quota: Quota, images: Iterable[Image], tenant: str, name: str) -> None:
    """Exhausted when one more image name is too much; a name that is bound anew is none more."""
    others = [image for image in images if image.name != name]
    _require(tenant, (("images", quota.images, len(others), 1),))


def require_image_within(quota: Quota, images: Iterable[Image], wanted: Image) -> None:
    """The same for an image whose layers are known: those that another image of the tenant has cost nothing more."""
    others = [image for image in images if image.name != wanted.name]
    require_name_within(quota, others, wanted.tenant, wanted.name)
    held_mib = _distinct_mib(others)
    more_mib = _distinct_mib([*others, wanted]) - held_mib
    _require(wanted.tenant, (("image_mib", quota.image_mib, held_mib, more_mib),))


def require_checkpoint_within(quota: Quota, kept: Iterable[Checkpoint], source: Sandbox) -> None:
    """Exhausted when a checkpoint of `source` may become too much. It is counted at the source's ceiling before it is
    taken, for nobody knows what it will be, and at its true size afterwards."""
    held_mib = sum(-(-each.size_bytes // MIB) for each in kept)
    asked = ("checkpoint_mib", quota.checkpoint_mib, held_mib, source.spec.resources.memory_max_mib)
    _require(source.tenant, (asked,))


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
                limit="quota",
            )


def _held_mib(live: Iterable[Sandbox], pools: Iterable[Pool]) -> int:
    return sum(s.spec.resources.memory_min_mib for s in live) + sum(map(_pool_mib, pools))


def _pool_mib(pool: Pool) -> int:
    return pool.spec.size * pool.spec.resources.memory_min_mib


def _distinct_mib(images: Iterable[Image]) -> int:
    layers = {layer.digest: layer.size_bytes for image in images for layer in image.layers}
    return -(-sum(layers.values()) // MIB)
