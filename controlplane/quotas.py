"""How much a tenant may have at once. Pure. A tenant without a quota may have what the hosts have.

A member of a warm pool is a guest as any other, and counts as a sandbox of its pool's resources. A sandbox that claims
one takes its place; the pool is filled up again only as far as the quota leaves room (members_of), so that what there
is of both never comes to more than the quota, and nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane import lifecycle
from controlplane.errors import Exhausted
from controlplane.model import Checkpoint, Image, Pool, Resources, Sandbox

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
GUEST_BOUNDS = ("sandboxes", "memory_min_mib", "memory_max_mib", "cpu_milli")
"""The bounds over what runs; Sizes are in this order."""
Sizes = tuple[int, int, int, int]


@dataclass(frozen=True)
class Usage:
    """What a tenant has; sandboxes, memory and CPU with the members of its pools."""

    sandboxes: int
    memory_min_mib: int
    memory_max_mib: int
    cpu_milli: int
    images: int
    image_mib: int
    pools: int


def usage(quota: Quota, live: Iterable[Sandbox], pools: Iterable[Pool], images: Iterable[Image]) -> Usage:
    """Counts a tenant's things; sandboxes that have ended do not count."""
    lives, kept, named = list(live), list(pools), list(images)
    return Usage(*_all_of(quota, lives, kept), len(named), _distinct_mib(named), len(kept))


def members_of(quota: Quota, live: Iterable[Sandbox], pools: Iterable[Pool]) -> Mapping[str, int]:
    """How many members of each pool, by uid, the quota leaves room for beside the sandboxes: pools by name, each up to
    its size."""
    held, members = _sum(_size(s.spec.resources) for s in _counted(live)), {}
    for pool in sorted(pools, key=lambda pool: (pool.name, pool.uid)):
        each, count = _size(pool.spec.resources), pool.spec.size
        for bound, there, more in zip(_bounds(quota), held, each, strict=True):
            if bound is not None and more:
                count = max(0, min(count, (bound - there) // more))
        members[pool.uid] = count
        held = _sum([held, _times(each, count)])
    return members


def require_within(
    quota: Quota, live: Iterable[Sandbox], wanted: Sandbox, pools: Iterable[Pool] = (), *, claimed: str = ""
) -> None:
    """Exhausted (QuotaExceeded), with numbers, when `wanted` and what the tenant has besides are too much.

    `live` may hold sandboxes that have ended, or an older version of `wanted`: neither counts. `claimed`: the name of
    the pool of which `wanted` takes a member's place."""
    others = [s for s in live if s.uid != wanted.uid]
    _require_guests(quota, wanted.tenant, _all_of(quota, others, list(pools), claimed), _size(wanted.spec.resources))


def require_pool_within(quota: Quota, live: Iterable[Sandbox], pools: Iterable[Pool], wanted: Pool) -> None:
    """The same for a pool of its full size."""
    others = [pool for pool in pools if pool.uid != wanted.uid]
    more = _times(_size(wanted.spec.resources), wanted.spec.size)
    _require_guests(quota, wanted.tenant, _all_of(quota, list(live), others), more)


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


def _require_guests(quota: Quota, tenant: str, there: Sizes, more: Sizes) -> None:
    _require(tenant, zip(GUEST_BOUNDS, _bounds(quota), there, more, strict=True))


def _bounds(quota: Quota) -> tuple[int | None, ...]:
    return tuple(getattr(quota, name) for name in GUEST_BOUNDS)


def _counted(live: Iterable[Sandbox]) -> list[Sandbox]:
    return [s for s in live if s.status.phase not in lifecycle.ENDED]


def _all_of(quota: Quota, live: list[Sandbox], pools: list[Pool], claimed: str = "") -> Sizes:
    """What sandboxes and members come to, without one member of the pool `claimed`."""
    members = members_of(quota, live, pools)
    kept = (_times(_size(pool.spec.resources), max(0, members[pool.uid] - (pool.name == claimed))) for pool in pools)
    return _sum([*(_size(s.spec.resources) for s in _counted(live)), *kept])


def _size(sizes: Resources) -> Sizes:
    return 1, sizes.memory_min_mib, sizes.memory_max_mib, sizes.cpu_milli


def _times(size: Sizes, count: int) -> Sizes:
    return size[0] * count, size[1] * count, size[2] * count, size[3] * count


def _sum(sizes: Iterable[Sizes]) -> Sizes:
    one, two, three, four = 0, 0, 0, 0
    for size in sizes:
        one, two, three, four = one + size[0], two + size[1], three + size[2], four + size[3]
    return one, two, three, four


def _distinct_mib(images: Iterable[Image]) -> int:
    layers = {layer.digest: layer.size_bytes for image in images for layer in image.layers}
    return -(-sum(layers.values()) // MIB)
