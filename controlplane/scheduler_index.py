"""The scheduler's index: the same placements as scheduler.place over the same hosts, without looking at every host.

Hosts are kept in cells (nothing in their traits differs), and within a cell sorted by room: all of them, those that
hold an image, and those that map a bundle of layers. A demand's layers fall into a few bundles; the sets of bundles
that a host may map already are tried from the most memory saved to the least, level by level, and the first host in
order of room that fits is the best of that set. Three things are looked at host by host: those that have a ready member
of a warm pool for the demand, those that run its group when it is to be spread, and all of them when its layers fall
into more than MOST_BUNDLES bundles.

The index is a value that changes in place; it does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from controlplane import scheduler, scheduler_filters
from controlplane.rules import HOST_KEY
from controlplane.scheduler_filters import NO_SPREAD, UNSPREAD, SpreadCounts
from controlplane.scheduler_rooms import Rooms
from controlplane.scheduler_rows import NO_ROOM, Bundle, Cell, Hosts, Row, Shape
from controlplane.scheduler_values import DEFAULT_POLICY, Decision, Demand, HostState, Placement, Policy, Refusal

Accept = Callable[[Row], bool]
Found = tuple[int, int, bool, int, str]
"""Level, marginal memory, fetch, room, name: the part of a Score that the search decides on."""


class Index(Hosts):
    """See the module. Host names are unique; `put` replaces what was known of a host."""

    def __init__(self, policy: Policy = DEFAULT_POLICY, states: Iterable[HostState] = ()) -> None:
        super().__init__(policy)
        for state in states:
            self.put(state)

    # Deciding.

    def place(self, demand: Demand) -> Placement | None:
        """Where it goes, exactly as scheduler.place has it, or None when no host can take it. Changes nothing."""
        cells = self._eligible(demand, takes_new=True)
        if demand.rules.spread is not None:
            return self._place_spread(demand, cells)
        row = self._best(demand, cells, None)
        return None if row is None else scheduler.placement_on(demand, row, self.policy)

    def fits_when_back(self, demand: Demand) -> bool:
        """Whether a host that takes nothing new now (LOST, cordoned) could take it."""
        if demand.rules.spread is not None:
            return any(refused.for_now for refused in self.refusals(demand))
        return self._best(demand, self._eligible(demand, takes_new=False), None) is not None

    def decide(self, demand: Demand) -> Decision:
        """The same with every host's refusal when none can take it: that looks at each of them."""
        placement = self.place(demand)
        return Decision(placement) if placement is not None else Decision(None, self.refusals(demand))

    def refusals(self, demand: Demand) -> tuple[Refusal, ...]:
        """What stands against the demand on each host that cannot take it, by name."""
        spread = scheduler_filters.counted(demand, self.rows())
        told = (scheduler_filters.refusal_of(demand, row, self.policy, spread) for row in self.rows())
        return tuple(sorted((one for one in told if one is not None), key=lambda one: one.host))

    def place_all(self, demands: Iterable[Demand]) -> list[Placement | None]:
        """A batch: each is placed after the ones before it have taken their room, which they keep."""
        placed: list[Placement | None] = []
        for demand in demands:
            placement = self.place(demand)
            if placement is not None:
                self.assume(placement.host, demand)
            placed.append(placement)
        return placed

    def _eligible(self, demand: Demand, *, takes_new: bool) -> list[Cell]:
        return [
            cell
            for cell in self.cells()
            if cell.traits.takes_new is takes_new and scheduler_filters.unfit_traits(demand, cell.traits) is None
        ]

    # Spread.

    def _place_spread(self, demand: Demand, cells: Sequence[Cell]) -> Placement | None:
        rule = demand.rules.spread
        assert rule is not None
        counts = self._counts(demand, rule.key, cells)
        limit = counts.least + rule.max_skew if rule.max_skew else UNSPREAD + 1
        for count in sorted({*counts.counts.values(), UNSPREAD, *([0] if rule.key == HOST_KEY else [])}):
            if count + 1 > limit:
                return None
            row = self._best_of_count(demand, rule.key, cells, counts, count)
            if row is not None:
                return scheduler.placement_on(demand, row, self.policy, counts)
        return None

    def _best_of_count(
        self, demand: Demand, key: str, cells: Sequence[Cell], counts: SpreadCounts, count: int
    ) -> Row | None:
        if key == HOST_KEY:
            return self._best(demand, cells, lambda row: counts.counts.get(row.name, 0) == count)
        mine = [cell for cell in cells if _count_of_cell(cell, key, counts) == count]
        return self._best(demand, mine, None)

    def _counts(self, demand: Demand, key: str, cells: Sequence[Cell]) -> SpreadCounts:
        """As scheduler_filters.counted has them; hosts without any of the group are left out of `counts`."""
        allowed = set(cells)
        group = (demand.tenant, demand.group)
        rows = [row for row in self.in_group(group) if row.cell in allowed]
        if key == HOST_KEY:
            by_host = {row.name: row.groups[group] for row in rows}
            others = sum(len(cell.rooms) for cell in cells) > len(by_host)
            return SpreadCounts(by_host, 0 if others else min(by_host.values(), default=0))
        counts: dict[str, int] = {}
        for cell in cells:
            domain = cell.labels.get(key)
            if domain is not None and len(cell.rooms):
                counts.setdefault(domain, 0)
        for row in rows:
            domain = row.cell.labels.get(key)
            if domain is not None:
                counts[domain] += row.groups[group]
        return SpreadCounts(counts, min(counts.values(), default=0))

    # The search.

    def _best(self, demand: Demand, cells: Sequence[Cell], accept: Accept | None) -> Row | None:
        return self._warm_best(demand, cells, accept) or self._cold_best(demand, cells, accept)

    def _warm_best(self, demand: Demand, cells: Sequence[Cell], accept: Accept | None) -> Row | None:
        rows = self.pooled(demand.tenant, demand.image_digest)
        able = [
            row
            for row in rows
            if row.cell in cells
            and (accept is None or accept(row))
            and scheduler_filters.claimable(demand, row) is not None
        ]
        return self._scanned(demand, able)

    def _scanned(self, demand: Demand, rows: Iterable[Row]) -> Row | None:
        """The best of these by looking at each. They need not take new ones; nothing else may stand against them."""
        fit = []
        for row in rows:
            problem = scheduler_filters.refusal_of(demand, row, self.policy, NO_SPREAD)
            if problem is None or problem.for_now:
                fit.append(row)
        return min(fit, key=lambda row: scheduler.score(demand, row, self.policy), default=None)

    def _cold_best(self, demand: Demand, cells: Sequence[Cell], accept: Accept | None) -> Row | None:
        shape = self.shape(demand.domain, demand.layers)
        if not shape.saved:
            rows = (row for cell in cells for row in cell.rooms if accept is None or accept(row))
            return self._scanned(demand, rows)
        best: tuple[Found, Row] | None = None
        for cell in cells:
            found = self._in_cell(demand, cell, shape, accept, best[0] if best else None)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return None if best is None else best[1]

    def _in_cell(
        self, demand: Demand, cell: Cell, shape: Shape, accept: Accept | None, known: Found | None
    ) -> tuple[Found, Row] | None:
        """The best of one cell, unless it is sure that `known` is better."""
        last = len(self.policy.levels) - 1
        own_mib = demand.charge_mib + cell.overhead_mib + demand.extra_mib
        more_mib = demand.ceiling_mib - demand.charge_mib
        image = (demand.tenant, demand.image_digest)
        holding = self.holding(image, cell)
        for number in range(last + 1 if known is None else known[0] + 1):
            ceilings = self.policy.levels[number].ceilings and number != last
            for saved_mib, sets in shape.saved if self.policy.share else shape.saved[-1:]:
                need_mib = own_mib + shape.total_mib - (saved_mib if self.policy.share else 0)
                if known is not None and number == known[0] and need_mib > known[1]:
                    return None
                ceiling_mib = need_mib + more_mib if ceilings else NO_ROOM
                for fetch in (False, True) if demand.fetchable else (False,):
                    fits = _fits(demand, image, fetch, accept)
                    row = self._of_sets(
                        cell, sets, holding, fetch, fits, (need_mib, number, demand.cpu_milli, ceiling_mib)
                    )
                    if row is not None:
                        return (number, need_mib, fetch, row.room_mib, row.name), row
        return None

    def _of_sets(
        self, cell: Cell, sets: Sequence[tuple[Bundle, ...]], holding: Rooms | None, fetch: bool, fits: Accept,
        need: tuple[int, int, int, int],
    ) -> Row | None:  # fmt: skip
        best: Row | None = None
        for bundles in sets:
            rooms: Rooms | None = cell.rooms if fetch else holding
            for bundle in bundles:
                mine = bundle.rooms.get(cell)
                if mine is None or rooms is None:
                    rooms = None
                    break
                rooms = mine if len(mine) < len(rooms) else rooms
            if rooms is None or not len(rooms):
                continue

            def maps_all(row: Row, bundles: tuple[Bundle, ...] = bundles) -> bool:
                return all(bundle in row.bundles for bundle in bundles) and fits(row)

            row = rooms.first(*need, maps_all if bundles else fits)
            if row is not None and (best is None or (row.room_mib, row.name) < (best.room_mib, best.name)):
                best = row
        return best


def _count_of_cell(cell: Cell, key: str, counts: SpreadCounts) -> int:
    domain = cell.labels.get(key)
    return UNSPREAD if domain is None else counts.counts.get(domain, 0)


def _fits(demand: Demand, image: tuple[str, str], fetch: bool, accept: Accept | None) -> Accept:
    """What of a row must hold beside its sizes: the image is there (or, with `fetch`, is not), and all the rest."""
    cpu_milli, extras, dedicated = demand.cpu_milli, demand.extras, demand.rules.trust.dedicated

    def fits(row: Row) -> bool:
        if (image in row.images) is fetch or cpu_milli > row.capacity.cpu_milli:
            return False
        if dedicated and row.crowded_for not in ("", demand.tenant):
            return False
        if any(amount > row.limits.get(name, amount) for name, amount in extras):
            return False
        return accept is None or accept(row)

    return fits
