"""A recorded demand for memory over time, and the same at another pace. Pure but for read_curve.

The format is CSV, with the header `time_s,memory_mib` and a line for each change; lines that begin with # and blank
ones are passed over. A demand holds until the next line's time, and the last line only says when the curve ends:

    # where it comes from
    time_s,memory_mib
    0,24
    12.5,310
    40,24
    60,24

Times are seconds from any beginning, each later than the one before; memory is MiB, at least 0. Two lines at least.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from controlplane.errors import ConfigError

HEADER = ("time_s", "memory_mib")
MOST_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """From `time_s` on, `memory_mib` are wanted."""

    time_s: float
    memory_mib: int


@dataclass(frozen=True)
class Curve:
    """Steps in order, the first at 0; wanted until `end_s`."""

    steps: tuple[Step, ...]
    end_s: float

    @property
    def peak_mib(self) -> int:
        """The most that is wanted."""
        return max(step.memory_mib for step in self.steps)

    @property
    def wanted_gib_s(self) -> float:
        """What is wanted, over time."""
        times = [*(step.time_s for step in self.steps), self.end_s]
        spans = (after - before for before, after in pairwise(times))
        return sum(step.memory_mib * span for step, span in zip(self.steps, spans, strict=True)) / 1024


def read_curve(path: Path) -> Curve:
    """A file's curve. ConfigError names the file, and the line that is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return parse_curve(file, str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_curve(lines: Iterable[str], source: str) -> Curve:
    """Lines as a curve. ConfigError names `source` and the line that is wrong."""
    rows = list(_rows(lines, source))
    if not rows:
        raise ConfigError(f"{source}: is empty; its first line should be {','.join(HEADER)}")
    number, header = rows[0]
    if tuple(header) != HEADER:
        raise ConfigError(f"{source}:{number}: the header is {','.join(header)!r}, and should be {','.join(HEADER)}")
    points = [_step(f"{source}:{number}", row) for number, row in rows[1:]]
    for (number, _), before, after in zip(rows[2:], points, points[1:], strict=False):
        if after.time_s <= before.time_s:
            raise ConfigError(f"{source}:{number}: time_s {after.time_s:g} is not after {before.time_s:g}")
    if len(points) < 2:
        raise ConfigError(f"{source}: has {len(points)} lines of demand: two are needed, the last one says its end")
    first_s = points[0].time_s
    steps = [Step(point.time_s - first_s, point.memory_mib) for point in points]
    return Curve(_merged(steps[:-1]), steps[-1].time_s)


def _rows(lines: Iterable[str], source: str) -> Iterator[tuple[int, list[str]]]:
    """Fields with their line's number."""
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                fields = next(csv.reader([line], strict=True))
            except csv.Error as error:
                raise ConfigError(f"{source}:{number}: is not CSV: {error}") from error
            yield number, [field.strip() for field in fields]


def _step(where: str, row: list[str]) -> Step:
    if len(row) != len(HEADER):
        raise ConfigError(f"{where}: has {len(row)} fields, and should have {len(HEADER)}: {','.join(HEADER)}")
    numbers = []
    for name, text in zip(HEADER, row, strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{where}: {name} = {text!r} is not a number of at least 0")
        numbers.append(value)
    if numbers[1] > MOST_MIB:
        raise ConfigError(f"{where}: memory_mib {row[1]} is above {MOST_MIB}: it is in MiB, not in bytes")
    return Step(numbers[0], math.ceil(numbers[1]))


def _merged(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Only where the demand changes."""
    kept: list[Step] = []
    for step in steps:
        if not kept or kept[-1].memory_mib != step.memory_mib:
            kept.append(step)
    return tuple(kept)


def paced(curve: Curve, speed: float, scale: float = 1.0) -> Curve:
    """The same curve `speed` times as fast and `scale` times as high."""
    steps = (Step(step.time_s / speed, math.ceil(step.memory_mib * scale)) for step in curve.steps)
    return Curve(_merged(steps), curve.end_s / speed)


def written(curve: Curve, notes: Iterable[str] = ()) -> str:
    """The file that read_curve reads, `notes` as its comments."""
    lines = [f"# {note}" for note in notes] + [",".join(HEADER)]
    lines += [f"{step.time_s:g},{step.memory_mib}" for step in curve.steps]
    return "\n".join([*lines, f"{curve.end_s:g},{curve.steps[-1].memory_mib}"]) + "\n"
