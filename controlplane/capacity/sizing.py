"""The smallest number of hosts with which a trace meets a target. Pure.

A target is a bound on waiting: how long the given share of all sandboxes may wait at most, and how many may be left
without a place (none). Hosts are taken from the front of the list that is given, and repeated when it is too short.
More hosts are taken to be no worse; the number is found by halving, and every run behind it is a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Planning
from controlplane.capacity.replay import Losses, Replayed, largest, replay
from controlplane.capacity.trace import Trace
from controlplane.scheduler_values import HostState

MOST_HOSTS = 1 << 20


@dataclass(frozen=True)
class Target:
    """99 % of all sandboxes wait `wait_s` at most, and every one finds a place, even when `lose` of the hosts, the
    largest, are lost when most is promised."""

    wait_s: float = 0.0
    lose: int = 0


@dataclass(frozen=True)
class Sized:
    """The number, and the run with it; None when even MOST_HOSTS would not do."""

    hosts: int | None
    run: Replayed | None
    runs: int


def met(run: Replayed, target: Target) -> bool:
    """Whether a run met it."""
    return run.waiting == 0 and run.measured.wait_s.p99 <= target.wait_s


def hosts_of(hosts: Sequence[HostState], count: int) -> list[HostState]:
    """The first `count`, repeated under names of their own when there are fewer."""
    return [
        hosts[at]
        if at < len(hosts)
        else replace(hosts[at % len(hosts)], name=f"{hosts[at % len(hosts)].name}+{at // len(hosts)}")
        for at in range(count)
    ]


def run_with(
    hosts: Sequence[HostState], trace: Trace, planning: Planning, calibration: Calibration, lose: int,
    told: Callable[[int, int], None] | None = None,
) -> tuple[Replayed, Losses | None]:  # fmt: skip
    """A replay, and when hosts are to be lost a second one in which they are lost at the first one's peak."""
    run = replay(hosts, trace, planning, calibration, told=told)
    if not lose:
        return run, None
    losses = Losses(run.measured.peak_s, largest(hosts, min(lose, len(hosts) - 1)))
    return replay(hosts, trace, planning, calibration, losses=losses, told=told), losses


def smallest(
    hosts: Sequence[HostState], trace: Trace, planning: Planning, calibration: Calibration, target: Target,
    told: Callable[[int], None] | None = None,
) -> Sized:  # fmt: skip
    """See the module."""
    runs = 0

    def tried(count: int) -> Replayed:
        nonlocal runs
        runs += 1
        if told is not None:
            told(count)
        return run_with(hosts_of(hosts, count), trace, planning, calibration, target.lose)[0]

    low, high, best = target.lose, target.lose + 1, None
    while best is None:
        if high > MOST_HOSTS:
            return Sized(None, None, runs)
        run = tried(high)
        if met(run, target):
            best = run
        else:
            low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        run = tried(middle)
        if met(run, target):
            high, best = middle, run
        else:
            low = middle
    return Sized(high, best, runs)
