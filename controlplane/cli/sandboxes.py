"""`ps`, `inspect`, `stop`, `rm` and `wait`: sandboxes listed, looked into and ended."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration

from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup, ports, sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import EXIT_RUN_FAILED, CliError
from controlplane.cli.output import Column, plain, render_json, render_yaml
from controlplane.cli.run import GONE_S
from controlplane.cli.servicecommands import usage_of

Sandbox = sandboxes_pb2.Sandbox
STOP_GRACE_S = 10.0
STOP_SLACK_S = 30.0  # above the grace: what a host needs to end a sandbox and to say so
PHASE_COLOURS = {sandboxes_pb2.RUNNING: "green", sandboxes_pb2.FAILED: "red"}


@dataclass(frozen=True)
class PsOptions:
    """`ended`: also those that have ended."""

    ended: bool


@dataclass(frozen=True)
class NamesOptions:
    """Commands on one or more sandboxes."""

    names: tuple[str, ...]
    force: bool = False
    grace_s: float = STOP_GRACE_S
    form: str = "json"


def status_text(sandbox: Sandbox, now_s: float) -> str:
    """`running 5m`, `exited (3) 2h ago`, `failed (VmmExited) 1m ago`, `starting`."""
    status = sandbox.status
    phase = sandboxes_pb2.Phase.Name(status.phase).lower().removeprefix("phase_")
    if status.phase == sandboxes_pb2.RUNNING and status.HasField("started_at"):
        return f"{phase} {sizes.format_age(now_s - status.started_at.ToNanoseconds() / 1e9)}"
    if status.phase in lookup.ENDED:
        word = str(status.exit_code) if status.has_exit_code else status.reason
        ago = f" {_age(status.finished_at, now_s)} ago" if status.HasField("finished_at") else ""
        return phase + (f" ({word})" if word else "") + ago
    return phase + (f" ({status.reason})" if status.reason else "")


def memory_text(sandbox: Sandbox) -> str:
    """What it should have now, and its ceiling: `256M/1G`."""
    resources = sandbox.spec.resources
    now_mib = resources.memory_mib or resources.memory_min_mib
    return f"{sizes.format_mib(now_mib)}/{sizes.format_mib(resources.memory_max_mib)}"


def _mib(size_mib: int) -> str:
    return sizes.format_mib(size_mib) if size_mib else ""


def resize_text(sandbox: Sandbox) -> str:
    """`done`, `deferred (host-room)`, `infeasible (max)`; with a mark for a guest that does not give memory back."""
    resize = sandbox.status.resize
    if not resize.state:
        return ""
    state = sandboxes_pb2.ResizeState.Name(resize.state).lower().removeprefix("resize_").replace("_", "-")
    text = f"{state} ({resize.cause})" if resize.cause else state
    return f"{text}, uncooperative" if sandbox.status.uncooperative else text


def _age(stamp: object, now_s: float) -> str:
    return sizes.format_age(now_s - stamp.ToNanoseconds() / 1e9)  # type: ignore[attr-defined]


def class_text(sandbox: Sandbox) -> str:
    """`guest-kernel`."""
    named = getattr(sandbox.spec, "class")  # a word of Python, so not an attribute by name
    return "" if not named else sandboxes_pb2.SandboxClass.Name(named).lower().replace("_", "-")


def columns(now_s: float, chosen: Mapping[str, Sequence[str]]) -> tuple[Column[Sandbox], ...]:
    """The columns of `ps`; `chosen`: the ports that hosts chose, by uid."""
    return (
        Column("NAME", lambda row: row.name),
        Column("UID", lambda row: row.uid, wide=True),
        Column("IMAGE", lambda row: row.spec.image),
        Column("STATUS", lambda row: status_text(row, now_s), colour=lambda r: PHASE_COLOURS.get(r.status.phase, "")),
        Column("MEMORY", memory_text, right=True),
        Column("ALLOCATED", lambda row: _mib(row.status.resize.allocated_memory_mib), wide=True, right=True),
        Column("ACTUAL", lambda row: _mib(row.status.resize.actual_memory_mib), wide=True, right=True),
        Column("RESIZE", resize_text, wide=True),
        Column("CPUS", lambda row: sizes.format_cpus(row.spec.resources.cpu_milli), right=True),
        Column("HOST", lambda row: row.assignment.host),
        Column("AGE", lambda row: _age(row.created_at, now_s), right=True),
        Column("PORTS", lambda row: ",".join(chosen.get(row.uid) or row.spec.services.publish), wide=True),
        Column("CLASS", class_text, wide=True),
        Column("PRIORITY", lambda row: str(row.spec.priority), wide=True, right=True),
        Column("ACCEL", lambda row: row.status.accel, wide=True),
        Column("PID", lambda row: str(row.status.host_pid or ""), wide=True, right=True),
        Column("LABELS", lambda row: ",".join(f"{k}={v}" for k, v in sorted(row.spec.labels.items())), wide=True),
        Column("COMMAND", lambda row: " ".join(row.spec.process.argv), wide=True),
    )


def act_ps(options: PsOptions, shell: Shell) -> int:
    async def ask(fabric: Fabric) -> tuple[list[Sandbox], Mapping[str, Sequence[str]]]:
        rows = await lookup.list_sandboxes(fabric, ended=options.ended)
        return rows, await ports.by_uid(fabric, rows) if shell.printer.form == "wide" else {}

    rows, chosen = shell.over(ask)
    shell.printer.listing(rows, columns(shell.now_s(), chosen), name=lambda row: row.name, data=plain)
    if not rows and shell.printer.form in ("table", "wide"):
        shell.say("none here" if options.ended else "none is running; `sandloom ps -a` also lists those that ended")
    return 0


async def _found(fabric: Fabric, names: Sequence[str]) -> list[tuple[Sandbox, str]]:
    return [await lookup.find(fabric, name) for name in names]


def act_inspect(options: NamesOptions, shell: Shell) -> int:
    values = shell.over(lambda fabric: _looked_into(fabric, options.names, shell))
    render = render_yaml if options.form == "yaml" else render_json
    shell.printer.write(render(values[0] if len(values) == 1 else values))
    return 0


async def _looked_into(fabric: Fabric, names: Sequence[str], shell: Shell) -> list[Any]:
    """Each sandbox, and what its services did where its host can say."""
    values = []
    for sandbox, _ in await _found(fabric, names):
        value: Any = plain(sandbox)
        try:
            usage = await usage_of(fabric, sandbox)
        except CliError as error:
            shell.say(str(error))
            usage = None
        values.append(value if usage is None else {**value, "service_usage": plain(usage)})
    return values


def act_stop(options: NamesOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _stop(fabric, options, shell))


async def _stop(fabric: Fabric, options: NamesOptions, shell: Shell) -> int:
    found = await _found(fabric, options.names)
    grace = Duration()
    grace.FromNanoseconds(int(options.grace_s * 1e9))
    for sandbox, reference in found:
        with calling(f"cannot stop {sandbox.name}"):
            await fabric.sandboxes.StopSandbox(
                sandboxes_pb2.StopSandboxRequest(name=reference, grace=grace), timeout=CALL_S
            )
    for sandbox, _ in found:
        deadline_s = options.grace_s + STOP_SLACK_S
        last = await lookup.until(fabric, sandbox.uid, lookup.has_ended, deadline_s=deadline_s)
        if not lookup.has_ended(last):
            raise CliError(
                f"{sandbox.name} has not ended", f"{deadline_s:.0f} s after it was asked to",
                f"`sandloom rm -f {sandbox.name}` takes it away",
            )  # fmt: skip
        shell.printer.write(f"{sandbox.name}\n")
    return 0


def act_rm(options: NamesOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _rm(fabric, options, shell))


async def _rm(fabric: Fabric, options: NamesOptions, shell: Shell) -> int:
    found = await _found(fabric, options.names)
    for sandbox, reference in found:
        remedies = {Condition.PRECONDITION: f"stop it first, or use `sandloom rm -f {sandbox.name}`"}
        with calling(f"cannot remove {sandbox.name}", remedies):
            request = sandboxes_pb2.DeleteSandboxRequest(name=reference, force=options.force)
            await fabric.sandboxes.DeleteSandbox(request, timeout=CALL_S)
    for sandbox, _ in found:
        if await lookup.until(fabric, sandbox.uid, lambda now: now is None, deadline_s=GONE_S) is not None:
            raise CliError(
                f"{sandbox.name} is not removed yet", f"its host has not let go of it in {GONE_S:.0f} s",
                "it goes when its host is up again (`sandloom hosts`)",
            )  # fmt: skip
        shell.printer.write(f"{sandbox.name}\n")
    return 0


def act_wait(options: NamesOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _wait(fabric, options.names[0], shell))


async def _wait(fabric: Fabric, name: str, shell: Shell) -> int:
    sandbox, _ = await lookup.find(fabric, name)
    last = await lookup.until(fabric, sandbox.uid, lookup.has_ended, deadline_s=None)
    if last is None:
        raise CliError(f"{sandbox.name} was removed", "its exit code is not known", "")
    if last.status.phase == sandboxes_pb2.FAILED:
        raise lookup.failure_of(last)
    shell.printer.write(f"{last.status.exit_code}\n")
    return last.status.exit_code


def _configure_ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", dest="ended", action="store_true", help="also those that have ended")
    add_output(parser)


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="+", help="a sandbox's name, or the beginning of its uid")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    add_output(parser, ("json", "yaml"))


def _configure_stop(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.add_argument(
        "-t", "--grace", default=f"{STOP_GRACE_S:.0f}", metavar="S", help="from SIGTERM to SIGKILL; 10 s unless given"
    )


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.add_argument("-f", "--force", action="store_true", help="also one that runs")


def _configure_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs=1, help="a sandbox's name, or the beginning of its uid")


PS = Command(
    words=("ps",),
    summary="list sandboxes",
    configure=_configure_ps,
    parse=lambda ns: PsOptions(ns.ended),
    act=act_ps,
    examples=("sandloom ps", "sandloom ps -a -o wide", "sandloom rm -f $(sandloom ps -a -o name)"),
)
INSPECT = Command(
    words=("inspect",),
    summary="show all that is known of a sandbox",
    configure=_configure_inspect,
    parse=lambda ns: NamesOptions(tuple(ns.names), form=ns.form),
    act=act_inspect,
    examples=("sandloom inspect web", "sandloom inspect web -o yaml"),
    operand="sandbox",
)
STOP = Command(
    words=("stop",),
    summary="end sandboxes: SIGTERM, and SIGKILL after a grace",
    configure=_configure_stop,
    parse=lambda ns: NamesOptions(tuple(ns.names), grace_s=sizes.parse_duration_s(ns.grace)),
    act=act_stop,
    examples=("sandloom stop web", "sandloom stop -t 0 web db"),
    operand="live",
)
RM = Command(
    words=("rm",),
    summary="remove sandboxes and all they hold",
    configure=_configure_rm,
    parse=lambda ns: NamesOptions(tuple(ns.names), force=ns.force),
    act=act_rm,
    examples=("sandloom rm web", "sandloom rm -f web"),
    operand="sandbox",
)
WAIT = Command(
    words=("wait",),
    summary="wait for a sandbox to end; print and return its exit code",
    configure=_configure_wait,
    parse=lambda ns: NamesOptions(tuple(ns.names)),
    act=act_wait,
    examples=("sandloom wait job",),
    operand="sandbox",
    failed_code=EXIT_RUN_FAILED,
)
