"""What a workload's memory should be, from what it was seen to use. Pure.

Samples go into a histogram (controlplane/usage.py) whose buckets grow by 5 %, so that a quantile is right to 5 %, and
count for less the older they are: a sample loses half of its weight in HALF_LIFE_S. The target is the 90th percentile
with a margin; the bounds are the 50th and the 95th, further apart the less history there is, as is usual for
autoscalers (Kubernetes' VPA): with a day of samples they are twice as far from the truth as they may be, with a month
hardly. A workload that peaks above its target's bounds keeps its peak as ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from controlplane.capacity.trace import Fields, read_rows
from controlplane.errors import ConfigError
from controlplane.usage import HALF_LIFE_S, bucket_of, quantile_mib

MARGIN = 1.15
COLUMNS = ("workload", "time_s", "memory_mib")


@dataclass(frozen=True)
class Sample:
    """What one sandbox of a workload used at a time; `weight`: how many equal samples it stands for."""

    workload: str
    time_s: float
    memory_mib: float
    weight: float = 1.0


@dataclass(frozen=True)
class Size:
    """MiB. `samples` and `age_s` say how far to trust it: how many there are, and how long ago the newest was taken."""

    workload: str
    lower_mib: int
    target_mib: int
    upper_mib: int
    peak_mib: int
    samples: int
    span_s: float
    age_s: float


def rightsize(samples: Iterable[Sample], now_s: float | None = None) -> list[Size]:
    """A size for each workload, by name. `now_s`: the newest sample's time unless given."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.workload, []).append(sample)
    newest_s = max((sample.time_s for mine in by_name.values() for sample in mine), default=0.0)
    then_s = newest_s if now_s is None else now_s
    return [_size(name, by_name[name], then_s) for name in sorted(by_name)]


def _size(name: str, samples: list[Sample], now_s: float) -> Size:
    weights: dict[int, float] = {}
    for sample in samples:
        bucket = bucket_of(sample.memory_mib)
        weights[bucket] = weights.get(bucket, 0.0) + sample.weight * 0.5 ** ((now_s - sample.time_s) / HALF_LIFE_S)
    oldest_s, newest_s = min(s.time_s for s in samples), max(s.time_s for s in samples)
    span_s, count = newest_s - oldest_s, sum(s.weight for s in samples)
    confidence = max(min(span_s / 86_400, count / 1440), 1e-3)  # days, at one sample a minute
    target = quantile_mib(weights, 0.9) * MARGIN
    lower = min(target, quantile_mib(weights, 0.5) * MARGIN * (1 + 0.001 / confidence) ** -2)
    upper = max(target, quantile_mib(weights, 0.95) * MARGIN * (1 + 1 / confidence))
    peak = max(s.memory_mib for s in samples)
    return Size(
        name, math.ceil(lower), math.ceil(target), math.ceil(min(upper, 16 * peak)), math.ceil(peak), round(count),
        span_s, max(0.0, now_s - newest_s),
    )  # fmt: skip


def read(path: Path) -> list[Sample]:
    """Samples of a CSV: workload,time_s,memory_mib; or Azure's memory.csv, whose percentiles stand for its samples."""
    header, rows = read_rows(path)
    if set(COLUMNS) <= set(header):
        fields = (Fields(f"{path}:{line}", row) for line, row in enumerate(rows, 2))
        return [Sample(f.text("workload"), f.number("time_s", None), f.number("memory_mib", None)) for f in fields]
    if "AverageAllocatedMb_pct50" in header:
        return [sample for line, row in enumerate(rows, 2) for sample in _azure(f"{path}:{line}", row)]
    raise ConfigError(f"{path}: no history that is known here: wanted {','.join(COLUMNS)}, or Azure's memory.csv")


def _azure(where: str, row: Mapping[str, str]) -> list[Sample]:
    """Percentiles as a distribution: each stands for the samples between it and the one before. Over a day."""
    field, name, before = Fields(where, row), row["HashFunction"][:12], 0
    count = field.number("SampleCount", None)
    made = []
    for at in (1, 5, 25, 50, 75, 95, 99, 100):
        weight = count * (at - before) / 100
        made += [
            Sample(name, time_s, field.number(f"AverageAllocatedMb_pct{at}", None), weight / 2)
            for time_s in (0.0, 86_400.0)
        ]
        before = at
    return made
