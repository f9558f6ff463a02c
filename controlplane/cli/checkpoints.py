"""`sandloom checkpoint [ls|rm]`, `restore`, `fork`: sandboxes that go on from where another one was."""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.api.status import Condition
from controlplane.api.v1 import checkpoints_pb2, sandboxes_pb2
from controlplane.cli import lookup, sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import UsageError
from controlplane.cli.output import Column, plain, render_json, render_yaml
from controlplane.cli.progress import Progress

Checkpoint = checkpoints_pb2.Checkpoint
TAKE_S = 600.0  # a large guest's memory goes to its host's disk
BEGIN_S = 300.0  # how long a sandbox that goes on may take to run
MOST_FORKS = 100
BEGUN = (sandboxes_pb2.RUNNING, sandboxes_pb2.STOPPING, sandboxes_pb2.PARKED)
TAKING = {
    Condition.NOT_FOUND: "`sandloom ps` lists running sandboxes",
    Condition.PRECONDITION: "`sandloom inspect` shows its state",
}
MISSING = {Condition.NOT_FOUND: "`sandloom checkpoint ls` lists those there are"}


@dataclass(frozen=True)
class TakeOptions:
    """What `checkpoint` was asked for."""

    sandbox: str
    name: str = ""
    request_id: str = ""


@dataclass(frozen=True)
class RestoreOptions:
    """What `restore` was asked for."""

    checkpoint: str
    name: str = ""
    remove: bool = False
    request_id: str = ""


@dataclass(frozen=True)
class ForkOptions:
    """What `fork` was asked for."""

    sandbox: str
    count: int = 1
    prefix: str = ""
    remove: bool = False


@dataclass(frozen=True)
class NamesOptions:
    """Checkpoints by name."""

    names: tuple[str, ...] = ()
    force: bool = False


def columns(now_s: float) -> tuple[Column[Checkpoint], ...]:
    """The columns of `checkpoint ls`."""
    return (
        Column("NAME", lambda row: row.name),
        Column("OF", lambda row: row.sandbox),
        Column("IMAGE", lambda row: row.spec.image),
        Column("SIZE", lambda row: sizes.format_bytes(row.size_bytes), right=True),
        Column("PAUSE", lambda row: f"{row.pause_s:.2f}s", right=True),
        Column("AGE", lambda row: sizes.format_age(now_s - row.created_at.ToNanoseconds() / 1e9), right=True),
        Column("HOST", lambda row: row.host),
        Column("ID", lambda row: row.id, wide=True),
        Column("KEPT", lambda row: "until its forks run" if row.ephemeral else "until removed", wide=True),
    )


def act_take(options: TakeOptions, shell: Shell) -> int:
    taken = shell.over(lambda fabric: _take(fabric, options, shell))
    _print(taken, shell, f"{taken.name}\n")
    if shell.printer.form == "table":
        size = sizes.format_bytes(taken.size_bytes)
        shell.say(f"sandloom: {taken.sandbox} stood still for {taken.pause_s:.2f} s; {taken.name} has {size}")
    return 0


async def _take(fabric: Fabric, options: TakeOptions, shell: Shell) -> Checkpoint:
    _, name = await lookup.find(fabric, options.sandbox)
    request = checkpoints_pb2.CreateCheckpointRequest(
        sandbox=name, name=options.name, request_id=options.request_id or str(uuid.uuid4())
    )
    with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:
        progress.update(f"copying {options.sandbox}")
        with calling(f"cannot checkpoint {options.sandbox}", TAKING):
            return await fabric.checkpoints.CreateCheckpoint(request, timeout=TAKE_S)


async def list_checkpoints(fabric: Fabric) -> checkpoints_pb2.ListCheckpointsResponse:
    """All of them, and the hosts that did not answer."""
    with calling("cannot list the checkpoints"):
        return await fabric.checkpoints.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(), timeout=CALL_S)


def act_ls(options: NamesOptions, shell: Shell) -> int:
    listed = shell.over(list_checkpoints)
    rows = list(listed.checkpoints)
    shell.printer.listing(rows, columns(shell.now_s()), name=lambda row: row.name, data=plain)
    if listed.silent:
        who = ", ".join(listed.silent_hosts) or f"{listed.silent} host{'s' if listed.silent != 1 else ''}"
        shell.say(f"sandloom: note: what hosts have that do not answer is not here: {who}")
    if not rows and shell.printer.form in ("table", "wide"):
        shell.say("none yet; `sandloom checkpoint SANDBOX` makes one")
    return 0


def act_rm(options: NamesOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _rm(fabric, options, shell))


async def _rm(fabric: Fabric, options: NamesOptions, shell: Shell) -> int:
    for name in options.names:
        with calling(f"cannot remove checkpoint {name}", MISSING):
            request = checkpoints_pb2.DeleteCheckpointRequest(name=name, allow_missing=options.force)
            await fabric.checkpoints.DeleteCheckpoint(request, timeout=CALL_S)
        shell.printer.write(f"{name}\n")
    return 0


def act_restore(options: RestoreOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _restore(fabric, options, shell))


async def _restore(fabric: Fabric, options: RestoreOptions, shell: Shell) -> int:
    request = checkpoints_pb2.RestoreCheckpointRequest(
        checkpoint=options.checkpoint,
        name=options.name,
        remove_on_exit=options.remove,
        request_id=options.request_id or str(uuid.uuid4()),
    )
    with calling(f"cannot restore {options.checkpoint}", MISSING):
        sandbox = await fabric.checkpoints.RestoreCheckpoint(request, timeout=CALL_S)
    return await _until_they_run(fabric, [sandbox], shell)


def act_fork(options: ForkOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _fork(fabric, options, shell))


async def _fork(fabric: Fabric, options: ForkOptions, shell: Shell) -> int:
    _, name = await lookup.find(fabric, options.sandbox)
    request = checkpoints_pb2.ForkSandboxRequest(
        sandbox=name, count=options.count, prefix=options.prefix, remove_on_exit=options.remove
    )
    with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:
        progress.update(f"copying {options.sandbox}")
        with calling(f"cannot fork {options.sandbox}", TAKING):
            forked = await fabric.checkpoints.ForkSandbox(request, timeout=TAKE_S)
    if shell.printer.form == "table":
        shell.say(f"sandloom: {options.sandbox} stood still for {forked.pause_s:.2f} s")
    return await _until_they_run(fabric, forked.sandboxes, shell)


async def _until_they_run(fabric: Fabric, made: Iterable[sandboxes_pb2.Sandbox], shell: Shell) -> int:
    """Prints each name once its sandbox runs. CliError with why the first of them does not."""
    for sandbox in made:
        with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:
            progress.update(f"starting {sandbox.name}")
            now = await lookup.until(fabric, sandbox.uid, _has_begun, deadline_s=BEGIN_S)
        if now is not None and now.status.phase == sandboxes_pb2.FAILED:
            raise lookup.failure_of(now)
        if now is not None and not _has_begun(now):
            shell.say(f"sandloom: note: {sandbox.name} is still starting")
        shell.printer.write(f"{sandbox.name}\n")
    return 0


def _has_begun(now: sandboxes_pb2.Sandbox | None) -> bool:
    return lookup.has_ended(now) or (now is not None and now.status.phase in BEGUN)


def _print(taken: Checkpoint, shell: Shell, text: str) -> None:
    if shell.printer.form in ("json", "yaml"):
        text = (render_json if shell.printer.form == "json" else render_yaml)(plain(taken))
    shell.printer.write(text)


def parse_count(text: str) -> int:
    """How many forks. UsageError."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_FORKS):
        raise UsageError("not a number of forks", repr(text), f"give 1 to {MOST_FORKS}")
    return int(text)


def _configure_take(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sandbox", metavar="SANDBOX", help="a running sandbox's name or uid")
    parser.add_argument("--name", default="", help="the checkpoint's name; made up when left out")
    parser.add_argument("--request-id", default="", metavar="ID", help="the same ID again gives the same checkpoint")
    add_output(parser, ("table", "name", "json", "yaml"))


def _configure_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's name or id")
    parser.add_argument("--name", default="", help="the new sandbox's name; made up when left out")
    parser.add_argument("--rm", dest="remove", action="store_true", help="remove it when its program ends")
    parser.add_argument("--request-id", default="", metavar="ID", help="the same ID again gives the same sandbox")


def _configure_fork(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sandbox", metavar="SANDBOX", help="a running sandbox's name or uid")
    parser.add_argument("--count", default="1", metavar="N", help="how many to make, 1 unless given")
    parser.add_argument("--prefix", default="", help="of their names, which end in -1, -2, ...; made up when left out")
    parser.add_argument("--rm", dest="remove", action="store_true", help="remove each when its program ends")
    add_output(parser, ("table", "name"))


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="CHECKPOINT", nargs="+", help="a checkpoint's name or id")
    parser.add_argument("-f", "--force", action="store_true", help="do not mind when it is not there")


TAKE = Command(
    words=("checkpoint",),
    summary="keep a running sandbox's memory and state; it runs on",
    description="Keeps a copy of a running sandbox on its host: processes, memory, files it wrote. `restore` makes "
    "sandboxes that go on from there. Nobody may be typing into it meanwhile. Not for host-kernel sandboxes.",
    configure=_configure_take,
    parse=lambda ns: TakeOptions(ns.sandbox, ns.name, ns.request_id),
    act=act_take,
    examples=("sandloom checkpoint web", "sandloom checkpoint web --name warmed-up"),
    operand="live",
)
LS = Command(
    words=("checkpoint", "ls"),
    summary="list checkpoints",
    configure=add_output,
    parse=lambda ns: NamesOptions(),
    act=act_ls,
    examples=("sandloom checkpoint ls", "sandloom checkpoint ls -o wide"),
)
RM = Command(
    words=("checkpoint", "rm"),
    summary="remove checkpoints; sandboxes restored from them run on",
    configure=_configure_rm,
    parse=lambda ns: NamesOptions(tuple(ns.names), ns.force),
    act=act_rm,
    examples=("sandloom checkpoint rm warmed-up",),
    operand="checkpoint",
)
RESTORE = Command(
    words=("restore",),
    summary="start a sandbox that goes on from a checkpoint",
    description="The new sandbox has the checkpoint's processes, memory and files, and a name, hostname, machine id, "
    "clock and kernel randomness of its own. It shares with its siblings what none of them has written.",
    configure=_configure_restore,
    parse=lambda ns: RestoreOptions(ns.checkpoint, ns.name, ns.remove, ns.request_id),
    act=act_restore,
    examples=("sandloom restore warmed-up", "sandloom restore warmed-up --name web-2"),
    operand="checkpoint",
)
FORK = Command(
    words=("fork",),
    summary="make copies of a running sandbox that go on from where it is",
    description="Checkpoints a running sandbox, which runs on, and starts sandboxes that go on from there. The "
    "checkpoint goes by itself once they run.",
    configure=_configure_fork,
    parse=lambda ns: ForkOptions(ns.sandbox, parse_count(ns.count), ns.prefix, ns.remove),
    act=act_fork,
    examples=("sandloom fork web", "sandloom fork web --count 20 --prefix try"),
    operand="live",
)
