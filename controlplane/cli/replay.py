"""`sandloom replay`: a running sandbox's memory, driven along a recorded curve, and how well its host followed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.api.v1 import sandboxes_pb2
from controlplane.capacity.demand import Curve, paced, read_curve
from controlplane.capacity.following import Figures, as_data, drawn, figures_of, plotted, table
from controlplane.capacity.svg import duration
from controlplane.cli import lookup
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import Fabric
from controlplane.cli.errors import EXIT_FAILED, CliError, UsageError
from controlplane.cli.planoutput import FORMS, aligned, plot_width, told
from controlplane.cli.progress import Progress
from controlplane.cli.replaying import ExecLoad, Replay, ready
from controlplane.cli.sizes import parse_duration_s
from controlplane.errors import ConfigError

DEFAULT_EVERY_S = 0.25
MOST_PASSES = 1000


@dataclass(frozen=True)
class ReplayOptions:
    """`svg`, `samples`: files to write."""

    name: str
    curve: Path
    speed: float
    scale: float
    passes: int
    every_s: float
    svg: Path | None
    samples: Path | None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a running sandbox's name; its image must have python3")
    parser.add_argument("curve", metavar="CURVE", type=Path, help="CSV: time_s,memory_mib; the last line is the end")
    parser.add_argument("--speed", default="1", metavar="N", help="replay so many times as fast; 1")
    parser.add_argument("--scale", default="1", metavar="N", help="ask for so many times as much; 1")
    parser.add_argument(
        "--passes", type=int, default=0, metavar="N",
        help="how often the workload writes over all it holds at each step, as work would; 0",
    )  # fmt: skip
    parser.add_argument("--every", default=f"{DEFAULT_EVERY_S:g}", metavar="S", help="how often to look; 0.25 s")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw demand, held, allocated and actual over time")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write each look as CSV")
    add_output(parser, FORMS)


def parse(namespace: argparse.Namespace) -> ReplayOptions:
    every_s = parse_duration_s(namespace.every)
    if every_s < 0.05:
        raise UsageError("too often", f"--every {namespace.every}", "0.05 s is the least")
    if not 0 <= namespace.passes <= MOST_PASSES:
        raise UsageError("not a number of passes", f"--passes {namespace.passes}", f"0 to {MOST_PASSES}")
    return ReplayOptions(
        namespace.name, namespace.curve, _factor("--speed", namespace.speed), _factor("--scale", namespace.scale),
        namespace.passes, every_s, namespace.svg, namespace.samples,
    )  # fmt: skip


def _factor(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-3 <= value <= 1e6:
        raise UsageError("not a factor", f"{option} {text}", "write a number from 0.001 to 1000000")
    return value


def act(options: ReplayOptions, shell: Shell) -> int:
    try:
        curve = paced(read_curve(options.curve), options.speed, options.scale)
    except ConfigError as error:
        raise CliError("cannot replay", str(error), "`sandloom replay --help` shows the format") from error
    sandbox, replay = shell.over(lambda fabric: _replay(fabric, options, curve, shell))
    ceiling_mib = sandbox.spec.resources.memory_max_mib
    figures = figures_of(replay.samples, replay.answers, ceiling_mib)
    title = f"{sandbox.name} along {options.curve.name}, {options.speed:g} times as fast"
    _write(options.svg, lambda: drawn(title, replay.samples, ceiling_mib), shell)
    _write(options.samples, lambda: table(replay.samples), shell)
    told(shell, _data(sandbox, replay, figures), text_of(title, replay, figures, ceiling_mib))
    if replay.broken:
        raise CliError(f"{sandbox.name} did not come to the curve's end", replay.broken)
    return 0 if len(replay.answers) == len(curve.steps) else EXIT_FAILED


async def _replay(
    fabric: Fabric, options: ReplayOptions, curve: Curve, shell: Shell
) -> tuple[sandboxes_pb2.Sandbox, Replay]:
    sandbox, reference = await lookup.find(fabric, options.name)
    if lookup.has_ended(sandbox):
        phase = sandboxes_pb2.Phase.Name(sandbox.status.phase)
        raise CliError(f"cannot replay in {sandbox.name}", f"it has ended ({phase})", "start one with `sandloom run`")
    if curve.peak_mib >= sandbox.spec.resources.memory_max_mib:
        shell.say(
            f"note: the curve asks for {curve.peak_mib} MiB, and {sandbox.name} may have"
            f" {sandbox.spec.resources.memory_max_mib} in all: it will not come to its end (see --scale)"
        )

    async def look() -> tuple[int, int]:
        return sizes_of(await lookup.get(fabric, sandbox.uid))

    replay = Replay(curve, options.passes)
    quiet = shell.quiet or not sys.stderr.isatty()
    with Progress(quiet=quiet) as progress:

        def tell(now_s: float) -> None:
            progress.update(f"replaying: {now_s:.0f} of {curve.end_s:.0f} s, {replay.held_mib} MiB held")

        async with ExecLoad(fabric, reference) as load:
            progress.update(f"starting the workload in {sandbox.name}")
            await replay.run(await ready(load), look, options.every_s, tell)
    return sandbox, replay


def sizes_of(sandbox: sandboxes_pb2.Sandbox) -> tuple[int, int]:
    """What its host says it allocated and the sandbox has, MiB; what it was given when the host said nothing yet."""
    seen, given = sandbox.status.resize, sandbox.spec.resources
    first_mib = given.memory_mib or given.memory_min_mib
    allocated_mib = seen.allocated_memory_mib or first_mib
    return allocated_mib, seen.actual_memory_mib or allocated_mib


def _write(path: Path | None, made: Any, shell: Shell) -> None:
    if path is None:
        return
    try:
        path.write_text(made(), encoding="utf-8")
    except OSError as error:
        raise CliError("cannot write", f"{path} ({error.strerror})", "name another file") from error
    shell.say(f"written: {path}")


def _data(sandbox: sandboxes_pb2.Sandbox, replay: Replay, figures: Figures) -> dict[str, Any]:
    return {"sandbox": sandbox.name, "ceiling_mib": sandbox.spec.resources.memory_max_mib, "broken": replay.broken,
            "figures": as_data(figures), "samples": [[one.time_s, one.demand_mib, one.held_mib, one.allocated_mib,
            one.actual_mib] for one in replay.samples]}  # fmt: skip


def text_of(title: str, replay: Replay, figures: Figures, ceiling_mib: int) -> str:
    """What people read: the plot, and the figures."""
    rows = [
        ("demand", f"{figures.demand_gib_s:.2f} GiB·s, of which {figures.held_gib_s:.2f} were held"),
        ("short", f"{figures.shortfall_gib_s:.2f} GiB·s of demand not held"),
        ("allocated", f"{figures.allocated_gib_s:.2f} GiB·s, {figures.saved:.0%} less than its maximum all the time"),
        ("actual", f"{figures.actual_gib_s:.2f} GiB·s"),
        ("lag", f"{duration(figures.lag_median_s)} to hold more, {duration(figures.lag_most_s)} at most"),
        ("steps", f"{len(replay.answers)} of {len(replay.curve.steps)} in {duration(figures.duration_s)},"
         f" {duration(figures.busy_s)} of it at work"),
    ]  # fmt: skip
    return f"{title}\n{plotted(replay.samples, ceiling_mib, plot_width())}{aligned(rows)}"


COMMAND = Command(
    words=("replay",),
    summary="drive a running sandbox's memory along a recorded curve, and plot it",
    description="Runs a small Python program in the sandbox that holds as much memory as the curve says, and records"
    " demand, what the program holds, what the host allocated and what the sandbox has. CURVE is CSV with the header"
    " time_s,memory_mib: each line's demand (MiB) holds until the next line's time, and the last line is the end. What"
    " the sandbox's kernel and other programs use comes on top, so its maximum must be above the curve's peak. Exit"
    " status 1 when the program did not come to the curve's end.",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom replay web tests/bench/curves/azure-app-3.csv --speed 20 --scale 0.6 --svg web.svg",
        "sandloom replay web demand.csv --passes 2 -o json",
    ),
    operand="live",
)
