"""What every benchmark says at its end: a table for people, one JSON line for machines, and an exit status.

    $ make bench-NAME
    NAME on 2 cpus (Xeon ...), 24105 MiB, Linux 6.18.44
    what                          median        min        max  runs
    peer: one call a page       12.3 ms    12.1 ms    13.0 ms     5
    ...
    bar                            value        bar  verdict
    speed-up on 4 KiB pages        3.9x   >= 3.3x   met (peer: one call a page; 3.7x to 4.1x)
    {"bench": "NAME", "machine": {...}, "bars": {"<measure>": {"value": 3.9, "bar": 3.3, "ok": true, ...}}}

The JSON line is the last line of standard output. Each bar has `value` (the median of `runs`; null when it could not
be measured), `bar`, `at` ("least" or "most"), `ok`, `peer`, `unit`, `runs`, `min`, `max`, and `why` when it has no
value. The exit status is 0 when every bar is met, and 1 when one is missed or could not be measured: what was not
measured does not count as met. Keys beside these are never added without a word here.

A benchmark is a function that fills a Report:

    def body(report: Report) -> None:
        times = interleaved({"peer": run_peer, "us": run_us}, rounds=5)
        report.row("peer: one call a page", times["peer"])
        report.row("coalesced", times["us"])
        report.bar("speed-up", ratio(times["peer"], times["us"]), at_least=3.3, peer="one call a page")

    if __name__ == "__main__":
        raise SystemExit(run("balloon-host", body))

A ratio is peer over us for times and memory, so bigger is better; an overhead or a size has `at_most` instead.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.bench.leftovers import Ended, unwound_by_signals


class CannotMeasure(Exception):
    """Something this machine lacks: str() names it. Raised by a benchmark, told by the report."""


@dataclass(frozen=True)
class Runs:
    """The same thing measured several times, in order. `unit` is for people: "ms", "MiB", "x", "s", "GiB/s"."""

    values: tuple[float, ...]
    unit: str

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("no runs: measure at least once, or raise CannotMeasure")
        if not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"a run is not a finite number: {self.values}")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)


def ratio(peer: Runs, ours: Runs) -> Runs:
    """Peer over us, round by round (both ran in each round), as "x". ValueError when the rounds do not pair up."""
    if peer.unit != ours.unit or len(peer.values) != len(ours.values):
        raise ValueError(
            f"{len(peer.values)} runs in {peer.unit} and {len(ours.values)} in {ours.unit} are not pairs of rounds"
        )
    if min(ours.values) <= 0:
        raise ValueError(f"a run of 0 {ours.unit} cannot be divided by: give it more work")
    return Runs(tuple(a / b for a, b in zip(peer.values, ours.values, strict=True)), "x")


def interleaved(work: Mapping[str, Callable[[], float]], rounds: int, unit: str = "ms") -> dict[str, Runs]:
    """Runs each of `work` once a round, turn about, so that a slow moment of the machine hits all alike.

    Each returns its own measure in `unit` (what it timed, without its preparation). Every second round goes
    backwards, so that none is always the one that runs after another.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds):
        names = list(work)
        for name in names if turn % 2 == 0 else names[::-1]:
            taken[name].append(work[name]())
    return {name: Runs(tuple(values), unit) for name, values in taken.items()}


def timed_ms(action: Callable[[], object]) -> float:
    """How long `action` takes, in milliseconds of the monotonic clock."""
    begun_ns = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - begun_ns) / 1e6


@dataclass(frozen=True)
class Bar:
    """One promise and what came of it. `runs` is None when it could not be measured; then `why` says why."""

    measure: str
    bound: float
    at_most: bool
    peer: str
    runs: Runs | None
    why: str = ""

    @property
    def ok(self) -> bool:
        if self.runs is None:
            return False
        return self.runs.median <= self.bound if self.at_most else self.runs.median >= self.bound

    def encode(self) -> dict[str, Any]:
        """The bar's part of the JSON line."""
        body: dict[str, Any] = {
            "value": None if self.runs is None else rounded(self.runs.median),
            "bar": self.bound,
            "at": "most" if self.at_most else "least",
            "ok": self.ok,
            "peer": self.peer,
            "unit": "" if self.runs is None else self.runs.unit,
            "runs": [] if self.runs is None else [rounded(value) for value in self.runs.values],
        }
        if self.runs is None:
            return body | {"why": self.why}
        return body | {"min": rounded(self.runs.least), "max": rounded(self.runs.most)}


@dataclass
class Report:
    """Rows and bars of one benchmark, in the order they were added. `machine` may be given facts of its own."""

    name: str
    machine: dict[str, str | int | float] = field(default_factory=lambda: machine_facts())
    rows: list[tuple[str, Runs]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, what: str, runs: Runs) -> None:
        """A line of the table: people see it, no bar hangs on it."""
        self.rows.append((what, runs))

    def note(self, text: str) -> None:
        """A sentence under the table: what was measured, and how."""
        self.notes.append(text)

    def bar(
        self, measure: str, runs: Runs, *, at_least: float | None = None, at_most: float | None = None, peer: str = ""
    ) -> None:
        """The median of `runs` must reach `at_least`, or stay within `at_most`; exactly one of them is given."""
        bound, most = self._bound(measure, at_least, at_most)
        self.bars.append(Bar(measure, bound, most, peer, runs))

    def unmeasured(
        self, measure: str, why: str, *, at_least: float | None = None, at_most: float | None = None, peer: str = ""
    ) -> None:
        """The bar stands, but this machine cannot measure it: `why` names what is missing."""
        bound, most = self._bound(measure, at_least, at_most)
        self.bars.append(Bar(measure, bound, most, peer, None, why))

    def _bound(self, measure: str, at_least: float | None, at_most: float | None) -> tuple[float, bool]:
        if any(bar.measure == measure for bar in self.bars):
            raise ValueError(f"the measure {measure!r} has a bar already")
        if at_least is not None and at_most is None:
            return at_least, False
        if at_most is not None and at_least is None:
            return at_most, True
        raise ValueError(f"{measure}: give at_least or at_most, one of them")

    @property
    def ok(self) -> bool:
        """Whether there is a bar and every bar is met."""
        return bool(self.bars) and all(bar.ok for bar in self.bars)

    def encode(self) -> dict[str, Any]:
        """The JSON line as an object."""
        return {
            "bench": self.name,
            "machine": self.machine,
            "bars": {bar.measure: bar.encode() for bar in self.bars},
        }

    def table(self) -> str:
        """What people read: the machine, each row's median, min and max, each bar's verdict, the notes."""
        width = max([24, *(len(what) for what, _ in self.rows), *(len(bar.measure) for bar in self.bars)])
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [f"{self.name} on {facts}"]
        if self.rows:
            lines.append(f"{'what':{width}} {'median':>14} {'min':>14} {'max':>14} {'runs':>5}")
        for what, runs in self.rows:
            shown = " ".join(f"{quantity(value, runs.unit):>14}" for value in (runs.median, runs.least, runs.most))
            lines.append(f"{what:{width}} {shown} {len(runs.values):>5}")
        if self.bars:
            lines.append(f"{'bar':{width}} {'value':>14} {'bar':>14} verdict")
        lines += [verdict(bar, width) for bar in self.bars]
        return "\n".join([*lines, *self.notes])


def verdict(bar: Bar, width: int) -> str:
    """One bar's line of the table."""
    sign = "<=" if bar.at_most else ">="
    peer = f"peer: {bar.peer}; " if bar.peer else ""
    if bar.runs is None:
        return f"{bar.measure:{width}} {'-':>14} {f'{sign} {bar.bound:g}':>14} COULD NOT MEASURE: {bar.why}"
    unit = bar.runs.unit
    spread = f"{quantity(bar.runs.least, unit)} to {quantity(bar.runs.most, unit)}"
    bound = f"{sign} {quantity(bar.bound, unit)}"
    result = "met" if bar.ok else "MISSED"
    return f"{bar.measure:{width}} {quantity(bar.runs.median, unit):>14} {bound:>14} {result} ({peer}{spread})"


def quantity(value: float, unit: str) -> str:
    """A number as people read it: four digits that count, "x" close to it, other units after a space."""
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text}x" if unit == "x" else f"{text} {unit}".rstrip()


def rounded(value: float) -> float:
    """Six digits that count: more would be noise."""
    return float(f"{value:.6g}")


def machine_facts() -> dict[str, str | int | float]:
    """What a reader must know of the machine to judge the numbers; no name of it, no address."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "memory_mib": int(_field("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _field(path: str, name: str) -> str:
    """The value of the first line `name: value` of a proc file; "0 unknown" when there is none."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return "0 unknown"


def finish(report: Report, out: TextIO | None = None) -> int:
    """Prints the table and then the JSON line; the exit status."""
    out = out or sys.stdout
    print(report.table(), file=out)
    print(json.dumps(report.encode()), file=out, flush=True)
    return 0 if report.ok else 1


def run(
    name: str, body: Callable[[Report], None], promised: Sequence[tuple[str, float]] = (), out: TextIO | None = None
) -> int:
    """Runs a benchmark and reports; the exit status.

    `promised` names the bars (measure, at_least) that `body` sets: those still missing when it raises CannotMeasure
    are reported as not measured, with its reason. SIGTERM, SIGHUP and ^C unwind it (128 + the signal's number, no
    report). Any other exception is a fault of the benchmark and goes up.
    """
    report = Report(name)
    try:
        with unwound_by_signals():
            body(report)
    except Ended as told:
        print(f"{name}: ended by {told}; nothing was measured, nothing is left", file=sys.stderr)
        return 128 + told.signo
    except CannotMeasure as lack:
        set_already = {bar.measure for bar in report.bars}
        for measure, at_least in promised or ((name, 0.0),):
            if measure not in set_already:
                report.unmeasured(measure, str(lack), at_least=at_least)
    return finish(report, out)
