"""A recorded demand: what arrived when, how large, for how long. Read from CSV by its header; strict about numbers.

Our own format has one line a sandbox; `time_s`, `lifetime_s` and either `class` or the sizes are required:

    time_s,lifetime_s,name,class,tenant,memory_min_mib,memory_max_mib,cpu_milli,image,layers,use_mib,use_std_mib

`class` names a class of the cluster file, whose sizes the other columns overrule. `layers` is `base=120 app=30` in MiB;
`use_mib` is what it uses of its own memory on average, `use_std_mib` how much that varies. Empty fields and missing
columns count as not said. `lifetime_s` empty: it stays. The public traces (trace_public.py) are known by their headers.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.capacity.workload import Image, Workload
from controlplane.errors import ConfigError
from controlplane.model import LayerSize
from controlplane.scheduler_values import MIB

COLUMNS = (
    "time_s", "lifetime_s", "name", "class", "tenant", "memory_min_mib", "memory_max_mib", "cpu_milli", "image",
    "layers", "use_mib", "use_std_mib",
)  # fmt: skip
FOREVER = math.inf


@dataclass(frozen=True, slots=True)
class Arrival:
    """One sandbox of a trace. Times in seconds from the trace's beginning."""

    time_s: float
    lifetime_s: float
    name: str
    workload: Workload


@dataclass(frozen=True)
class Trace:
    """Arrivals in order of time; `note` says what was assumed of them."""

    arrivals: tuple[Arrival, ...]
    note: str = ""

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Each distinct one, in order of first arrival."""
        return tuple(dict.fromkeys(arrival.workload for arrival in self.arrivals))


def in_order(arrivals: Iterable[Arrival], note: str = "") -> Trace:
    """A trace of arrivals in any order; equal times keep theirs."""
    return Trace(tuple(sorted(arrivals, key=lambda arrival: arrival.time_s)), note)


def compressed(trace: Trace, load: float) -> Trace:
    """The same arrivals in a time shorter by `load`, each for as long as before: so many times more at once."""
    if load == 1:
        return trace
    arrivals = tuple(replace(arrival, time_s=arrival.time_s / load) for arrival in trace.arrivals)
    return Trace(
        arrivals, f"{trace.note}; arrivals {load:g} times as fast" if trace.note else f"{load:g} times as fast"
    )


def read_rows(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """A CSV file's header and rows. ConfigError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not CSV: {error}") from error
    return tuple(reader.fieldnames or ()), rows


def parse_own(
    path: Path, header: tuple[str, ...], rows: Iterable[Mapping[str, str]], classes: Mapping[str, Workload]
) -> Trace:
    """Our own format. ConfigError names the line and the column."""
    if unknown := [column for column in header if column not in COLUMNS]:
        raise ConfigError(f"{path}: unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)}")
    for column in ("time_s", "lifetime_s"):
        if column not in header:
            raise ConfigError(f"{path}: column {column} is missing")
    made: dict[Workload, Workload] = {}
    return in_order(_own(path, number, row, classes, made) for number, row in enumerate(rows, 2))


def _own(
    path: Path, line: int, row: Mapping[str, str], classes: Mapping[str, Workload], made: dict[Workload, Workload]
) -> Arrival:
    where = f"{path}:{line}"
    field = Fields(where, row)
    base = None
    if name := field.text("class"):
        if name not in classes:
            raise ConfigError(f"{where}: class {name!r} is not in the cluster file")
        base = classes[name]
    least_mib = field.whole("memory_min_mib", base.memory_min_mib if base else None)
    most_mib = field.whole("memory_max_mib", base.memory_max_mib if base else least_mib)
    if not 0 < least_mib <= most_mib:
        raise ConfigError(f"{where}: memory_min_mib {least_mib} and memory_max_mib {most_mib} are no range")
    use_mib = field.number("use_mib", base.use_mib if base and base.use_mib is not None else -1.0)
    workload = Workload(
        name or field.text("image") or "sandbox", least_mib, most_mib,
        field.whole("cpu_milli", base.cpu_milli if base else 1000), _image(field, base),
        field.text("tenant") or (base.tenant if base else "default"),
        use_mib=use_mib if use_mib >= 0 else None,
        use_std_mib=field.number("use_std_mib", base.use_std_mib if base else 0.0),
    )  # fmt: skip
    if base is not None:
        workload = replace(workload, kind=base.kind, rules=base.rules, domain=base.domain)
    workload = made.setdefault(workload, workload)
    lifetime_s = field.number("lifetime_s", FOREVER)
    return Arrival(field.number("time_s", None), lifetime_s, field.text("name") or f"sandbox-{line - 1}", workload)


def _image(field: Fields, base: Workload | None) -> Image:
    name, layers = field.text("image"), field.text("layers")
    if not name and not layers:
        return base.image if base else Image("none")
    sizes: list[LayerSize] = []
    for text in layers.split():
        digest, _, size = text.partition("=")
        if not digest or not size.isdigit():
            raise ConfigError(f"{field.where}: layers: {text!r} is not NAME=MIB")
        sizes.append(LayerSize(digest, int(size) * MIB))
    return Image(name or layers, tuple(sizes))


class Fields:
    """A row's fields with their line, for what is wrong with one."""

    def __init__(self, where: str, row: Mapping[str, str]) -> None:
        self.where, self._row = where, row

    def text(self, column: str) -> str:
        """The field; "" when there is none."""
        return (self._row.get(column) or "").strip()

    def number(self, column: str, default: float | None) -> float:
        """A finite number of at least 0."""
        text = self.text(column)
        if not text and default is not None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{self.where}: {column} = {text!r} is not a number of at least 0")
        return value

    def whole(self, column: str, default: int | None) -> int:
        """A whole number; a fraction is rounded up."""
        return math.ceil(self.number(column, default))


def written(trace: Trace) -> Iterator[str]:
    """The lines of a trace in our own format."""
    yield ",".join(COLUMNS) + "\n"
    for arrival in trace.arrivals:
        work = arrival.workload
        layers = " ".join(f"{layer.digest}={layer.size_bytes // MIB}" for layer in work.image.layers)
        use = ("", "") if work.use_mib is None else (f"{work.use_mib:g}", f"{work.use_std_mib:g}")
        lifetime = "" if arrival.lifetime_s == FOREVER else f"{arrival.lifetime_s:g}"
        yield ",".join([
            f"{arrival.time_s:g}", lifetime, arrival.name, "", work.tenant, str(work.memory_min_mib),
            str(work.memory_max_mib), str(work.cpu_milli), work.image.name, layers, *use,
        ]) + "\n"  # fmt: skip
