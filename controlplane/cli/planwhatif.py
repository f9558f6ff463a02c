"""`sandloom plan whatif`: the same plan twice, as things are and changed, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.capacity import svg
from controlplane.capacity.cluster import DOMAINS, Cluster
from controlplane.capacity.fit import fit
from controlplane.capacity.html import Page, Table
from controlplane.capacity.sizes import parse_milli, parse_range
from controlplane.capacity.sizing import Target, hosts_of, run_with
from controlplane.capacity.trace import Trace
from controlplane.capacity.trace_public import Assumed, read
from controlplane.capacity.workload import Workload
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.output import Column, render_table
from controlplane.cli.planoutput import FORMS, change, share, told, write_report
from controlplane.cli.planreplay import number, progressing
from controlplane.cli.planstate import State, StateOptions, add_state, load_state, parse_state, workload_of
from controlplane.errors import ConfigError


@dataclass(frozen=True)
class Changes:
    """What is changed; None and 0 leave things as they are."""

    hosts: int = 0
    memory: tuple[int, int] | None = None
    cpu_milli: int = 0
    planning: tuple[tuple[str, object], ...] = ()

    def of_cluster(self, cluster: Cluster) -> Cluster:
        """The cluster with the changes."""
        hosts = cluster.hosts
        if self.hosts and not -len(hosts) < self.hosts:
            raise UsageError("no hosts would be left", f"{self.hosts:+d} of {len(hosts)}", "remove fewer")
        if self.hosts:
            hosts = tuple(hosts_of(hosts, len(hosts) + self.hosts))
        classes = {name: self.of_class(workload) for name, workload in cluster.classes.items()}
        running = tuple((self.of_class(workload), count) for workload, count in cluster.running)
        names = {host.name for host in hosts}
        assigned = tuple(pair for pair in cluster.assigned if pair[0] in names)
        planning = replace(cluster.planning, **dict(self.planning))  # type: ignore[arg-type]
        return replace(cluster, hosts=hosts, classes=classes, running=running, assigned=assigned, planning=planning)

    def of_class(self, workload: Workload) -> Workload:
        """A class with the changes."""
        least_mib, most_mib = self.memory or (workload.memory_min_mib, workload.memory_max_mib)
        return replace(
            workload, memory_min_mib=least_mib, memory_max_mib=most_mib, cpu_milli=self.cpu_milli or workload.cpu_milli
        )

    @property
    def text(self) -> str:
        """For people."""
        said = [f"{self.hosts:+d} hosts"] if self.hosts else []
        said += [f"memory {self.memory[0]}:{self.memory[1]} MiB"] if self.memory else []
        said += [f"{self.cpu_milli / 1000:g} CPUs"] if self.cpu_milli else []
        said += [f"{name} {value}" for name, value in self.planning]
        return ", ".join(said)


@dataclass(frozen=True)
class WhatifOptions:
    """`subject`: a class, or a trace's file."""

    state: StateOptions
    subject: str
    changes: Changes
    report: Path | None


@dataclass(frozen=True)
class Row:
    """One measure, as it is and changed."""

    what: str
    before: float
    after: float
    render: Callable[[float], str]


def act(options: WhatifOptions, shell: Shell) -> int:
    state = load_state(options.state, shell)
    changed = replace(state, cluster=options.changes.of_cluster(state.cluster))
    path = Path(options.subject)
    if path.exists():
        rows = _replays(path, state, changed, options.changes, shell)
    else:
        rows = _fits(options.subject, state, changed, options)
    data = {
        "change": options.changes.text,
        "rows": [{"what": r.what, "before": r.before, "after": r.after} for r in rows],
    }
    told(shell, data, text_of(options.changes, rows))
    write_report(options.report, report_of(options, rows), shell)
    return 0


def _fits(name: str, state: State, changed: State, options: WhatifOptions) -> list[Row]:
    workload = workload_of(name, state, options.state)
    before = fit(state.cluster, workload, state.calibration)
    after = fit(changed.cluster, options.changes.of_class(workload), state.calibration)
    rows = [
        Row(f"{name} that fit", before.total, after.total, _count),
        Row("hosts", len(before.hosts), len(after.hosts), _count),
    ]
    bound = sorted(dict(before.bindings) | dict(after.bindings))
    return rows + [
        Row(f"hosts bound by {what}", dict(before.bindings).get(what, 0), dict(after.bindings).get(what, 0), _count)
        for what in bound
    ]


def _replays(path: Path, state: State, changed: State, changes: Changes, shell: Shell) -> list[Row]:
    try:
        trace = read(path, state.cluster.classes, Assumed())
    except ConfigError as error:
        raise CliError("cannot replay", str(error)) from error
    made: dict[Workload, Workload] = {work: changes.of_class(work) for work in trace.workloads}
    other = Trace(tuple(replace(arrival, workload=made[arrival.workload]) for arrival in trace.arrivals), trace.note)
    with progressing(shell) as tell:
        runs = [
            run_with(one.cluster.hosts, over, one.cluster.planning, one.calibration, Target().lose, tell(what))[0]
            for one, over, what in ((state, trace, "as it is"), (changed, other, "changed"))
        ]
    measured = [run.measured for run in runs]
    pairs: list[tuple[str, Callable[[int], float], Callable[[float], str]]] = [
        ("hosts", lambda at: len((state, changed)[at].cluster.hosts), _count),
        ("99 % waited at most", lambda at: measured[at].wait_s.p99, svg.duration),
        ("without a place", lambda at: runs[at].waiting, _count),
        ("memory promised, mean", lambda at: measured[at].memory_share.mean, share),
        ("memory promised, most", lambda at: measured[at].memory_share.most, share),
        ("CPU asked, most", lambda at: measured[at].cpu_share.most, share),
        ("overcommit, p99", lambda at: measured[at].overcommit.p99, share),
        ("risk of parking", lambda at: measured[at].park_risk, share),
        ("risk of OOM", lambda at: measured[at].oom_risk, share),
        ("sharing saves, MiB", lambda at: measured[at].saved_mib_peak, _count),
    ]
    return [Row(what, get(0), get(1), render) for what, get, render in pairs]


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS: tuple[Column[Row], ...] = (
    Column("WHAT", lambda row: row.what),
    Column("AS IT IS", lambda row: row.render(row.before), right=True),
    Column("CHANGED", lambda row: row.render(row.after), right=True),
    Column("DIFFERENCE", lambda row: change(row.after, row.before), right=True),
)


def text_of(changes: Changes, rows: list[Row]) -> str:
    """For people."""
    return f"changed: {changes.text}\n" + render_table(COLUMNS, rows, wide=False, colour=False)


def report_of(options: WhatifOptions, rows: list[Row]) -> Page:
    """The HTML report."""
    shown = tuple((r.what, r.render(r.before), r.render(r.after), change(r.after, r.before)) for r in rows)
    first = rows[0]
    note = change(first.after, first.before)
    bars = [
        svg.Bar("as it is", (first.before,), _count(first.before)),
        svg.Bar("changed", (first.after,), f"{_count(first.after)} {note}"),
    ]
    figure = svg.bar_chart(first.what, bars, ((first.what, svg.PRIVATE),), unit=_count)
    table = Table("Side by side", ("what", "as it is", "changed", "difference"), shown)
    return Page(
        f"What if: {options.changes.text}",
        f"{first.what}: {_count(first.before)} → {_count(first.after)}",
        True,
        (figure,),
        (table,),
    )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subject", metavar="CLASS|TRACE", help="what is planned: a class (as `plan fit`), or a trace's file"
    )
    add_state(parser)
    parser.add_argument(
        "--hosts", default="0", metavar="+N|-N", help="so many hosts more, like the first ones, or fewer"
    )
    parser.add_argument("--set-memory", default="", metavar="MIN:MAX", help="classes get this memory")
    parser.add_argument("--set-cpus", default="", metavar="N", help="classes get so many CPUs")
    parser.add_argument("--overcommit", default="", metavar="X", help="CPU may be asked for X times over")
    parser.add_argument("--quantile", default="", metavar="Q", help="the quantile of measured use that is charged")
    parser.add_argument("--domains", default="", choices=DOMAINS, help="who shares with whom")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report (HTML) with pictures")
    add_output(parser, FORMS)


def parse(namespace: argparse.Namespace) -> WhatifOptions:
    planning: list[tuple[str, object]] = []
    if namespace.overcommit:
        planning.append(("cpu_overcommit", number(namespace.overcommit, "--overcommit", 0.01)))
    if namespace.quantile:
        planning.append(("quantile", number(namespace.quantile, "--quantile", 0, 0.999999)))
    if namespace.domains:
        planning.append(("domains", namespace.domains))
    try:
        memory = parse_range(namespace.set_memory) if namespace.set_memory else None
        cpu_milli = parse_milli(namespace.set_cpus) if namespace.set_cpus else 0
    except ValueError as error:
        raise UsageError("not a size", str(error)) from error
    changes = Changes(int(number(namespace.hosts, "--hosts", -1e6, 1e6)), memory, cpu_milli, tuple(planning))
    if changes == Changes():
        raise UsageError(
            "nothing would be changed",
            "",
            "give --hosts, --set-memory, --set-cpus, --overcommit, --quantile or --domains",
        )
    return WhatifOptions(parse_state(namespace), namespace.subject, changes, namespace.report)


COMMAND = Command(
    words=("plan", "whatif"),
    summary="compare a plan as things are with one where something is changed",
    description="Two results side by side: hosts added or removed, other sizes of the classes, another policy.",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom plan whatif web --cluster cluster.toml --hosts -10",
        "sandloom plan whatif demand.csv --cluster cluster.toml --domains all --overcommit 8",
    ),
)
