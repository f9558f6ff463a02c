"""`sandloom attach`: a running sandbox's main process, from now on."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from controlplane.cli import attachment, lookup
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import Fabric
from controlplane.cli.console import Console
from controlplane.cli.conversation import Left
from controlplane.cli.errors import EXIT_RUN_FAILED, CliError
from controlplane.cli.run import told


@dataclass(frozen=True)
class AttachOptions:
    """`stdin`: take over its standard input, if it was started with one. `from_start`: also what it said before."""

    name: str
    stdin: bool
    from_start: bool


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a sandbox's name, or the beginning of its uid")
    parser.add_argument("--no-stdin", action="store_true", help="watch only")
    parser.add_argument("--from-start", action="store_true", help="first what it printed before")


def parse(namespace: argparse.Namespace) -> AttachOptions:
    return AttachOptions(namespace.name, not namespace.no_stdin, namespace.from_start)


def act(options: AttachOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _attach(fabric, options, shell))


async def _attach(fabric: Fabric, options: AttachOptions, shell: Shell) -> int:
    sandbox, _ = await lookup.find(fabric, options.name)
    if lookup.has_ended(sandbox):
        raise CliError(
            f"cannot attach to {sandbox.name}",
            "it has ended",
            f"`sandloom logs {sandbox.name}` shows what it said, `sandloom wait` its exit code",
        )
    if sandbox.status.phase in attachment.EARLY:
        shell.say(f"sandloom: {lookup.waits_for(sandbox)}")
    process = sandbox.spec.process
    stdin = options.stdin and process.stdin
    tty = process.tty and stdin and os.isatty(shell.stdio.stdin)
    async with Console(shell.stdio, stdin=stdin, tty=tty, detachable=True) as console:
        console.begun()
        if tty:
            console.resized()
        to = attachment.Attachment(sandbox.uid, sandbox.name, stdin, tty, options.from_start)
        ended = await attachment.follow(fabric, to, console, shell.say)
    if isinstance(ended, Left):
        shell.say(attachment.how_it_went_on(ended, sandbox.name))
        return attachment.exit_code_of(ended)
    return told(ended, " ".join(process.argv), shell)


COMMAND = Command(
    words=("attach",),
    summary="follow a running sandbox's program, and type into it",
    description="Follows a running sandbox's program from now on and returns its exit code. Standard input goes to it"
    " when it was started with -i; ctrl-p ctrl-q leaves it running when it has a terminal.",
    configure=configure,
    parse=parse,
    act=act,
    examples=("sandloom attach web", "sandloom attach --no-stdin --from-start job"),
    operand="live",
    failed_code=EXIT_RUN_FAILED,
)
