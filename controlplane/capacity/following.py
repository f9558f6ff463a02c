"""How well memory followed a demand: samples in, figures and pictures out. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from controlplane.capacity.svg import CAPACITY, PRIVATE, RESERVED, SAVED, SHARED, Series, step_chart
from controlplane.capacity.textplot import gib, sparkline

MIB_PER_GIB = 1024
COLUMNS = ("time_s", "demand_mib", "held_mib", "allocated_mib", "actual_mib")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look, MiB: what the curve asks for, what the workload holds of it, what the host allocated to the sandbox,
    and what the sandbox really has. The last two count its kernel and its other programs, too."""

    time_s: float
    demand_mib: int
    held_mib: int
    allocated_mib: int
    actual_mib: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A step of the curve, as its workload did it: asked for at `asked_s`, done at `done_s`, of which it was busy for
    `busy_s`."""

    asked_s: float
    done_s: float
    memory_mib: int
    busy_s: float


@dataclass(frozen=True)
class Figures:
    """A whole replay. Lag: from asking the workload for more until it held it, its own touching of pages included.
    Shortfall: what was asked for and not held, over time."""

    duration_s: float
    demand_gib_s: float
    held_gib_s: float
    allocated_gib_s: float
    actual_gib_s: float
    ceiling_gib_s: float
    shortfall_gib_s: float
    lag_median_s: float
    lag_most_s: float
    busy_s: float

    @property
    def saved(self) -> float:
        """What part of its ceiling, over time, was not allocated to it."""
        return 1 - self.allocated_gib_s / self.ceiling_gib_s if self.ceiling_gib_s else 0.0


def over_time(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    """GiB·s of a value in MiB that holds from one sample to the next."""
    spans = ((before, after.time_s - before.time_s) for before, after in pairwise(samples))
    return sum(value(sample) * span_s for sample, span_s in spans) / MIB_PER_GIB


def figures_of(samples: Sequence[Sample], answers: Sequence[Answer], ceiling_mib: int) -> Figures:
    """What samples (in order of time) and answers say together. ValueError without two samples."""
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples are not enough for figures: two are")
    raised = [
        answer.done_s - answer.asked_s
        for before, answer in zip((0, *(each.memory_mib for each in answers)), answers, strict=False)
        if answer.memory_mib > before
    ]
    return Figures(
        duration_s=samples[-1].time_s - samples[0].time_s,
        demand_gib_s=over_time(samples, lambda one: one.demand_mib),
        held_gib_s=over_time(samples, lambda one: one.held_mib),
        allocated_gib_s=over_time(samples, lambda one: one.allocated_mib),
        actual_gib_s=over_time(samples, lambda one: one.actual_mib),
        ceiling_gib_s=over_time(samples, lambda one: ceiling_mib),
        shortfall_gib_s=over_time(samples, lambda one: max(0, one.demand_mib - one.held_mib)),
        lag_median_s=statistics.median(raised) if raised else 0.0,
        lag_most_s=max(raised, default=0.0),
        busy_s=sum(answer.busy_s for answer in answers),
    )


SERIES: tuple[tuple[str, Callable[[Sample], int], str, bool], ...] = (
    ("demand", lambda one: one.demand_mib, SAVED, True),
    ("held by it", lambda one: one.held_mib, SHARED, False),
    ("allocated", lambda one: one.allocated_mib, PRIVATE, False),
    ("actual", lambda one: one.actual_mib, CAPACITY, False),
)


def drawn(title: str, samples: Sequence[Sample], ceiling_mib: int) -> str:
    """The replay as SVG text, self-contained."""
    series = [
        Series(name, tuple((one.time_s, value(one)) for one in samples), colour, filled)
        for name, value, colour, filled in SERIES
    ]
    last_s = samples[-1].time_s if samples else 0.0
    ceiling = Series("its maximum", ((0.0, ceiling_mib), (last_s, ceiling_mib)), RESERVED)
    return step_chart(title, [ceiling, *series])


def plotted(samples: Sequence[Sample], ceiling_mib: int, width: int) -> str:
    """The replay as lines of a terminal, all on one scale."""
    most = max([ceiling_mib, *(one.demand_mib for one in samples)])
    wide = max(len(name) for name, *_ in SERIES)
    lines = []
    for name, value, *_ in SERIES:
        values = [value(one) for one in samples]
        lines.append(f"{name:{wide}}  {sparkline(values, width, most)}  {gib(max(values, default=0))} at most\n")
    return "".join(lines)


def table(samples: Sequence[Sample]) -> str:
    """Samples as CSV."""
    rows = (f"{one.time_s:.3f},{one.demand_mib},{one.held_mib},{one.allocated_mib},{one.actual_mib}" for one in samples)
    return "\n".join([",".join(COLUMNS), *rows]) + "\n"


def as_data(figures: Figures) -> dict[str, float]:
    """For programs."""
    return {name: round(value, 6) for name, value in asdict(figures).items()}
