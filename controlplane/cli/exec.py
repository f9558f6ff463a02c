"""`sandloom exec`: one more program in a running sandbox, with its output, input and exit code."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import attachment, lookup
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import Fabric, explained, open_stream
from controlplane.cli.console import Console
from controlplane.cli.conversation import Broken, Left, converse
from controlplane.cli.errors import EXIT_RUN_FAILED, CallFailed, CliError, UsageError
from controlplane.cli.process import ProcessOptions, add_process_options, message_of, parse_process
from controlplane.cli.resume import Position
from controlplane.cli.run import told


@dataclass(frozen=True)
class ExecOptions:
    """What `exec` was asked for."""

    name: str
    process: ProcessOptions


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a running sandbox's name, or the beginning of its uid")
    add_process_options(parser)


def parse(namespace: argparse.Namespace) -> ExecOptions:
    process = parse_process(namespace)
    if not process.program:
        raise UsageError("what to run is missing", "", f"write it after --: sandloom exec {namespace.name} -- ls /")
    return ExecOptions(namespace.name, process)


def act(options: ExecOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _exec(fabric, options, shell))


async def _exec(fabric: Fabric, options: ExecOptions, shell: Shell) -> int:
    process = options.process
    if process.tty and process.stdin and not os.isatty(shell.stdio.stdin):
        raise CliError("-t needs a terminal", "standard input is none", "leave -t out to use it in a pipe")
    sandbox, reference = await lookup.find(fabric, options.name)
    if sandbox.status.phase in lookup.ENDED:
        raise CliError(
            f"cannot run in {sandbox.name}", f"it has ended ({sandboxes_pb2.Phase.Name(sandbox.status.phase)})",
            "`sandloom logs` shows what it said; start a new one with `sandloom run`",
        )  # fmt: skip
    async with Console(shell.stdio, stdin=process.stdin, tty=process.tty, detachable=False) as console:
        message = message_of(process, console.size if process.tty else None)
        start = sandboxes_pb2.StreamStart(name=reference, exec=message, stdin=process.stdin)
        outcome = await converse(open_stream(fabric.sandboxes.ExecSandbox), start, console, Position(complete=True))
    if isinstance(outcome, Broken):
        raise _broken(outcome, sandbox.name, begun=not console.awaiting)
    if isinstance(outcome, Left):
        return attachment.exit_code_of(outcome)
    return told(outcome, " ".join(process.program), shell)


def _broken(outcome: Broken, name: str, *, begun: bool) -> CallFailed:
    failure = outcome.failure
    if begun:
        what, remedy = f"the connection into {name} broke", "what it ran was ended with it: run it again"
    else:
        what, remedy = f"cannot run in {name}", f"`sandloom inspect {name}` shows its state"
    return CallFailed(what, explained(failure), remedy, code=failure.code.name, reason=failure.reason)


COMMAND = Command(
    words=("exec",),
    summary="run one more program in a running sandbox",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom exec web -- ls -l /srv",
        "sandloom exec -it web -- sh",
        "echo 'select 1' | sandloom exec -i db -- sqlite3 /data/app.db",
    ),
    takes_command=True,
    operand="live",
    failed_code=EXIT_RUN_FAILED,
)
