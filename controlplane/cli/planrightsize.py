"""`sandloom plan rightsize`: what memory each workload should have, from what it was seen to use."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from controlplane.capacity import svg
from controlplane.capacity.html import Page, Table
from controlplane.capacity.rightsize import Sample, Size, read, rightsize
from controlplane.capacity.textplot import bar
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.errors import CliError
from controlplane.cli.output import Column, render_table
from controlplane.cli.planoutput import FORMS, told, write_report
from controlplane.cli.planstate import samples_now
from controlplane.errors import ConfigError

LIVE = "live"


@dataclass(frozen=True)
class RightsizeOptions:
    """`history` None: what the fabric's sandboxes use now, added to `record`'s file when one is given."""

    history: Path | None
    record: Path | None
    report: Path | None


def act(options: RightsizeOptions, shell: Shell) -> int:
    try:
        samples = read(options.history) if options.history else _live(options.record, shell)
    except ConfigError as error:
        raise CliError("cannot read the history", str(error)) from error
    if not samples:
        raise CliError("there is no history", str(options.history or "no sandbox runs"), "record some samples first")
    sizes = rightsize(samples)
    told(shell, sizes, text_of(sizes))
    write_report(options.report, report_of(sizes), shell)
    return 0


def _live(record: Path | None, shell: Shell) -> list[Sample]:
    now_s = shell.now_s()
    fresh = [Sample(name, now_s, mib) for name, mib in shell.over(samples_now)]
    if record is None:
        return fresh
    known = read(record) if record.exists() else []
    lines = [] if known else ["workload,time_s,memory_mib\n"]
    lines += [f"{sample.workload},{sample.time_s:.0f},{sample.memory_mib:.1f}\n" for sample in fresh]
    try:
        with record.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise CliError("cannot record", f"{record} ({error.strerror})", "name another file") from error
    return known + fresh


def columns(most_mib: float) -> tuple[Column[Size], ...]:
    """The columns; bars are on one scale."""
    return (
        Column("WORKLOAD", lambda row: row.workload),
        Column("LOWER", lambda row: f"{row.lower_mib} MiB", right=True),
        Column("TARGET", lambda row: f"{row.target_mib} MiB", right=True),
        Column("UPPER", lambda row: f"{row.upper_mib} MiB", right=True),
        Column("PEAK", lambda row: f"{row.peak_mib} MiB", right=True),
        Column("SAMPLES", lambda row: f"{row.samples:,}", right=True),
        Column("OVER", lambda row: svg.duration(row.span_s), right=True),
        Column("AGE", lambda row: svg.duration(row.age_s), right=True),
        Column("TARGET OF THE LARGEST", lambda row: bar(row.target_mib, most_mib, 20)),
    )


def text_of(sizes: list[Size]) -> str:
    """For people."""
    table = render_table(columns(max(size.target_mib for size in sizes)), sizes, wide=False, colour=False)
    example = sizes[0]
    flag = f"--memory {example.lower_mib}M:{max(example.upper_mib, example.peak_mib)}M"
    return table + f"as a range of `sandloom run`, {example.workload}'s would be {flag}\n"


def report_of(sizes: list[Size]) -> Page:
    """The HTML report."""
    bars = [
        svg.Bar(
            size.workload,
            (float(size.lower_mib), float(size.target_mib - size.lower_mib), float(size.upper_mib - size.target_mib)),
            f"target {size.target_mib} MiB",
        )
        for size in sorted(sizes, key=lambda size: -size.upper_mib)[: svg.MOST_BARS]
    ]
    colours = (("lower bound", svg.PRIVATE), ("up to the target", svg.SHARED), ("up to the upper bound", svg.FREE))
    rows = tuple(
        (s.workload, str(s.lower_mib), str(s.target_mib), str(s.upper_mib), str(s.peak_mib), str(s.samples),
         svg.duration(s.span_s), svg.duration(s.age_s))
        for s in sizes
    )  # fmt: skip
    names = ("workload", "lower MiB", "target MiB", "upper MiB", "peak MiB", "samples", "over", "age")
    figure = svg.bar_chart("Memory by workload", bars, colours)
    return Page("Right sizes", f"{len(sizes)} workloads", True, (figure,), (Table("Sizes", names, rows),))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "history", metavar="HISTORY",
        help=f"a CSV (workload,time_s,memory_mib), Azure's memory.csv, or `{LIVE}`: what sandboxes use now",
    )  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="FILE", help=f"with `{LIVE}`: add to FILE, and use all of it")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report (HTML) with pictures")
    add_output(parser, FORMS)


def parse(namespace: argparse.Namespace) -> RightsizeOptions:
    history = None if namespace.history == LIVE else Path(namespace.history)
    return RightsizeOptions(history, namespace.record, namespace.report)


COMMAND = Command(
    words=("plan", "rightsize"),
    summary="say what memory each workload should have, from its history",
    description="Lower bound, target and upper bound of each workload's memory, with the number of samples and the age"
    " of the newest. A cron job with `plan rightsize live --record FILE` makes a history.",
    configure=configure,
    parse=parse,
    act=act,
    examples=("sandloom plan rightsize history.csv", "sandloom plan rightsize live --record history.csv"),
    operand="file",
)
