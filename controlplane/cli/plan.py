"""`sandloom plan fit`: how many more sandboxes of a class fit, and what the next one fails at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.capacity import svg
from controlplane.capacity.fit import Fit, HostFit, fit, staged
from controlplane.capacity.html import Page, Table
from controlplane.capacity.packing import Packing, pack
from controlplane.capacity.textplot import gib
from controlplane.capacity.workload import Workload, demand_of
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.errors import UsageError
from controlplane.cli.output import Column, render_table
from controlplane.cli.planoutput import FORMS, LEGEND, aligned, change, hosts_text, memory_bar, told, write_report
from controlplane.cli.planstate import State, StateOptions, add_state, load_state, parse_state, workload_of

MOST_ROWS = 20


@dataclass(frozen=True)
class FitOptions:
    """`wanted`: classes, and how many of each; 0 asks how many there could be."""

    state: StateOptions
    wanted: tuple[tuple[str, int], ...]
    without_sharing: bool
    diverging: float
    report: Path | None


@dataclass(frozen=True)
class Answer:
    """A fit, and beside it what it would be without sharing and with diverging pages (None: not asked)."""

    fit: Fit
    without_sharing: int | None
    diverging: float
    diverged: int | None
    wanted: int

    @property
    def fits(self) -> bool:
        """Whether what was asked for fits: one, when no number was given."""
        return self.fit.total >= max(1, self.wanted)


def answer_of(state: State, workload: Workload, wanted: int, options: FitOptions) -> Answer:
    """All that is asked of one class."""
    blind = diverged = None
    if options.without_sharing:
        planning = replace(state.cluster.planning, share=False)
        blind = fit(replace(state.cluster, planning=planning), workload, state.calibration).total
    if options.diverging:
        diverged = fit(state.cluster, workload, state.calibration, diverging=options.diverging).total
    found = fit(state.cluster, workload, state.calibration)
    return Answer(found, blind, options.diverging, diverged, wanted)


def act(options: FitOptions, shell: Shell) -> int:
    state = load_state(options.state, shell)
    wanted = [(workload_of(name, state, options.state), count) for name, count in options.wanted]
    if len(wanted) > 1:
        return _mix(state, wanted, options, shell)
    answer = answer_of(state, *wanted[0], options)
    told(shell, answer, text_of(answer, wide=shell.printer.form == "wide"))
    write_report(options.report, report_of(answer, state), shell)
    return 0 if answer.fits else 1


def sentence(answer: Answer) -> str:
    """The answer in one sentence."""
    found = answer.fit
    parts = [f"{found.total:,} more {found.workload} fit on {hosts_text(len(found.hosts))}"]
    if answer.wanted:
        short = answer.wanted - found.total
        parts = [f"{answer.wanted:,} {found.workload} {'fit' if short <= 0 else 'do not fit'}: {parts[0]}"]
    if answer.without_sharing is not None:
        parts.append(f"without sharing {answer.without_sharing:,} ({change(answer.without_sharing, found.total)})")
    if answer.diverged is not None:
        loss = f"if {answer.diverging:.0%} of shared pages diverge {answer.diverged:,}"
        parts.append(f"{loss} ({change(answer.diverged, found.total)})")
    return "; ".join(parts)


def text_of(answer: Answer, *, wide: bool) -> str:
    """For people."""
    found, need = answer.fit, answer.fit.need
    binds = ", ".join(f"{name} on {hosts_text(count)}" for name, count in found.bindings)
    one = f"{need.guaranteed_mib} MiB guaranteed + {need.overhead_mib} overhead + {need.page_tables_mib} page tables"
    one += f" + {need.measured_mib} by measured use" if need.measured_mib else ""
    rows = [
        ("the next one fails at", binds),
        ("one takes", f"{one}; its layers {need.layers_mib} MiB once a host and domain"),
        ("each alone allows", ", ".join(f"{name} {count:,}" for name, count in found.alone)),
        ("for example", f"{found.hosts[0].host}: {found.hosts[0].message}" if found.hosts else ""),
        ("found no place", f"{found.unplaced:,} of what runs already" if found.unplaced else ""),
    ]
    text = f"{sentence(answer)}\n{aligned(rows)}\n"
    shown = sorted(found.hosts, key=lambda host: (-host.more, host.host))[: None if wide else MOST_ROWS]
    text += render_table(COLUMNS, shown, wide=wide, colour=False)
    left = len(found.hosts) - len(shown)
    return text + (f"and {left:,} more hosts (-o wide)\n" if left else "") + f"{LEGEND}\n"


COLUMNS: tuple[Column[HostFit], ...] = (
    Column("HOST", lambda row: row.host),
    Column("MORE", lambda row: f"{row.more:,}", right=True),
    Column("BINDS", lambda row: row.binding),
    Column("MEMORY WHEN FULL", lambda row: memory_bar(row.memory)),
    Column("WHY", lambda row: row.message, wide=True),
    Column("EACH ALONE", lambda row: ", ".join(f"{name} {count}" for name, count in row.alone), wide=True),
)


def report_of(answer: Answer, state: State) -> Page:
    """The HTML report."""
    found = answer.fit
    memories = [host.memory for host in found.hosts]
    figures = [svg.bar_chart("Memory of each host once it is full", svg.memory_bars(memories), svg.PARTS)]
    unshared_mib, shared_mib = sum(m.unshared_mib for m in memories), sum(m.shared_mib for m in memories)
    saved_mib = max(0, unshared_mib - shared_mib)
    note = f"saves {gib(saved_mib)} ({saved_mib / max(1, unshared_mib):.0%})"
    bars = [
        svg.Bar("each its own", (float(shared_mib), float(saved_mib)), gib(unshared_mib)),
        svg.Bar("shared", (float(shared_mib), 0.0), note),
    ]
    colours = (("in memory", svg.SHARED), ("copies that sharing saves", svg.SAVED))
    figures.append(svg.bar_chart("Layers and templates: what sharing saves", bars, colours))
    rows = tuple((host.host, str(host.more), host.binding, host.message) for host in found.hosts[:200])
    alone = tuple((name, f"{count:,}") for name, count in found.alone)
    return Page(
        f"How many {found.workload} fit", sentence(answer), answer.fits, figures,
        (
            Table("If nothing else mattered", ("resource", "sandboxes"), alone),
            Table("Hosts", ("host", "more", "binds", "why"), rows),
        ),
        (f"State: {state.source}. Calibration: {state.calibration.measured_on}.",),
    )  # fmt: skip


def _mix(state: State, wanted: Sequence[tuple[Workload, int]], options: FitOptions, shell: Shell) -> int:
    """Several classes at once: does the demand as a whole fit?"""
    planning = state.cluster.planning
    index, _ = staged(state.cluster, state.calibration)
    demands = [(demand_of(planning.apply(w), state.calibration, quantile=planning.quantile), n) for w, n in wanted]
    hosts = state.cluster.hosts
    if state.cluster.running or state.cluster.assigned:
        raise UsageError("a mix is planned on empty hosts", "something runs there", "leave [[running]] out")
    packing = pack(demands, hosts, index.policy)
    names = [workload.name for workload, _ in wanted]
    told(shell, _mix_data(names, packing), _mix_text(names, packing))
    return 0 if packing.complete else 1


def _mix_data(names: Sequence[str], packing: Packing) -> dict[str, object]:
    rows = zip(names, packing.wanted, packing.placed, strict=True)
    return {"fits": packing.complete, "classes": [{"class": n, "wanted": w, "placed": p} for n, w, p in rows]}


def _mix_text(names: Sequence[str], packing: Packing) -> str:
    rows = [
        (name, f"{placed:,} of {wanted:,} placed")
        for name, wanted, placed in zip(names, packing.wanted, packing.placed, strict=True)
    ]
    return f"the demand {'fits' if packing.complete else 'does not fit'}: {packing.total:,} placed\n{aligned(rows)}"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "classes", metavar="CLASS[=N]", nargs="+", help="a class, or an image with --memory; =N: do N fit?"
    )
    add_state(parser)
    parser.add_argument(
        "--without-sharing", action="store_true", help="tell beside it how many fit if nothing is shared"
    )
    parser.add_argument(
        "--diverge", default="0", metavar="PERCENT", help="tell what is lost if so much of shared pages diverges"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report (HTML) with pictures")
    add_output(parser, FORMS)


def parse(namespace: argparse.Namespace) -> FitOptions:
    wanted = []
    for text in namespace.classes:
        name, equals, count = text.partition("=")
        if equals and not (count.isdigit() and int(count)):
            raise UsageError("not a number of sandboxes", repr(text), "write CLASS or CLASS=N")
        wanted.append((name, int(count) if equals else 0))
    if len(wanted) > 1 and not all(count for _, count in wanted):
        raise UsageError("several classes need a number each", " ".join(namespace.classes), "write CLASS=N CLASS=N")
    return FitOptions(
        parse_state(namespace), tuple(wanted), namespace.without_sharing, percent(namespace.diverge), namespace.report
    )


def percent(text: str) -> float:
    """A share of a text in percent. UsageError."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise UsageError("not a percentage", repr(text), "write it as 10 or 10%")
    return value / 100


COMMAND = Command(
    words=("plan", "fit"),
    summary="say how many more sandboxes of a class fit, and what stops the next",
    description="Fills the hosts by the scheduler's own rules: how many more sandboxes of a class fit, on which hosts,"
    " and which resource the next one fails at. Ends with 1 when what was asked for does not fit.",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom plan fit web --cluster cluster.toml --without-sharing --diverge 10",
        "sandloom plan fit debian --memory 256M:1G --cpus 0.5",
        "sandloom plan fit web=500 db=20 --cluster cluster.toml",
        "sandloom plan fit web=500 --cluster cluster.toml --report fit.html",
    ),
)
