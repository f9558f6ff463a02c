"""`sandloom plan replay`: a recorded demand over a cluster, and the smallest number of hosts that does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.capacity import svg
from controlplane.capacity.html import Page, Table
from controlplane.capacity.measures import Measured, Spread
from controlplane.capacity.replay import Losses, Replayed
from controlplane.capacity.sizes import parse_milli, parse_range
from controlplane.capacity.sizing import Sized, Target, hosts_of, met, run_with, smallest
from controlplane.capacity.textplot import gib, sparkline
from controlplane.capacity.trace import Trace, compressed
from controlplane.capacity.trace_public import Assumed, read
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.plan import percent
from controlplane.cli.planoutput import (
    FORMS,
    LEGEND,
    aligned,
    hosts_text,
    memory_bar,
    plain,
    plot_width,
    share,
    told,
    write_report,
)
from controlplane.cli.planstate import State, StateOptions, add_state, load_state, parse_state, recorded
from controlplane.cli.progress import Progress
from controlplane.cli.sizes import parse_duration_s
from controlplane.errors import ConfigError

OWN = "live"


@dataclass(frozen=True)
class ReplayOptions:
    """`trace` None: the fabric's own records."""

    state: StateOptions
    trace: Path | None
    assumed: Assumed
    load: float
    hosts: int
    target: Target
    find_hosts: bool
    report: Path | None


@dataclass(frozen=True)
class Ran:
    """A replay over so many hosts, with what was lost on the way."""

    run: Replayed
    hosts: int
    losses: Losses | None
    arrivals: int
    note: str
    last_s: float  # when the last sandbox arrived, or the last that waited began

    @property
    def measured(self) -> Measured:
        """What was measured."""
        return self.run.measured


def act(options: ReplayOptions, shell: Shell) -> int:
    state = load_state(options.state, shell)
    trace = load_trace(options, state, shell)
    hosts = hosts_of(state.cluster.hosts, options.hosts) if options.hosts else list(state.cluster.hosts)
    if not hosts:
        raise CliError("there are no hosts", state.source, "give --cluster FILE")
    planning = state.cluster.planning
    with progressing(shell) as tell:
        run, losses = run_with(hosts, trace, planning, state.calibration, options.target.lose, tell("replaying"))
    began_s = max((outcome.placed_s or 0.0 for outcome in run.outcomes), default=0.0)
    last_s = max(began_s, trace.arrivals[-1].time_s)
    ran = Ran(run, len(hosts), losses, len(trace.arrivals), trace.note, last_s)
    sized = None
    if options.find_hosts:
        with progressing(shell) as tell:
            count = tell("trying hosts")
            sized = smallest(hosts, trace, planning, state.calibration, options.target, lambda many: count(many, 0))
    data = {"hosts": ran.hosts, "arrivals": ran.arrivals, "waiting": run.waiting, "evicted": run.evicted,
            "target_met": met(run, options.target), "measured": plain(run.measured),
            "smallest_hosts": sized.hosts if sized else None}  # fmt: skip
    told(shell, data, text_of(ran, options.target, sized))
    write_report(options.report, report_of(ran, options.target, sized, state), shell)
    return 0 if met(run, options.target) else 1


def load_trace(options: ReplayOptions, state: State, shell: Shell) -> Trace:
    """The trace that is meant. CliError."""
    try:
        if options.trace is None:
            trace = shell.over(recorded)
        else:
            trace = read(options.trace, state.cluster.classes, options.assumed)
    except ConfigError as error:
        raise CliError("cannot replay", str(error)) from error
    if not trace.arrivals:
        raise CliError("nothing to replay", str(options.trace or "the fabric has no records of sandboxes"))
    return compressed(trace, options.load)


@contextmanager
def progressing(shell: Shell) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Tells how far a long run is, on a terminal."""
    with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:

        def about(what: str) -> Callable[[int, int], None]:
            def tell(done: int, total: int) -> None:
                progress.update(
                    f"{what}: {done:,} of {total:,} events ({done / total:.0%})" if total else f"{what}: {done:,}"
                )

            return tell

        yield about


def sentence(ran: Ran, target: Target) -> str:
    """What came of it, in one sentence."""
    wait, run = ran.measured.wait_s, ran.run
    lost = f" with {target.lose} lost at their peak" if target.lose else ""
    text = f"{ran.arrivals:,} sandboxes on {hosts_text(ran.hosts)}{lost}: 99 % waited {svg.duration(wait.p99)} at most"
    verdict = "the target is met" if met(run, target) else "the target is missed"
    return f"{text}, {run.waiting:,} found no place; {verdict} ({svg.duration(target.wait_s)} and none)"


def measures_of(ran: Ran) -> list[tuple[str, str]]:
    """The measures by name."""
    measured = ran.measured

    def spread(value: Spread) -> str:
        names = ("mean", "p50", "p95", "p99", "most")
        return ", ".join(f"{name} {share(getattr(value, name))}" for name in names)

    def risk(mean: float, worst: float) -> str:
        return f"{share(mean)} of busy hosts' time, {share(worst)} at worst"

    wait = measured.wait_s
    return [
        ("memory promised", spread(measured.memory_share)),
        ("CPU asked", spread(measured.cpu_share)),
        ("overcommit", spread(measured.overcommit) + " (ceilings over memory)"),
        ("waiting", ", ".join(f"{n} {svg.duration(getattr(wait, n))}" for n in ("p50", "p95", "p99", "most"))),
        ("risk of parking", risk(measured.park_risk, measured.park_risk_worst)),
        ("risk of OOM", risk(measured.oom_risk, measured.oom_risk_worst)),
        ("sharing saves", f"{gib(measured.saved_mib_peak)} when it saves most"),
        ("begun anew", f"{ran.run.evicted:,} sandboxes of lost hosts" if ran.losses else ""),
    ]  # fmt: skip


def text_of(ran: Ran, target: Target, sized: Sized | None) -> str:
    """For people, with plots."""
    measured, width = ran.measured, plot_width()
    moments = measured.moments
    most = max((m.asked_mib for m in moments), default=0)
    promised = [m.promised_mib for m in moments]
    lines = [
        ("asked", f"{sparkline([m.asked_mib for m in moments], width, most)} {gib(most)}"),
        ("promised", f"{sparkline(promised, width, most)} {gib(max(promised))}"),
        ("waiting", f"{sparkline([m.waiting for m in moments], width)} {max(m.waiting for m in moments):,}"),
    ]  # fmt: skip
    text = f"{sentence(ran, target)}\n{aligned(measures_of(ran))}\n{aligned(lines)}\n"
    fullest = sorted(measured.hosts_peak, key=lambda host: (-(host.private_mib + host.shared_mib), host.host))[:8]
    text += "the fullest hosts when most was promised:\n"
    text += aligned([(host.host, memory_bar(host)) for host in fullest]) + f"  {LEGEND}\n"
    if sized is not None:
        found = hosts_text(sized.hosts) if sized.hosts else "no number of hosts"
        text += f"\nthe smallest number that meets the target: {found} ({sized.runs} runs)\n"
    return text + (f"trace: {ran.note}\n" if ran.note else "")


def report_of(ran: Ran, target: Target, sized: Sized | None, state: State) -> Page:
    """The HTML report."""
    measured = ran.measured
    losses = (ran.losses.time_s,) if ran.losses else ()
    saved = svg.Bar(
        "at the peak",
        (float(max(m.promised_mib for m in measured.moments)), float(measured.saved_mib_peak)),
        f"saves {gib(measured.saved_mib_peak)}",
    )
    figures = [
        svg.demand_chart("Demand against capacity over time", measured.moments, losses, 1.1 * ran.last_s),
        svg.bar_chart("Memory of each host when most was promised", svg.memory_bars(measured.hosts_peak), svg.PARTS),
        svg.bar_chart("What sharing saves", [saved], (("promised", svg.PRIVATE), ("saved by sharing", svg.SAVED))),
    ]
    tables = [Table("Measures", ("what", "how much"), tuple(row for row in measures_of(ran) if row[1]))]
    if sized is not None:
        answer = f"{sized.hosts:,}" if sized.hosts else "none"
        tables.append(
            Table("The smallest number of hosts that meets the target", ("hosts", "runs"), ((answer, str(sized.runs)),))
        )
    notes = [
        f"Trace: {ran.note or 'own format'}.",
        f"State: {state.source}. Calibration: {state.calibration.measured_on}.",
    ]
    return Page("Replay of a recorded demand", sentence(ran, target), met(ran.run, target), figures, tables, notes)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", metavar="TRACE", help=f"a CSV or Azure's folder (see below), or `{OWN}`: the fabric's records"
    )
    add_state(parser)
    parser.add_argument(
        "--hosts", default="0", metavar="N", help="use N hosts: the first N, repeated when there are fewer"
    )
    parser.add_argument("--load", default="1", metavar="X", help="let arrivals come X times as fast")
    parser.add_argument(
        "--target-wait", default="0", metavar="TIME", help="99 %% may wait this long at most; 0 unless given"
    )
    parser.add_argument("--lose", default="0", metavar="N", help="lose the N largest hosts when most is promised")
    parser.add_argument(
        "--smallest", action="store_true", help="find the smallest number of hosts that meets the target"
    )
    parser.add_argument("--seed", default="1", metavar="N", help="of the images that a public trace does not name")
    parser.add_argument("--image-scale", default="1", metavar="X", help="how large those images are")
    parser.add_argument(
        "--use", default="", metavar="PERCENT[:STD]", help="what sandboxes use of their ceiling, where not said"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report (HTML) with pictures")
    add_output(parser, FORMS)


def number(text: str, what: str, least: float, most: float = 1e9) -> float:
    """A number in its bounds. UsageError names `what`."""
    try:
        value = float(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise UsageError(f"{what} is wrong", repr(text), f"a number from {least:g} to {most:g}")
    return value


def parse(namespace: argparse.Namespace) -> ReplayOptions:
    assumed = Assumed(
        seed=int(number(namespace.seed, "--seed", 0)),
        image_scale=number(namespace.image_scale, "--image-scale", 0, 100),
    )
    if namespace.use:
        mean, _, std = namespace.use.partition(":")
        assumed = replace(assumed, use_share=percent(mean), use_std_share=percent(std or "0"))
    if namespace.memory:
        try:
            least_mib, most_mib = parse_range(namespace.memory)
            cpu_milli = parse_milli(namespace.cpus)
        except ValueError as error:
            raise UsageError("not a size", str(error)) from error
        assumed = replace(assumed, memory_min_mib=least_mib, memory_max_mib=most_mib, cpu_milli=cpu_milli)
    target = Target(parse_duration_s(namespace.target_wait), int(number(namespace.lose, "--lose", 0)))
    return ReplayOptions(
        parse_state(namespace), None if namespace.trace == OWN else Path(namespace.trace), assumed,
        number(namespace.load, "--load", 1e-6), int(number(namespace.hosts, "--hosts", 0)), target, namespace.smallest,
        namespace.report,
    )  # fmt: skip


COMMAND = Command(
    words=("plan", "replay"),
    summary="run a recorded demand over a cluster: waits, use, risks, hosts needed",
    description="A discrete-event run, every decision by the scheduler's own rules. TRACE is a CSV in our own format"
    " (controlplane/capacity/trace.py), openb's list of pods, Azure Functions' 2021 sample, or a folder with Azure"
    " Functions' 2019 sample. Ends with 1 when the target is missed.",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom plan replay demand.csv --cluster cluster.toml --report replay.html",
        "sandloom plan replay openb_pod_list.csv --cluster openb_node_list.csv --load 60 --use 60:15",
        "sandloom plan replay demand.csv --cluster cluster.toml --smallest --lose 2 --target-wait 30s",
    ),
    operand="file",
)
