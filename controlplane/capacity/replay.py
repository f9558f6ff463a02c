"""A discrete-event run of a trace over a cluster, every decision made by the scheduler's index. Pure; equal inputs give
equal results to the last sandbox.

What happens at one time happens in this order: arrivals as the trace has them, hosts that are lost, ends in the order
in which the sandboxes began. An arrival that no host can take waits. Whenever a sandbox ends, those that wait are tried
from the oldest on, each that fits begins (a smaller one may pass a larger one that still does not fit), and alike ones
that wait behind one that does not fit are not tried. A host that is lost takes its sandboxes with it; they arrive anew,
with what is left of their time. A sandbox begins when it is placed; the cost of its start comes before its lifetime.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from controlplane import scheduler_filters as filters
from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Planning
from controlplane.capacity.measures import Measured, Measures
from controlplane.capacity.trace import FOREVER, Trace
from controlplane.capacity.workload import Workload, demand_of
from controlplane.model import SandboxClass
from controlplane.scheduler_index import Index
from controlplane.scheduler_values import Demand, HostState

TELL_EVERY = 2000
ARRIVES, LOST, ENDS = 0, 1, 2
Told = Callable[[int, int], None]
"""How far a run is: events done, of how many at least."""


@dataclass(frozen=True)
class Losses:
    """Hosts that are lost at a time."""

    time_s: float
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one sandbox: where it began (the last time), when it was placed, when it ended; None: never."""

    host: str | None
    placed_s: float | None
    ended_s: float | None


@dataclass(frozen=True)
class Replayed:
    """`outcomes` in the trace's order; `waiting`: how many had no place when the trace ended."""

    outcomes: tuple[Outcome, ...]
    measured: Measured
    waiting: int
    evicted: int = 0


class _Run:
    """One replay as it goes."""

    def __init__(self, hosts: Iterable[HostState], trace: Trace, planning: Planning, calibration: Calibration) -> None:
        self.arrivals = trace.arrivals
        self.index = Index(planning.policy, hosts)
        self.calibration = calibration
        self.demands: dict[Workload, Demand] = {
            work: demand_of(planning.apply(work), calibration, quantile=planning.quantile) for work in trace.workloads
        }
        self.measures = Measures(self.index, calibration)
        self.events: list[tuple[float, int, int, int]] = []  # time, what, order, number of the arrival
        self.waiting: OrderedDict[Demand, deque[int]] = OrderedDict()
        self.host: list[str | None] = [None] * len(self.arrivals)
        self.placed_s: list[float | None] = [None] * len(self.arrivals)
        self.ended_s: list[float | None] = [None] * len(self.arrivals)
        self.since_s = [arrival.time_s for arrival in self.arrivals]  # when it arrived, or was evicted last
        self.waited_s = [0.0] * len(self.arrivals)
        self.left_s = [arrival.lifetime_s for arrival in self.arrivals]
        self.turn = [0] * len(self.arrivals)  # which end of it counts: one that was evicted has several in the heap
        self.order = 0
        self.evicted = 0
        self.changed: set[str] = set()  # hosts that may take since the last retry what they could not take then

    def arrive(self, now_s: float, number: int) -> None:
        demand = self.demands[self.arrivals[number].workload]
        if not self.begin(now_s, number, demand):
            self.waiting.setdefault(demand, deque()).append(number)
        self.measures.waits(number, demand, self.host[number] is None)

    def begin(self, now_s: float, number: int, demand: Demand) -> bool:
        placement = self.index.place(demand)
        if placement is None:
            return False
        arrival = self.arrivals[number]
        self.index.assume(placement.host, demand)
        self.changed.add(placement.host)
        self.measures.took(placement.host, arrival.workload, demand, 1)
        self.host[number], self.placed_s[number] = placement.host, now_s
        self.waited_s[number] += now_s - self.since_s[number]
        self.order += 1
        self.turn[number] = self.order
        if self.left_s[number] != FOREVER:
            starts_s = start_cost_s(arrival.workload.kind, self.calibration)
            heapq.heappush(self.events, (now_s + starts_s + self.left_s[number], ENDS, self.order, number))
        return True

    def end(self, now_s: float, number: int, order: int) -> bool:
        if self.turn[number] != order:
            return False
        self.release(number)
        self.ended_s[number] = now_s
        self.retry(now_s)
        return True

    def release(self, number: int) -> None:
        host, workload = self.host[number], self.arrivals[number].workload
        assert host is not None
        demand = self.demands[workload]
        self.index.release(host, demand)
        self.changed.add(host)
        self.measures.took(host, workload, demand, -1)
        self.turn[number] = 0

    def retry(self, now_s: float) -> None:
        """The oldest of each kind of demand, the oldest first. What waits could be taken nowhere when it was last
        tried, so that only hosts on which something ended or began since need be asked."""
        changed, self.changed = self.changed, set()
        demands = list(self.waiting)
        heads_of = [(self.waiting[demand][0], at) for at, demand in enumerate(demands)]
        heapq.heapify(heads_of)
        while heads_of:
            number, at = heapq.heappop(heads_of)
            demand = demands[at]
            if not self.may_fit(demand, changed) or not self.begin(now_s, number, demand):
                continue
            changed |= self.changed
            self.measures.waits(number, demand, False)
            queue = self.waiting[demand]
            queue.popleft()
            if queue:
                heapq.heappush(heads_of, (queue[0], at))
            else:
                del self.waiting[demand]

    def may_fit(self, demand: Demand, hosts: set[str]) -> bool:
        if demand.rules.spread is not None:
            return True
        for host in hosts:
            row = self.index.row(host) if host in self.index else None
            if row is None or row.room_mib < demand.charge_mib + demand.extra_mib:
                continue
            if filters.refusal_of(demand, row, self.index.policy, filters.NO_SPREAD) is None:
                return True
        return False

    def lose(self, now_s: float, losses: Losses) -> None:
        lost = set(losses.hosts)
        gone = [number for number, host in enumerate(self.host) if host in lost and self.turn[number]]
        for number in sorted(gone, key=lambda number: self.turn[number]):
            placed_s = self.placed_s[number] or 0.0
            self.release(number)
            self.left_s[number] = max(0.0, self.left_s[number] - (now_s - placed_s))
            self.host[number], self.since_s[number] = None, now_s
        for host in losses.hosts:
            self.measures.lost(host)
            self.index.remove(host)
        self.evicted += len(gone)
        for number in gone:
            self.arrive(now_s, number)


def start_cost_s(kind: SandboxClass, calibration: Calibration) -> float:
    """From its placement to its program's begin: a clone's, for guests."""
    return calibration.start_clone_s if kind is SandboxClass.GUEST_KERNEL else calibration.start_cold_s


def replay(
    hosts: Iterable[HostState], trace: Trace, planning: Planning, calibration: Calibration, *,
    losses: Losses | None = None, told: Told | None = None,
) -> Replayed:  # fmt: skip
    """Runs the trace to the end of its last sandbox (those without an end stay)."""
    run = _Run(hosts, trace, planning, calibration)
    events = run.events
    if losses is not None:
        heapq.heappush(events, (losses.time_s, LOST, 0, 0))
    total, done, at = 2 * len(trace.arrivals), 0, 0
    arrivals = trace.arrivals
    while at < len(arrivals) or events:
        if at < len(arrivals) and (not events or (arrivals[at].time_s, ARRIVES) < events[0][:2]):
            now_s = arrivals[at].time_s
            run.measures.at(now_s)
            run.arrive(now_s, at)
            at += 1
        else:
            now_s, what, order, number = heapq.heappop(events)
            if what == ENDS and run.turn[number] != order:
                continue  # of a sandbox that was evicted since
            run.measures.at(now_s)
            if what == LOST and losses is not None:
                run.lose(now_s, losses)
            else:
                run.end(now_s, number, order)
        done += 1
        if told is not None and done % TELL_EVERY == 0:
            told(done, max(total, done))
    outcomes = tuple(map(Outcome, run.host, run.placed_s, run.ended_s))
    waits_s = [waited for waited, host in zip(run.waited_s, run.host, strict=True) if host is not None]
    waiting = sum(map(len, run.waiting.values()))
    return Replayed(outcomes, run.measures.finished(waits_s), waiting, run.evicted)


def largest(hosts: Iterable[HostState], count: int) -> tuple[str, ...]:
    """The hosts that it hurts most to lose."""
    ranked = sorted(hosts, key=lambda host: (-host.capacity.memory_mib, -host.capacity.cpu_milli, host.name))
    return tuple(host.name for host in ranked[:count])
