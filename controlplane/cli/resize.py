"""`sandloom resize`: more or less memory and CPU for a running sandbox: desired, allocated, actual."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup, sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import EXIT_FAILED, CliError, UsageError
from controlplane.cli.output import Column, plain

Sandbox = sandboxes_pb2.Sandbox
WAIT_S = 60.0
NEVER = (sandboxes_pb2.RESIZE_INFEASIBLE, sandboxes_pb2.RESIZE_ERROR)
STATE_COLOURS = {
    sandboxes_pb2.RESIZE_DONE: "green",
    sandboxes_pb2.RESIZE_IN_PROGRESS: "yellow",
    sandboxes_pb2.RESIZE_DEFERRED: "yellow",
    sandboxes_pb2.RESIZE_INFEASIBLE: "red",
    sandboxes_pb2.RESIZE_ERROR: "red",
}


@dataclass(frozen=True)
class ResizeOptions:
    """0: leave as it is."""

    name: str
    memory_mib: int
    memory_min_mib: int
    cpu_milli: int
    wait: bool
    timeout_s: float


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a running sandbox's name, or the beginning of its uid")
    parser.add_argument("--memory", metavar="SIZE", help="what it should have now: 768M, 1G")
    parser.add_argument("--min", metavar="SIZE", help="its guaranteed minimum")
    parser.add_argument("--cpus", metavar="N", help="CPUs: 0.5, 2")
    parser.add_argument(
        "--wait", action="store_true", help="return when it is so; exit status 1 when it is not, or never can be"
    )
    parser.add_argument("--timeout", default=f"{WAIT_S:.0f}", metavar="S", help="how long --wait waits; 60 s")
    add_output(parser)


def parse(namespace: argparse.Namespace) -> ResizeOptions:
    if not (namespace.memory or namespace.min or namespace.cpus):
        raise UsageError("nothing to resize", "", "give --memory, --min or --cpus")
    return ResizeOptions(
        namespace.name,
        sizes.parse_size_mib(namespace.memory) if namespace.memory else 0,
        sizes.parse_size_mib(namespace.min) if namespace.min else 0,
        sizes.parse_cpu_milli(namespace.cpus) if namespace.cpus else 0,
        namespace.wait,
        sizes.parse_duration_s(namespace.timeout),
    )


def is_current(sandbox: Sandbox) -> bool:
    """Whether the host's report is about what is desired now, and not about an earlier resize."""
    wanted, seen = sandbox.spec.resources, sandbox.status.resize
    memory_mib = wanted.memory_mib or wanted.memory_min_mib
    cpu_milli = seen.desired_cpu_milli or seen.cpu_milli
    return seen.desired_memory_mib == memory_mib and (not wanted.cpu_milli or cpu_milli == wanted.cpu_milli)


def is_reached(sandbox: Sandbox) -> bool:
    """Desired, allocated and actual agree."""
    return is_current(sandbox) and sandbox.status.resize.state == sandboxes_pb2.RESIZE_DONE


def is_over(sandbox: Sandbox | None) -> bool:
    """Reached, or never to be."""
    if sandbox is None or lookup.has_ended(sandbox):
        return True
    return is_reached(sandbox) or (sandbox.status.resize.state in NEVER and is_current(sandbox))


def state_text(sandbox: Sandbox) -> str:
    """`done`, `in-progress`; `asked` while the host has not said anything about it yet."""
    if not is_current(sandbox):
        return "asked"
    return sandboxes_pb2.ResizeState.Name(sandbox.status.resize.state).lower().removeprefix("resize_").replace("_", "-")


def _size(name: str) -> Any:
    def text(sandbox: Sandbox) -> str:
        value: int = getattr(sandbox.status.resize, name)
        return sizes.format_mib(value) if value and is_current(sandbox) else ""

    return text


COLUMNS: tuple[Column[Sandbox], ...] = (
    Column("NAME", lambda row: row.name),
    Column("STATE", state_text, colour=lambda row: STATE_COLOURS.get(row.status.resize.state, "")),
    Column("DESIRED", lambda row: sizes.format_mib(row.spec.resources.memory_mib), right=True),
    Column("ALLOCATED", _size("allocated_memory_mib"), right=True),
    Column("ACTUAL", _size("actual_memory_mib"), right=True),
    Column("CPUS", lambda row: sizes.format_cpus(row.spec.resources.cpu_milli), right=True),
    Column("SHORT", _size("shortfall_mib"), wide=True, right=True),
    Column("CAUSE", lambda row: row.status.resize.cause if is_current(row) else "", wide=True),
    Column("MESSAGE", lambda row: row.status.resize.message if is_current(row) else ""),
)


def act(options: ResizeOptions, shell: Shell) -> int:
    sandbox = shell.over(lambda fabric: _resize(fabric, options))
    shell.printer.listing([sandbox], COLUMNS, name=lambda row: row.name, data=plain)
    if lookup.has_ended(sandbox):
        raise CliError(f"{sandbox.name} ended before it was resized", "", "`sandloom logs` shows what it said")
    if sandbox.status.resize.state in NEVER and is_current(sandbox):
        return EXIT_FAILED
    return EXIT_FAILED if options.wait and not is_reached(sandbox) else 0


async def _resize(fabric: Fabric, options: ResizeOptions) -> Sandbox:
    _, reference = await lookup.find(fabric, options.name)
    remedies = {
        Condition.PRECONDITION: "`sandloom ps -a` shows its state and the MIN/MAX and CPUs it was started with",
        Condition.INVALID: "see `sandloom resize --help`",
    }
    with calling(f"cannot resize {options.name}", remedies):
        request = sandboxes_pb2.ResizeSandboxRequest(
            name=reference,
            memory_mib=options.memory_mib,
            memory_min_mib=options.memory_min_mib,
            cpu_milli=options.cpu_milli,
        )
        sandbox = await fabric.sandboxes.ResizeSandbox(request, timeout=CALL_S)
    if not options.wait:
        return sandbox
    last = await lookup.until(fabric, sandbox.uid, is_over, deadline_s=options.timeout_s)
    if last is None:
        raise CliError(f"{sandbox.name} was removed before it was resized")
    return last


COMMAND = Command(
    words=("resize",),
    summary="give a running sandbox more or less memory and CPU",
    description="Sets what a running sandbox should have, up to the ceiling it was started with, and shows how far its"
    " host got: desired is what was asked for, allocated what the host granted, actual what the guest has. What is"
    " deferred is tried again by the host itself, so --wait goes on waiting for it; a parked sandbox is unparked.",
    configure=configure,
    parse=parse,
    act=act,
    examples=("sandloom resize web --memory 768M --wait", "sandloom resize web --cpus 0.5"),
    operand="live",
)
