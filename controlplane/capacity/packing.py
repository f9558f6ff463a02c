"""As much as possible of a demand that is known as a whole, on given hosts. Pure.

The scheduler decides one sandbox at a time; a demand that is known as a whole may be put before it in any order.
Several are tried, and the one that places the most wins. Orders put sandboxes of one image behind one another, so that
an image's layers are paid for on few hosts, and go by what a sandbox of the image costs on average with its share of
them: small ones first, for the number of sandboxes is what counts. Each order is tried in two ways: where the scheduler
puts them, and host by host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controlplane import scheduler_filters as filters
from controlplane.capacity.fit import by_resource
from controlplane.scheduler_index import Index
from controlplane.scheduler_values import Demand, HostState, Policy, layer_mib

Wanted = Sequence[tuple[Demand, int]]
"""Demands, and how many of each."""
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """How many of each demand are placed, in the order they were asked, and the hosts as they are then."""

    placed: Counts
    wanted: Counts
    index: Index

    @property
    def total(self) -> int:
        """Of all demands."""
        return sum(self.placed)

    @property
    def complete(self) -> bool:
        """Whether everything found a place."""
        return self.placed == self.wanted


def pack(wanted: Wanted, hosts: Iterable[HostState], policy: Policy) -> Packing:
    """The best packing found; equal inputs give equal packings."""
    hosts = tuple(hosts)
    counts = tuple(count for _, count in wanted)
    best: Packing | None = None
    for order in _orders(wanted):
        for fill in (_by_host, _by_scheduler):
            index = Index(policy, hosts)
            placed = fill(index, wanted, order)
            found = Packing(tuple(placed[at] for at in range(len(wanted))), counts, index)
            if best is None or found.total > best.total:
                best = found
            if best.complete:
                return best
    assert best is not None
    return best


def _orders(wanted: Wanted) -> list[list[int]]:
    """Numbers of the demands, in orders worth trying."""
    own = [demand.charge_mib + demand.extra_mib for demand, _ in wanted]
    layers = [sum(map(layer_mib, demand.layers)) for demand, _ in wanted]
    by_image: dict[tuple[str, str], list[int]] = {}
    for at, (demand, _) in enumerate(wanted):
        by_image.setdefault((demand.domain, demand.image_digest), []).append(at)
    numbers = list(range(len(wanted)))
    mean: dict[tuple[str, str], float] = {}
    for image, members in by_image.items():
        count = max(1, sum(wanted[at][1] for at in members))
        mean[image] = (sum(own[at] * wanted[at][1] for at in members) + layers[members[0]]) / count

    def image_mean(at: int) -> float:
        return mean[wanted[at][0].domain, wanted[at][0].image_digest]

    return [
        sorted(numbers, key=lambda at: (own[at], at)),
        sorted(numbers, key=lambda at: (own[at] + layers[at] / max(1, wanted[at][1]), at)),
        sorted(numbers, key=lambda at: (image_mean(at), own[at], at)),
        sorted(numbers, key=lambda at: (own[at] + layers[at], at)),
        sorted(numbers, key=lambda at: (-own[at], at)),
        sorted(numbers, key=lambda at: (-image_mean(at), -own[at], at)),
    ]


def _by_scheduler(index: Index, wanted: Wanted, order: Sequence[int]) -> dict[int, int]:
    """One after the other, each where the scheduler puts it."""
    placed = dict.fromkeys(order, 0)
    for at in order:
        demand, count = wanted[at]
        while placed[at] < count and (placement := index.place(demand)) is not None:
            index.assume(placement.host, demand)
            placed[at] += 1
    return placed


def _by_host(index: Index, wanted: Wanted, order: Sequence[int]) -> dict[int, int]:
    """Host by host, always the demand that costs the least for each that it adds there."""
    placed = dict.fromkeys(order, 0)
    for row in sorted(index.rows(), key=lambda row: (-row.room_mib, row.name)):
        while True:
            best: tuple[float, int, int] | None = None
            for rank, at in enumerate(order):
                demand, count = wanted[at]
                left = count - placed[at]
                if not left or filters.refusal_of(demand, row, index.policy, filters.NO_SPREAD):
                    continue
                more = min(left, *(most for _, most in by_resource(row, demand, index.policy)))
                missing_mib = filters.missing_mib(demand, row, index.policy)
                each = demand.charge_mib + demand.extra_mib + missing_mib / max(1, more)
                if more and (best is None or (each, rank) < best[:2]):
                    best = each, rank, more
            if best is None:
                break
            _, rank, more = best
            at = order[rank]
            index.assume(row.name, wanted[at][0], more)
            placed[at] += more
    return placed
