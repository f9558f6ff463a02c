"""Derives the curves below tests/bench/curves from samples of the Azure Functions traces: `python -m` this, with the
folder of the samples and the one to write to.

azure2021_200.csv   single invocations: app, func, end_timestamp, duration (s)
memory.csv          percentiles of allocated memory (MB) of functions

An invocation runs in an instance of its function, which is kept for KEPT_S after it ended and used again. An instance
has the memory of one of the functions of memory.csv (each function of an app is given one of them, in turn), at a
percentile that the golden ratio spreads evenly over its instances. A curve is an app's: the sum over its instances.
The apps are the eight with the most time of invocations.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from controlplane.capacity.demand import Curve, Step, written

KEPT_S = 60.0
RUNTIME_MIB = 16
CURVES = 8
GOLDEN = 0.6180339887
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
NOTES = (
    "an app's memory over time, derived by tests/bench/derive_curves.py from samples of the Azure Functions traces of",
    "2019 and 2021 (Microsoft, CC-BY; as packed by vhive-serverless/invitro, MIT). Shahrad et al., Serverless in the",
    "Wild, USENIX ATC'20; Zhang et al., Faster and Cheaper Serverless Computing on Harvested Resources, SOSP'21",
)


@dataclass
class Instance:
    """One instance of a function, free again at `free_s`, with what it holds."""

    begun_s: float
    free_s: float
    memory_mib: int


def rows_of(path: Path) -> Iterator[Mapping[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def at_percentile(row: Mapping[str, str], percent: float) -> int:
    """Between the percentiles that are given, a straight line; MB as MiB."""
    known = [(float(each), float(row[f"AverageAllocatedMb_pct{each}"])) for each in PERCENTILES]
    for (low, below), (high, above) in pairwise(known):
        if percent <= high:
            return round(below + (above - below) * max(0.0, percent - low) / (high - low))
    return round(known[-1][1])


def instances_of(runs: Sequence[tuple[float, float]], memory: Mapping[str, str]) -> list[Instance]:
    """A function's instances for runs (begin, end) in order of their begin."""
    made: list[Instance] = []
    for begin_s, end_s in runs:
        idle = [one for one in made if one.free_s <= begin_s <= one.free_s + KEPT_S]
        if idle:
            max(idle, key=lambda one: one.free_s).free_s = end_s
        else:
            percent = 100 * ((len(made) + 1) * GOLDEN % 1)
            made.append(Instance(begin_s, end_s, at_percentile(memory, percent)))
    return made


def curve_of(instances: Sequence[Instance], end_s: float) -> Curve:
    """What all of them hold together, and a runtime that is always there."""
    times = sorted({0.0, *(one.begun_s for one in instances), *(one.free_s + KEPT_S for one in instances)})
    steps: list[Step] = []
    for time_s in (round(time_s, 2) for time_s in times if time_s < end_s):
        alive = (one.memory_mib for one in instances if one.begun_s <= time_s + 0.005 < one.free_s + KEPT_S)
        if not steps or steps[-1].time_s < time_s:
            steps.append(Step(time_s, RUNTIME_MIB + sum(alive)))
    return Curve(tuple(steps), end_s)


def derived(folder: Path) -> list[Curve]:
    """The curves, the busiest app's first."""
    memory = list(rows_of(folder / "memory.csv"))
    apps: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(folder / "azure2021_200.csv"):
        end_s, took_s = float(row["end_timestamp"]), float(row["duration"])
        apps[row["app"]][row["func"]].append((max(0.0, end_s - took_s), end_s))
    last_s = max(end_s for app in apps.values() for runs in app.values() for _, end_s in runs)
    busiest = sorted(apps.values(), key=lambda app: -sum(b - a for runs in app.values() for a, b in runs))[:CURVES]
    return [
        curve_of(
            [
                one
                for number, runs in enumerate(app[func] for func in sorted(app))
                for one in instances_of(sorted(runs), memory[number % len(memory)])
            ],
            round(last_s),
        )
        for app in busiest
    ]


def main(source: Path, target: Path) -> None:
    for number, curve in enumerate(derived(source), 1):
        (target / f"azure-app-{number}.csv").write_text(written(curve, NOTES), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
