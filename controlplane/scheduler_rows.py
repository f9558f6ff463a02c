"""What the scheduler's index is made of: a mutable row a host, cells of equal hosts, bundles of layers.

A row changes in several sorted lists at once (scheduler_rooms.py). Each list only notes which rows changed, and puts
them in order when it is next looked into: a change costs a set entry a list, and a list nobody asks for costs no
sorting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations, groupby

from controlplane.model import Capacity, HostPool, LayerSize
from controlplane.scheduler_rooms import Rooms
from controlplane.scheduler_values import Demand, Group, HostState, Policy, Traits, layer_mib

Layer = tuple[str, str]
"""(domain, digest)."""
Image = tuple[str, str]
"""(tenant, digest)."""
NO_ROOM = -(1 << 60)
MOST_BUNDLES = 6


class Cell:
    """Hosts that no rule can tell apart: equal traits, equal overhead of a guest."""

    __slots__ = ("labels", "overhead_mib", "rooms", "traits")

    def __init__(self, traits: Traits, overhead_mib: int) -> None:
        self.traits, self.overhead_mib = traits, overhead_mib
        self.labels = dict(traits.labels)
        self.rooms: Rooms = Rooms()


class Bundle:
    """Layers of one domain that always come together, as far as the images seen so far say. Splits, never merges."""

    __slots__ = ("layers", "rooms", "size_mib")

    def __init__(self, layers: frozenset[Layer]) -> None:
        self.layers = layers
        self.size_mib = 0  # until a demand tells
        self.rooms: dict[Cell, Rooms] = {}  # the rows that map it


@dataclass(frozen=True)
class Shape:
    """An image's layers as bundles. `saved`: how much memory, from the most to the least, and the sets of bundles that
    save just that when a host maps them; empty when there are too many to be tried."""

    total_mib: int
    bundles: tuple[tuple[Bundle, int], ...]
    saved: tuple[tuple[int, tuple[tuple[Bundle, ...], ...]], ...]


class _Mapped:
    """Which layers a row maps, read off its bundles."""

    __slots__ = ("_bundle_of", "_bundles")

    def __init__(self, bundles: Mapping[Bundle, int], bundle_of: Mapping[Layer, Bundle]) -> None:
        self._bundles, self._bundle_of = bundles, bundle_of

    def __contains__(self, layer: object) -> bool:
        bundle = self._bundle_of.get(layer)  # type: ignore[call-overload]
        return bundle is not None and bundle in self._bundles


class Row:
    """One host, as HostFacts. `room_mib` is the smaller of what is not promised and what is usable."""

    __slots__ = (
        "bundles", "capacity", "cell", "cpu_asked_milli", "cpu_left", "dedicated", "groups", "images", "limits",
        "lists",
        "mapped_layers", "mapped_mib", "name", "pools", "promised_mib", "room_mib", "settling", "state", "tenants",
        "uncommitted_mib", "unpromised_mib", "usable_mib",
    )  # fmt: skip

    def __init__(
        self, state: HostState, cell: Cell, bundle_of: Mapping[Layer, Bundle], factors: tuple[float, ...]
    ) -> None:
        self.name = state.name
        self.cell = cell
        self.bundles: dict[Bundle, int] = {}
        self.mapped_layers = _Mapped(self.bundles, bundle_of)
        self.lists: set[Rooms] = set()
        self.take(state, factors)

    def take(self, state: HostState, factors: tuple[float, ...]) -> None:
        """All numbers from a state."""
        self.state = state
        self.capacity: Capacity = state.capacity
        self.images = state.images
        self.pools: tuple[HostPool, ...] = state.pools
        self.settling = state.settling
        self.limits = dict(state.limits)
        self.dedicated = int(bool(state.dedicated_to))
        self.groups: dict[Group, int] = dict(state.groups)
        self.tenants: dict[str, int] = dict.fromkeys(state.tenants, 1)
        self.unpromised_mib, self.usable_mib = state.unpromised_mib, state.usable_mib
        self.uncommitted_mib = state.uncommitted_mib
        self.cpu_asked_milli = state.cpu_asked_milli
        self.promised_mib, self.mapped_mib = state.promised_mib, state.mapped_mib
        self.room_mib = min(self.unpromised_mib, self.usable_mib)
        self.cpu_left = [int(self.capacity.cpu_milli * most) - self.cpu_asked_milli for most in factors]

    @property
    def traits(self) -> Traits:
        """Those of its cell."""
        return self.cell.traits

    @property
    def crowded_for(self) -> str | None:
        """See HostState."""
        return None if len(self.tenants) > 1 else next(iter(self.tenants), "")

    def move(self, own_mib: int, ceiling_mib: int, shared_mib: int, cpu_milli: int) -> None:
        """Takes so much more (or less) of everything, and tells every list."""
        self.promised_mib += own_mib
        self.unpromised_mib -= own_mib + shared_mib
        self.usable_mib -= own_mib
        self.uncommitted_mib -= ceiling_mib + shared_mib
        self.mapped_mib += shared_mib
        self.cpu_asked_milli += cpu_milli
        self.room_mib = min(self.unpromised_mib, self.usable_mib)
        self.cpu_left = [left - cpu_milli for left in self.cpu_left]
        self.touch()

    def touch(self) -> None:
        """Tells every list that it changed."""
        for rooms in self.lists:
            rooms.stale.add(self)


class Hosts:
    """The hosts of an index, and what is kept up as they come, change and go."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._factors = tuple(level.cpu_overcommit for level in policy.levels)
        self._rows: dict[str, Row] = {}
        self._cells: dict[tuple[Traits, int], Cell] = {}
        self._bundle_of: dict[Layer, Bundle] = {}
        self._sizes: dict[Layer, int] = {}  # MiB, of the layers that a demand told of
        self._holding: dict[Image, dict[Cell, Rooms]] = {}
        self._pooled: dict[Image, dict[str, Row]] = {}
        self._grouped: dict[Group, dict[str, Row]] = {}
        self._shapes: dict[tuple[str, tuple[LayerSize, ...]], Shape] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, host: str) -> bool:
        return host in self._rows

    def rows(self) -> Iterator[Row]:
        """Every host, for reading."""
        return iter(self._rows.values())

    def row(self, host: str) -> Row:
        """One host, for reading. KeyError."""
        return self._rows[host]

    def cells(self) -> Iterable[Cell]:
        """All cells; some may be empty."""
        return self._cells.values()

    def in_group(self, group: Group) -> Iterable[Row]:
        """The rows that run some of it."""
        return self._grouped.get(group, {}).values()

    def pooled(self, tenant: str, digest: str) -> Iterable[Row]:
        """The rows that have a pool of this image."""
        return self._pooled.get((tenant, digest), {}).values()

    def holding(self, image: Image, cell: Cell) -> Rooms | None:
        """The rows of a cell that hold an image."""
        return self._holding.get(image, {}).get(cell)

    # Coming, changing, going.

    def put(self, state: HostState) -> None:
        """A host as it is now."""
        row = self._rows.get(state.name)
        if row is not None and _stays(row, state):
            self._ungroup(row)
            row.take(state, self._factors)
            row.touch()
            self._group(row)
            return
        if row is not None:
            self.remove(state.name)
        cell = self._cell(state.traits, state.capacity.vm_overhead_mib)
        row = self._rows[state.name] = Row(state, cell, self._bundle_of, self._factors)
        cell.rooms.add(row)
        for bundle in self._bundles(state.mapped_layers):
            self._map(row, bundle)
        self._hold(row)
        self._group(row)

    def _cell(self, traits: Traits, overhead_mib: int) -> Cell:
        cell = self._cells.get((traits, overhead_mib))
        if cell is None:
            cell = self._cells[traits, overhead_mib] = Cell(traits, overhead_mib)
        return cell

    def _hold(self, row: Row) -> None:
        for image in row.images:
            self._holding.setdefault(image, {}).setdefault(row.cell, Rooms()).add(row)

    def _leave(self, row: Row) -> dict[Bundle, int]:
        """Out of every list; what it mapped."""
        bundles = dict(row.bundles)
        for bundle in bundles:
            self._unmap(row, bundle)
        for image in row.images:
            held = self._holding[image]
            held[row.cell].discard(row)
            if not len(held[row.cell]):
                del held[row.cell]
        row.cell.rooms.discard(row)
        if not len(row.cell.rooms):
            del self._cells[row.cell.traits, row.cell.overhead_mib]
        return bundles

    def _move_to(self, row: Row, traits: Traits) -> None:
        if traits == row.traits:
            return
        bundles = self._leave(row)
        row.cell = self._cell(traits, row.cell.overhead_mib)
        row.cell.rooms.add(row)
        for bundle, count in bundles.items():
            self._map(row, bundle, count)
        self._hold(row)

    def remove(self, host: str) -> None:
        """A host that is no more. KeyError."""
        row = self._rows.pop(host)
        self._ungroup(row)
        self._leave(row)

    def assume(self, host: str, demand: Demand, count: int = 1) -> None:
        """So many of the demand run there from now on, as sandboxes that their host has not reported yet."""
        row = self._rows[host]
        bundles = self.shape(demand.domain, demand.layers).bundles
        missing_mib = 0
        for bundle, size_mib in bundles:
            if bundle not in row.bundles:
                missing_mib += size_mib
                self._map(row, bundle, count)
            else:
                row.bundles[bundle] += count
        if not self.policy.share:
            missing_mib = count * sum(size_mib for _, size_mib in bundles)
        self._take(row, demand, count, missing_mib)

    def _take(self, row: Row, demand: Demand, count: int, shared_mib: int) -> None:
        own_mib = demand.charge_mib + row.capacity.vm_overhead_mib + demand.extra_mib
        ceiling_mib = own_mib + demand.ceiling_mib - demand.charge_mib
        row.settling += count
        for name, amount in demand.extras:
            if name in row.limits:
                row.limits[name] -= count * amount
        self._count(row, demand, count)
        row.move(count * own_mib, count * ceiling_mib, shared_mib, count * demand.cpu_milli)

    def release(self, host: str, demand: Demand) -> None:
        """The opposite: what was assumed there has ended."""
        row = self._rows[host]
        bundles = self.shape(demand.domain, demand.layers).bundles
        freed_mib = 0
        for bundle, size_mib in bundles:
            row.bundles[bundle] -= 1
            if not row.bundles[bundle]:
                freed_mib += size_mib
                self._unmap(row, bundle)
        if not self.policy.share:
            freed_mib = sum(size_mib for _, size_mib in bundles)
        self._take(row, demand, -1, -freed_mib)

    def _count(self, row: Row, demand: Demand, more: int) -> None:
        group = (demand.tenant, demand.group)
        row.groups[group] = row.groups.get(group, 0) + more
        row.tenants[demand.tenant] = row.tenants.get(demand.tenant, 0) + more
        if not row.tenants[demand.tenant]:
            del row.tenants[demand.tenant]
        if row.groups[group]:
            self._grouped.setdefault(group, {})[row.name] = row
        else:
            del row.groups[group]
            self._grouped[group].pop(row.name, None)
        if demand.rules.trust.dedicated:
            row.dedicated += more
            self._move_to(row, replace(row.traits, dedicated_to=demand.tenant if row.dedicated else ""))

    def _group(self, row: Row) -> None:
        for group in row.groups:
            self._grouped.setdefault(group, {})[row.name] = row
        for pool in row.pools:
            self._pooled.setdefault((pool.tenant, pool.image_digest), {})[row.name] = row

    def _ungroup(self, row: Row) -> None:
        for group in row.groups:
            self._grouped[group].pop(row.name, None)
        for pool in row.pools:
            self._pooled[pool.tenant, pool.image_digest].pop(row.name, None)

    # Layers.

    def _map(self, row: Row, bundle: Bundle, count: int = 1) -> None:
        row.bundles[bundle] = count
        rooms = bundle.rooms.get(row.cell)
        if rooms is None:
            rooms = bundle.rooms[row.cell] = Rooms()
        rooms.add(row)

    def _unmap(self, row: Row, bundle: Bundle) -> None:
        del row.bundles[bundle]
        rooms = bundle.rooms[row.cell]
        rooms.discard(row)
        if not len(rooms):
            del bundle.rooms[row.cell]

    def shape(self, domain: str, layers: tuple[LayerSize, ...]) -> Shape:
        """The layers of an image in a domain as bundles; splits bundles that hold more than the image has of them."""
        shape = self._shapes.get((domain, layers))
        if shape is None:
            sizes = {(domain, layer.digest): layer_mib(layer) for layer in layers}
            bundles = tuple((b, sum(map(sizes.__getitem__, b.layers))) for b in self._bundles(frozenset(sizes)))
            self._sizes.update(sizes)
            for bundle, size_mib in bundles:
                bundle.size_mib = size_mib
            shape = self._shapes[domain, layers] = Shape(sum(sizes.values()), bundles, _saved(bundles))
        return shape

    def _bundles(self, layers: frozenset[Layer]) -> list[Bundle]:
        """Bundles that are exactly these layers."""
        found: dict[Bundle, set[Layer]] = {}
        fresh: dict[str, set[Layer]] = {}
        for layer in layers:
            bundle = self._bundle_of.get(layer)
            if bundle is None:
                fresh.setdefault(layer[0], set()).add(layer)
            else:
                found.setdefault(bundle, set()).add(layer)
        whole = [
            bundle if len(mine) == len(bundle.layers) else self._split(bundle, frozenset(mine))
            for bundle, mine in found.items()
        ]
        whole += [self._new(frozenset(mine)) for mine in fresh.values()]
        return sorted(whole, key=lambda bundle: min(bundle.layers))

    def _new(self, layers: frozenset[Layer]) -> Bundle:
        bundle = Bundle(layers)
        self._bundle_of.update(dict.fromkeys(layers, bundle))
        return bundle

    def _split(self, bundle: Bundle, part: frozenset[Layer]) -> Bundle:
        bundle.layers -= part
        fresh = self._new(part)
        for half in (bundle, fresh):
            half.size_mib = sum(self._sizes.get(layer, 0) for layer in half.layers)
        for rooms in bundle.rooms.values():
            for row in rooms:
                self._map(row, fresh, row.bundles[bundle])
        self._shapes.clear()
        return fresh


def _stays(row: Row, after: HostState) -> bool:
    """Whether only numbers differ."""
    before = row.state
    mapped = sum(len(bundle.layers) for bundle in row.bundles)
    return (
        row.traits == after.traits
        and before.images == after.images
        and before.capacity.vm_overhead_mib == after.capacity.vm_overhead_mib
        and mapped == len(after.mapped_layers)
        and all(layer in row.mapped_layers for layer in after.mapped_layers)
    )


def _saved(bundles: tuple[tuple[Bundle, int], ...]) -> tuple[tuple[int, tuple[tuple[Bundle, ...], ...]], ...]:
    if len(bundles) > MOST_BUNDLES:
        return ()
    sets = chain.from_iterable(combinations(bundles, count) for count in range(len(bundles) + 1))
    sized = sorted(((sum(size for _, size in one), tuple(b for b, _ in one)) for one in sets), key=lambda s: -s[0])
    return tuple((size, tuple(one for _, one in same)) for size, same in groupby(sized, key=lambda s: s[0]))
