"""Staying with a sandbox's main process until it ends, over broken connections, and ending with its exit code.

hostd and the control plane may restart while a client is attached: the sandbox runs on, and so does this. Output is
taken up where it stopped (cli.resume). Input that was sent may be lost with a connection, so a pipe that was being
read is not taken up again: that would hide a hole in it. A terminal is.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass

from controlplane.api.status import Condition, Failure
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup
from controlplane.cli.connection import Fabric, explained, open_stream
from controlplane.cli.console import Console
from controlplane.cli.conversation import Broken, Exited, Left, converse
from controlplane.cli.errors import CliError
from controlplane.cli.resume import Position

RETRY_S = 0.2
LAST_LOOKS = 3  # how often the rest of an ended sandbox's output is asked for
STRIKES = 3  # how often in a row a failure that should not pass is tried again once attached
EARLY = (sandboxes_pb2.PENDING, sandboxes_pb2.SCHEDULED, sandboxes_pb2.STARTING)
PASSING = (Condition.UNAVAILABLE, Condition.NOT_FOUND, Condition.CANCELLED, Condition.DEADLINE, Condition.UNKNOWN)


@dataclass(frozen=True)
class Attachment:
    """To which sandbox, and how. `from_start`: also what was printed before."""

    uid: str
    name: str
    stdin: bool
    tty: bool
    from_start: bool


async def follow(fabric: Fabric, attachment: Attachment, console: Console, say: Callable[[str], None]) -> Exited | Left:
    """The end of the process, or the user leaving. CliError: the sandbox failed, or cannot be reached any more."""
    loop = asyncio.get_running_loop()
    position = Position(complete=attachment.from_start)
    heard_s, told, last_looks, strikes, early = loop.time(), False, 0, 0, ""
    from_start = attachment.from_start
    while True:
        start = sandboxes_pb2.StreamStart(name=attachment.uid, from_start=from_start, stdin=attachment.stdin)
        begun_s = loop.time()
        outcome = await converse(open_stream(fabric.sandboxes.AttachSandbox), start, console, position)
        if not isinstance(outcome, Broken):
            return outcome
        sandbox = await _look(fabric, attachment, console)
        if isinstance(sandbox, Left):
            return sandbox
        last_looks += sandbox.status.phase in lookup.ENDED
        if last_looks > LAST_LOOKS:
            say(f"sandloom: the end of its output may be missing: {attachment.name}: see `sandloom logs`")
            return Exited(sandbox.status.exit_code, sandbox.status.message)
        attached = outcome.heard and loop.time() - begun_s > RETRY_S * 5  # trying to reach a host may take long, too
        if attached or sandbox.status.phase in EARLY or last_looks:
            heard_s, strikes = loop.time(), 0  # it was attached, or is not far enough to be
        passing = outcome.failure.condition in PASSING or sandbox.status.phase in (*EARLY, *lookup.ENDED)
        strikes += not passing
        hides = console.data_sent and not attachment.tty  # input may be lost: going on would hide a hole in it
        if hides or loop.time() - heard_s > lookup.PATIENCE_S or strikes > (0 if console.awaiting else STRIKES):
            raise _lost(attachment, outcome.failure)
        if sandbox.status.phase in EARLY:
            early, before = lookup.waits_for(sandbox), early
            if early != before:
                say(f"sandloom: {early}")
        elif not console.awaiting and not told and not last_looks:
            say(f"sandloom: the connection broke: {attachment.name} runs on: attaching again")
            told = True
        from_start = attachment.from_start or position.started
        position.replayed()
        console.again()
        if await _pause(console):
            return Left(console.signalled)


def _lost(attachment: Attachment, failure: Failure) -> CliError:
    return CliError(
        f"the connection to {attachment.name} is lost",
        explained(failure),
        f"it may still run: follow it with `sandloom attach {attachment.name}`, read it with `sandloom logs`",
    )


async def _look(fabric: Fabric, attachment: Attachment, console: Console) -> sandboxes_pb2.Sandbox | Left:
    """How the sandbox is now. CliError when it failed or is gone."""
    looking = asyncio.create_task(lookup.until(fabric, attachment.uid, lambda _: True, deadline_s=None))
    leaving = asyncio.create_task(console.left.wait())
    try:
        await asyncio.wait({looking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not looking.done():
            return Left(console.signalled)
        sandbox = looking.result()
    finally:
        looking.cancel()
        leaving.cancel()
        await asyncio.gather(looking, leaving, return_exceptions=True)
    if sandbox is None:
        why = await lookup.lost_with(fabric, attachment.name)
        if why:
            raise CliError(f"{attachment.name} was lost with its host", why, "its exit code is not known")
        raise CliError(f"{attachment.name} was removed", "its exit code is not known", "leave --rm out to keep it")
    if sandbox.status.phase == sandboxes_pb2.FAILED:
        raise lookup.failure_of(sandbox)
    return sandbox


async def _pause(console: Console) -> bool:
    """Waits RETRY_S; True when the user left meanwhile."""
    try:
        async with asyncio.timeout(RETRY_S):
            await console.left.wait()
    except TimeoutError:
        return False
    return True


def exit_code_of(left: Left) -> int:
    """As a shell has it: 128 + signal, or 0 after the detach keys."""
    return 128 + left.signalled if left.signalled else 0


def how_it_went_on(left: Left, name: str) -> str:
    """What to tell a user who left."""
    why = signal.Signals(left.signalled).name if left.signalled else "detached"
    return f"sandloom: {why}: {name} keeps running: follow it with `sandloom attach {name}`"
