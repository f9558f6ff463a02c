"""`park` and `unpark`: a sandbox to its host's disk, its memory let go of, and back to where it was."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import Fabric, calling
from controlplane.cli.progress import Progress

PARK_S = 600.0  # a large guest's memory goes to its host's disk
UNPARK_S = 180.0


@dataclass(frozen=True)
class NamesOptions:
    """Sandboxes by name or uid."""

    names: tuple[str, ...]


def act_park(options: NamesOptions, shell: Shell) -> int:
    def park(fabric: Fabric, name: str) -> Awaitable[Any]:
        return fabric.sandboxes.ParkSandbox(sandboxes_pb2.ParkSandboxRequest(name=name), timeout=PARK_S)

    return shell.over(lambda fabric: _each(fabric, options, shell, "park", park))


def act_unpark(options: NamesOptions, shell: Shell) -> int:
    def unpark(fabric: Fabric, name: str) -> Awaitable[Any]:
        return fabric.sandboxes.UnparkSandbox(sandboxes_pb2.UnparkSandboxRequest(name=name), timeout=UNPARK_S)

    return shell.over(lambda fabric: _each(fabric, options, shell, "unpark", unpark))


async def _each(
    fabric: Fabric, options: NamesOptions, shell: Shell, verb: str, call: Callable[[Fabric, str], Awaitable[Any]]
) -> int:
    remedies = {
        Condition.PRECONDITION: "`sandloom inspect` shows its state",
        Condition.INVALID: "`sandloom stop` ends what cannot be parked",
        Condition.EXHAUSTED: "`sandloom events` tells what holds the host's memory or disk; try again",
    }
    for typed in options.names:
        sandbox, reference = await lookup.find(fabric, typed)
        with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:
            progress.update(f"{verb}ing {sandbox.name}")
            with calling(f"cannot {verb} {sandbox.name}", remedies):
                await call(fabric, reference)
        shell.printer.write(f"{sandbox.name}\n")
    return 0


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="+", help="a sandbox's name, or the beginning of its uid")


PARK = Command(
    words=("park",),
    summary="write a running sandbox to its host's disk and let go of its memory",
    description="The sandbox stands still on disk, with its processes, memory and files, under its name. The next exec,"
    " attach, resize or unpark lets it go on from there. Nobody may be typing into it. Classes with checkpoints only:"
    " guest-kernel and, on a host whose runsc has them, user-kernel.",
    configure=_names,
    parse=lambda ns: NamesOptions(tuple(ns.names)),
    act=act_park,
    examples=("sandloom park web", "sandloom park web db"),
    operand="live",
)
UNPARK = Command(
    words=("unpark",),
    summary="let a parked sandbox go on from where it was",
    configure=_names,
    parse=lambda ns: NamesOptions(tuple(ns.names)),
    act=act_unpark,
    examples=("sandloom unpark web",),
    operand="live",
)
