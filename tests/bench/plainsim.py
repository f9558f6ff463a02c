"""The planner's replay written plainly in SimPy, as somebody would who wants it right and not fast: a process a
sandbox, and a look at every host for every decision. The peer of bench_plan, and the reference that the planner's
results must equal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import simpy

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Planning
from controlplane.capacity.replay import Outcome, start_cost_s
from controlplane.capacity.trace import FOREVER, Trace
from controlplane.capacity.workload import demand_of
from controlplane.scheduler_values import Demand, HostState, layer_mib


@dataclass
class Host:
    name: str
    memory_mib: int
    cpu_milli: int
    overhead_mib: int
    promised_mib: int = 0
    ceilings_mib: int = 0
    cpu_asked: int = 0
    mapped: dict[tuple[str, str], int] = field(default_factory=dict)
    mapped_mib: int = 0


class Plain:
    """The state of one run."""

    def __init__(self, hosts: Iterable[HostState], trace: Trace, planning: Planning, calibration: Calibration) -> None:
        self.env = simpy.Environment()
        self.calibration, self.arrivals = calibration, trace.arrivals
        self.levels = planning.policy.levels
        self.hosts = [
            Host(h.name, h.capacity.memory_mib - h.capacity.system_reserve_mib, h.capacity.cpu_milli,
                 h.capacity.vm_overhead_mib)
            for h in hosts
        ]  # fmt: skip
        self.demands = {
            work: demand_of(planning.apply(work), calibration, quantile=planning.quantile) for work in trace.workloads
        }
        self.waiting: list[tuple[int, Demand, Any]] = []
        self.where: list[Host | None] = [None] * len(self.arrivals)
        self.placed_s: list[float | None] = [None] * len(self.arrivals)
        self.ended_s: list[float | None] = [None] * len(self.arrivals)

    def run(self) -> list[Outcome]:
        for number in range(len(self.arrivals)):
            self.env.process(self.sandbox(number))
        self.env.run()
        names = (host.name if host else None for host in self.where)
        return [Outcome(*three) for three in zip(names, self.placed_s, self.ended_s, strict=True)]

    def sandbox(self, number: int) -> Any:
        arrival = self.arrivals[number]
        yield self.env.timeout(arrival.time_s)
        demand = self.demands[arrival.workload]
        if not self.begin(number, demand):
            granted = self.env.event()
            self.waiting.append((number, demand, granted))
            yield granted
        if arrival.lifetime_s == FOREVER:
            return
        yield self.env.timeout(start_cost_s(arrival.workload.kind, self.calibration) + arrival.lifetime_s)
        self.ended_s[number] = self.env.now
        self.release(number, demand)
        self.retry()

    def retry(self) -> None:
        left = []
        for number, demand, granted in self.waiting:
            if self.begin(number, demand):
                granted.succeed()
            else:
                left.append((number, demand, granted))
        self.waiting = left

    def begin(self, number: int, demand: Demand) -> bool:
        best = None
        for host in self.hosts:
            score = self.score(host, demand)
            if score is not None and (best is None or score < best[0]):
                best = score, host
        if best is None:
            return False
        self.take(best[1], demand)
        self.where[number], self.placed_s[number] = best[1], self.env.now
        return True

    def score(self, host: Host, demand: Demand) -> tuple[int, int, int, str] | None:
        own_mib = demand.charge_mib + host.overhead_mib + demand.extra_mib
        missing_mib = 0
        for layer in demand.layers:
            if (demand.domain, layer.digest) not in host.mapped:
                missing_mib += layer_mib(layer)
        room_mib = host.memory_mib - host.promised_mib - host.mapped_mib
        asked = host.cpu_asked + demand.cpu_milli
        if own_mib + missing_mib > room_mib or demand.cpu_milli > host.cpu_milli:
            return None
        more_mib = own_mib + missing_mib + demand.ceiling_mib - demand.charge_mib
        fits = more_mib <= host.memory_mib - host.ceilings_mib - host.mapped_mib
        for number, level in enumerate(self.levels):
            last = number == len(self.levels) - 1
            if asked <= int(host.cpu_milli * level.cpu_overcommit) and (last or fits or not level.ceilings):
                return number, own_mib + missing_mib, room_mib, host.name
        return None

    def take(self, host: Host, demand: Demand) -> None:
        own_mib = demand.charge_mib + host.overhead_mib + demand.extra_mib
        host.promised_mib += own_mib
        host.ceilings_mib += own_mib + demand.ceiling_mib - demand.charge_mib
        host.cpu_asked += demand.cpu_milli
        for layer in demand.layers:
            key = (demand.domain, layer.digest)
            host.mapped[key] = host.mapped.get(key, 0) + 1
            if host.mapped[key] == 1:
                host.mapped_mib += layer_mib(layer)

    def release(self, number: int, demand: Demand) -> None:
        host = self.where[number]
        assert host is not None
        own_mib = demand.charge_mib + host.overhead_mib + demand.extra_mib
        host.promised_mib -= own_mib
        host.ceilings_mib -= own_mib + demand.ceiling_mib - demand.charge_mib
        host.cpu_asked -= demand.cpu_milli
        for layer in demand.layers:
            key = (demand.domain, layer.digest)
            host.mapped[key] -= 1
            if not host.mapped[key]:
                del host.mapped[key]
                host.mapped_mib -= layer_mib(layer)
