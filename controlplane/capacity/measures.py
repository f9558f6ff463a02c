"""What a replay measures as it goes: quantities that hold for a time, weighted by it, and the risk of each host.

A host's use is taken as the sum of its sandboxes' uses, each spread by itself, so that its variances add. What is over
the host's memory has to be parked; what is over it by more than the host can take back within one resize lag would meet
the out-of-memory killer first. A sandbox whose use is not known counts with its charge, without any spread.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.fit import HostMemory, memory_of
from controlplane.capacity.workload import Workload, normal_below
from controlplane.model import LayerSize
from controlplane.scheduler_index import Index
from controlplane.scheduler_values import Demand, layer_mib

QUANTILES = (0.5, 0.95, 0.99)
MOMENTS = 400
"""A picture needs no more; twice as many are kept at most."""
PEAK_STEP = 1.02
"""The hosts are looked at again once so much more is promised than when they were last: those that changed since."""


@dataclass(frozen=True)
class Spread:
    """A quantity over time or over sandboxes: its mean, quantiles and maximum."""

    mean: float
    p50: float
    p95: float
    p99: float
    most: float


@dataclass(frozen=True)
class Moment:
    """The cluster at one time, MiB and counts."""

    time_s: float
    asked_mib: int  # by those that run and those that wait, as if nobody shared
    promised_mib: int  # private and shared memory of those that run
    capacity_mib: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Measured:
    """All of a run. Shares are of what the hosts have above their reserve; risks are probabilities, the mean over time
    of the hosts in use, and the worst host's worst moment."""

    memory_share: Spread
    cpu_share: Spread
    overcommit: Spread  # ceilings over memory
    wait_s: Spread
    park_risk: float
    park_risk_worst: float
    oom_risk: float
    oom_risk_worst: float
    saved_mib_peak: int  # by sharing, at the moment when it was most
    moments: tuple[Moment, ...]
    hosts_peak: tuple[HostMemory, ...]  # when most was promised, to within 2 %
    peak_s: float
    ended_s: float


class _Timed:
    """A quantity that holds until it changes."""

    def __init__(self) -> None:
        self.values, self.lasted_s = array("d"), array("d")

    def held(self, value: float, lasted_s: float) -> None:
        if lasted_s > 0:
            self.values.append(value)
            self.lasted_s.append(lasted_s)

    def spread(self) -> Spread:
        return weighted(self.values, self.lasted_s)


def weighted(values: Sequence[float], weights: Sequence[float]) -> Spread:
    """Mean, quantiles and maximum of weighted values; zeros when there are none."""
    total = math.fsum(weights)
    if total <= 0:
        return Spread(0.0, 0.0, 0.0, 0.0, 0.0)
    ranked = sorted(zip(values, weights, strict=True))
    wanted, found, sum_so_far = list(QUANTILES), [], 0.0
    for value, weight in ranked:
        sum_so_far += weight
        while wanted and sum_so_far >= wanted[0] * total - 1e-9 * total:
            found.append(value)
            wanted.pop(0)
    mean = math.fsum(value * weight for value, weight in ranked) / total
    p50, p95, p99 = [*found, *([ranked[-1][0]] * len(wanted))]
    return Spread(mean, p50, p95, p99, ranked[-1][0])


class Measures:
    """See the module. The replay tells of each change after it made it, and of each time before what happens then."""

    def __init__(self, index: Index, calibration: Calibration) -> None:
        self._index = index
        self._slack_mib = calibration.reclaim_mib_s * calibration.resize_lag_s
        rows = list(index.rows())
        self._capacity_mib = sum(row.capacity.memory_mib - row.capacity.system_reserve_mib for row in rows)
        self._cpu_milli = sum(row.capacity.cpu_milli for row in rows)
        self._used: dict[str, _Used] = {row.name: _Used() for row in rows}
        self._time_s: float | None = None
        self._promised_mib = self._running_asked_mib = self._waiting_asked_mib = self._cpu_asked = (
            self._ceilings_mib
        ) = 0
        self._running = self._busy = 0
        self._waits: set[int] = set()
        self._park = self._oom = 0.0  # sums over hosts
        self._park_time = self._oom_time = self._busy_time = 0.0
        self._park_worst = self._oom_worst = 0.0
        self._memory, self._cpu, self._overcommit = _Timed(), _Timed(), _Timed()
        self._moments: list[Moment] = []
        self._stride = self._skipped = 0
        self._peak_mib, self._peak_s = 0.0, 0.0
        self._peak_hosts = {row.name: memory_of(row) for row in rows}
        self._changed: set[str] = set()  # hosts, since the peak was last seen
        self._lost: set[str] = set()
        self._saved_mib = 0

    def at(self, now_s: float) -> None:
        """Time has come to be `now_s`: what held until now held so long."""
        before_s, self._time_s = self._time_s, now_s
        if before_s is None or before_s == now_s:
            return
        lasted_s, capacity_mib = now_s - before_s, max(1, self._capacity_mib)
        self._memory.held(self._promised_mib / capacity_mib, lasted_s)
        self._cpu.held(self._cpu_asked / max(1, self._cpu_milli), lasted_s)
        self._overcommit.held(self._ceilings_mib / capacity_mib, lasted_s)
        self._park_time += self._park * lasted_s
        self._oom_time += self._oom * lasted_s
        self._busy_time += self._busy * lasted_s
        self._remember(before_s)

    def _remember(self, time_s: float) -> None:
        self._saved_mib = max(self._saved_mib, self._running_asked_mib - self._promised_mib)
        if self._promised_mib > PEAK_STEP * self._peak_mib:
            self._peak_mib, self._peak_s = float(self._promised_mib), time_s
            for host in self._changed - self._lost:
                self._peak_hosts[host] = memory_of(self._index.row(host))
            for host in self._lost & self._peak_hosts.keys():
                del self._peak_hosts[host]
            self._changed.clear()
        if self._skipped < self._stride:
            self._skipped += 1
            return
        self._skipped = 0
        self._moments.append(self._moment(time_s))
        if len(self._moments) >= 2 * MOMENTS:
            self._moments = self._moments[::2]
            self._stride = 2 * self._stride + 1

    def _moment(self, time_s: float) -> Moment:
        asked_mib = self._running_asked_mib + self._waiting_asked_mib
        return Moment(
            time_s, asked_mib, self._promised_mib, self._capacity_mib, self._running, len(self._waits)
        )  # fmt: skip

    def waits(self, number: int, demand: Demand, waiting: bool) -> None:
        """Whether one waits now."""
        if waiting == (number in self._waits):
            return
        (self._waits.add if waiting else self._waits.discard)(number)
        self._waiting_asked_mib += _asked_mib(demand) if waiting else -_asked_mib(demand)

    def took(self, host: str, workload: Workload, demand: Demand, more: int) -> None:
        """One more runs on a host (or, with -1, no longer)."""
        row, used = self._index.row(host), self._used[host]
        self._changed.add(host)
        overhead_mib = row.capacity.vm_overhead_mib
        self._running += more
        self._running_asked_mib += more * (_asked_mib(demand) + overhead_mib)
        self._cpu_asked += more * demand.cpu_milli
        self._ceilings_mib += more * (demand.ceiling_mib + overhead_mib)
        mean_mib, std_mib = _use_of(workload, demand)
        used.mean_mib += more * (mean_mib + overhead_mib + demand.extra_mib)
        used.variance += more * std_mib**2
        used.sandboxes += more
        self._busy += more if used.sandboxes == (1 if more > 0 else 0) else 0
        self._promised_mib += row.promised_mib + row.mapped_mib - used.promised_mib
        used.promised_mib = row.promised_mib + row.mapped_mib
        self._risk(used, row.capacity.memory_mib - row.capacity.system_reserve_mib - row.mapped_mib)

    def _risk(self, used: _Used, room_mib: int) -> None:
        self._park -= used.park
        self._oom -= used.oom
        used.park, used.oom = used.above(room_mib), used.above(room_mib + self._slack_mib)
        self._park += used.park
        self._oom += used.oom
        self._park_worst = max(self._park_worst, used.park)
        self._oom_worst = max(self._oom_worst, used.oom)

    def lost(self, host: str) -> None:
        """A host on which nothing runs any more is gone."""
        capacity = self._index.row(host).capacity
        self._lost.add(host)
        self._capacity_mib -= capacity.memory_mib - capacity.system_reserve_mib
        self._cpu_milli -= capacity.cpu_milli

    def finished(self, waits_s: Sequence[float]) -> Measured:
        """Everything, once the last event is over."""
        ended_s = self._time_s or 0.0
        self._remember(ended_s)
        busy = max(self._busy_time, 1e-9)
        return Measured(
            self._memory.spread(), self._cpu.spread(), self._overcommit.spread(),
            weighted(waits_s, [1.0] * len(waits_s)),
            max(0.0, self._park_time / busy), self._park_worst, max(0.0, self._oom_time / busy), self._oom_worst,
            self._saved_mib, (*self._moments, self._moment(ended_s)), tuple(self._peak_hosts.values()),
            self._peak_s, ended_s,
        )  # fmt: skip


class _Used:
    """What a host's sandboxes use, and how likely that is too much."""

    __slots__ = ("mean_mib", "oom", "park", "promised_mib", "sandboxes", "variance")

    def __init__(self) -> None:
        self.mean_mib = self.variance = self.park = self.oom = 0.0
        self.sandboxes = self.promised_mib = 0

    def above(self, room_mib: float) -> float:
        """The probability that they use more than `room_mib` together."""
        if not self.sandboxes:
            return 0.0
        if self.variance <= 1e-6:
            return float(self.mean_mib > room_mib + 1e-6)
        return normal_below((self.mean_mib - room_mib) / math.sqrt(self.variance))


def _use_of(workload: Workload, demand: Demand) -> tuple[float, float]:
    if workload.use_mib is None:
        return float(demand.charge_mib), 0.0
    return min(workload.use_mib, float(workload.memory_max_mib)), workload.use_std_mib


@cache
def _layers_mib(layers: tuple[LayerSize, ...]) -> int:
    return sum(map(layer_mib, layers))


def _asked_mib(demand: Demand) -> int:
    """What it would take if nobody shared anything, the overhead of its guest apart."""
    return demand.charge_mib + demand.extra_mib + _layers_mib(demand.layers)
