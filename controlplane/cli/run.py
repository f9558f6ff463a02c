"""`sandloom run`: a new sandbox, and by default everything its program says until it ends, and its exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from controlplane import rules
from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import attachment, lookup, network, ports, sizes
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.console import Console
from controlplane.cli.conversation import Exited, Left
from controlplane.cli.errors import EXIT_RUN_FAILED, CliError, Unreachable
from controlplane.cli.output import safe
from controlplane.cli.process import ProcessOptions, add_process_options, message_of, parse_process
from controlplane.cli.progress import Progress
from controlplane.cli.services import add_service_options, parse_services
from controlplane.cli.sizes import DEFAULT_MEMORY, MemoryRange

CLASSES = {
    "guest-kernel": sandboxes_pb2.GUEST_KERNEL,
    "user-kernel": sandboxes_pb2.USER_KERNEL,
    "host-kernel": sandboxes_pb2.HOST_KERNEL,
}
RESTARTS = {
    "never": sandboxes_pb2.RESTART_NEVER,
    "on-host-loss": sandboxes_pb2.RESTART_ON_HOST_LOSS,
}
FLAGS = {
    "name": "--name", "spec.image": "IMAGE", "spec.class": "--class", "spec.hostname": "--hostname",
    "spec.resources.memory_min_mib": "--memory", "spec.resources.memory_max_mib": "--memory",
    "spec.resources.memory_mib": "--memory", "spec.resources.cpu_milli": "--cpus", "spec.labels": "--label",
    "spec.rules.affinity": "--affinity", "spec.rules.tolerations": "--tolerate", "spec.rules.spread": "--spread",
    "spec.rules.trust": "--trust", "spec.priority": "--priority", "spec.weight": "--weight",
    "spec.process.argv": "PROGRAM", "spec.process.env": "--env", "spec.process.workdir": "--workdir",
    "spec.process.user": "--user", "spec.network": "--network", "spec.network.allow": "--allow",
    "request_id": "--request-id",
}  # fmt: skip
"""By which option a field of the request is given."""
CREATE_TRIES = 3
GONE_S = 30.0  # how long a host may take to let go of a sandbox that ended
NUDGE_S = 2.0  # after that much of it the removal is asked for outright
TELL_S = 0.5
START_S = 300.0  # how long `run -d` waits for the program to run
COULD_NOT_RUN = (126, 127)
BEGUN = (sandboxes_pb2.RUNNING, sandboxes_pb2.STOPPING, sandboxes_pb2.PARKED)


@dataclass(frozen=True)
class RunOptions:
    """What `run` was asked for."""

    image: str
    process: ProcessOptions
    sandbox_class: int = sandboxes_pb2.SANDBOX_CLASS_UNSPECIFIED
    name: str = ""
    memory: MemoryRange = DEFAULT_MEMORY
    cpu_milli: int = 1000
    hostname: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    detach: bool = False
    remove: bool = False
    cold: bool = False
    network: sandboxes_pb2.Network = field(default_factory=sandboxes_pb2.Network)
    priority: int = 0
    weight: int = 100
    request_id: str = ""
    affinity: tuple[str, ...] = ()
    tolerations: tuple[str, ...] = ()
    spread: str = ""
    trust: tuple[str, ...] = ()
    restart: str = ""
    services: sandboxes_pb2.ServicePolicy = field(default_factory=sandboxes_pb2.ServicePolicy)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="an image's name or digest (`sandloom image ls`)")
    parser.add_argument("--name", default="", help="the sandbox's name; made up when left out")
    parser.add_argument("--class", dest="sandbox_class", choices=tuple(CLASSES), help="which kernel it runs on")
    parser.add_argument("--memory", metavar="MIN:MAX", help="guaranteed minimum and ceiling, 256M:1G unless given")
    parser.add_argument("--cpus", metavar="N", default="1", help="CPUs, 0.5 or 2 say; 1 unless given")
    parser.add_argument("--hostname", default="", help="its hostname; its name unless given")
    parser.add_argument("--label", action="append", default=[], metavar="K=V", help="a label; may be given again")
    parser.add_argument("-d", "--detach", action="store_true", help="print the name and leave it running")
    parser.add_argument("--rm", dest="remove", action="store_true", help="remove it once it has ended")
    parser.add_argument("--cold", action="store_true", help="boot it, even where a template could be cloned")
    network.add_options(parser)
    parser.add_argument(
        "--restart", choices=tuple(RESTARTS), default="",
        help="whether it begins anew elsewhere when its host is lost or drained; with -d on-host-loss, else never",
    )  # fmt: skip
    parser.add_argument(
        "--priority",
        metavar="N",
        default="0",
        help="-1000..1000; the lower lose memory first when it is short",
    )
    parser.add_argument("--weight", metavar="N", default="100", help="1..10000; its share of spare memory among equals")
    parser.add_argument("--request-id", default="", metavar="ID", help="the same ID again gives the same sandbox")
    where = parser.add_argument_group("where it may go")
    where.add_argument(
        "--affinity", action="append", default=[], metavar="K=V", type=_rule(rules.parse_affinity),
        help="a host's label must be so: zone=eu, zone!=eu, ssd, '!ssd'; may be given again",
    )  # fmt: skip
    where.add_argument(
        "--tolerate", action="append", default=[], metavar="K[=V]", type=_rule(rules.parse_pair),
        help="go to hosts with this taint, too",
    )  # fmt: skip
    where.add_argument(
        "--spread", default=None, metavar="K[:N]", type=_rule(rules.parse_spread),
        help="spread those of one label app (or image) over hosts, or over a label's values; at most N apart",
    )  # fmt: skip
    where.add_argument(
        "--trust", action="append", default=[], choices=rules.TRUST_WORDS,
        help="only hosts without hyperthreads, with KVM, or with no other tenant's sandboxes",
    )  # fmt: skip
    add_service_options(parser)
    add_process_options(parser)


def _rule(parse: Callable[[str], object]) -> Callable[[str], str]:
    """The text, if it is right; argparse tells of an ArgumentTypeError as it is."""

    def checked(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return checked


def parse(namespace: argparse.Namespace) -> RunOptions:
    return RunOptions(
        image=namespace.image,
        process=parse_process(namespace),
        sandbox_class=CLASSES.get(namespace.sandbox_class, sandboxes_pb2.SANDBOX_CLASS_UNSPECIFIED),
        name=namespace.name,
        memory=sizes.parse_memory_range(namespace.memory) if namespace.memory else DEFAULT_MEMORY,
        cpu_milli=sizes.parse_cpu_milli(namespace.cpus),
        hostname=namespace.hostname,
        labels=sizes.parse_pairs(namespace.label, "--label"),
        detach=namespace.detach,
        remove=namespace.remove,
        cold=namespace.cold,
        network=network.parse(namespace),
        priority=sizes.parse_whole(namespace.priority, "--priority", -1000, 1000),
        weight=sizes.parse_whole(namespace.weight, "--weight", 1, 10_000),
        request_id=namespace.request_id,
        affinity=tuple(namespace.affinity),
        tolerations=tuple(namespace.tolerate),
        spread=namespace.spread or "",
        trust=tuple(dict.fromkeys(namespace.trust)),
        restart=namespace.restart,
        services=parse_services(namespace),
    )


def restart_of(options: RunOptions) -> sandboxes_pb2.RestartPolicy.ValueType:
    """What was asked for; else what is detached begins anew, and what somebody waits for does not."""
    if options.restart:
        return RESTARTS[options.restart]
    stays = options.detach and not options.remove
    return sandboxes_pb2.RESTART_ON_HOST_LOSS if stays else sandboxes_pb2.RESTART_NEVER


def spec_of(options: RunOptions, size: tuple[int, int] | None) -> sandboxes_pb2.SandboxSpec:
    """The API's form of the options; `size` is the user's terminal's, if there is one."""
    resources = sandboxes_pb2.Resources(
        memory_min_mib=options.memory.min_mib, memory_max_mib=options.memory.max_mib, cpu_milli=options.cpu_milli
    )
    spec = sandboxes_pb2.SandboxSpec(
        image=options.image,
        **{"class": options.sandbox_class},  # type: ignore[arg-type]
        resources=resources,
        process=message_of(options.process, size),
        remove_on_exit=options.remove,
        cold=options.cold,
        network=options.network,
        priority=options.priority,
        weight=options.weight,
        labels=options.labels,
        hostname=options.hostname,
        restart=restart_of(options),
        services=options.services if options.services.ListFields() else None,
    )
    where = sandboxes_pb2.PlacementRules(
        affinity=options.affinity, tolerations=options.tolerations, spread=options.spread, trust=options.trust
    )
    if where.ByteSize():
        spec.rules.CopyFrom(where)
    return spec


def act(options: RunOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _run(fabric, options, shell))


async def _run(fabric: Fabric, options: RunOptions, shell: Shell) -> int:
    process = options.process
    if options.detach:
        return await _detached(fabric, options, shell)
    if process.tty and process.stdin and not os.isatty(shell.stdio.stdin):
        raise CliError("-t needs a terminal", "standard input is none", "leave -t out to use it in a pipe")
    async with Console(shell.stdio, stdin=process.stdin, tty=process.tty, detachable=True) as console:
        sandbox = await create(fabric, options, spec_of(options, console.size if process.tty else None))
        if sandbox.status.phase == sandboxes_pb2.PENDING and not sys.stderr.isatty():  # there Progress says so
            shell.say(f"sandloom: {lookup.waits_for(sandbox)}")
        to = attachment.Attachment(sandbox.uid, sandbox.name, process.stdin, process.tty, from_start=True)
        try:
            async with _starting(fabric, sandbox, console, shell), ports.telling(fabric, sandbox, shell.say):
                ended = await attachment.follow(fabric, to, console, shell.say)
        except BrokenPipeError:  # nobody reads what it says: as in a pipe on one machine, it is to end
            await _end(fabric, sandbox, options)
            raise
        except CliError:
            if options.remove:
                await _remove_failed(fabric, sandbox)
            raise
        if isinstance(ended, Left) and console.awaiting:
            await _end(fabric, sandbox, options)
            return attachment.exit_code_of(ended)
    return await _finish(fabric, ended, sandbox, options, shell)


async def _detached(fabric: Fabric, options: RunOptions, shell: Shell) -> int:
    """Returns once its program runs (or has run), so that what comes next can count on it."""
    sandbox = await create(fabric, options, spec_of(options, None))
    shell.printer.write(f"{sandbox.name}\n")
    with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:
        progress.update(f"starting {sandbox.name}")
        now = await lookup.until(fabric, sandbox.uid, _has_begun, deadline_s=START_S)
    if now is None or not _has_begun(now):
        if now is not None:
            shell.say(f"{sandbox.name} is still starting; `sandloom events -w --subject {sandbox.name}` tells on")
        return 0
    if now.status.phase == sandboxes_pb2.FAILED:
        raise lookup.failure_of(now)
    await ports.tell(fabric, now, shell.say)
    if now.status.has_exit_code and now.status.exit_code in COULD_NOT_RUN and now.status.message:
        return told(Exited(now.status.exit_code, now.status.message), " ".join(options.process.program), shell)
    return 0


def _has_begun(now: sandboxes_pb2.Sandbox | None) -> bool:
    return lookup.has_ended(now) or (now is not None and now.status.phase in BEGUN)


@asynccontextmanager
async def _starting(
    fabric: Fabric, sandbox: sandboxes_pb2.Sandbox, console: Console, shell: Shell
) -> AsyncIterator[None]:
    """While the block runs and until the program is there, tells on a terminal how far it is."""
    quiet = shell.quiet or not sys.stderr.isatty()
    with Progress(quiet=quiet) as progress:
        console.when_begun = progress.clear
        telling = asyncio.create_task(_tell(fabric, sandbox, console, progress)) if not quiet else None
        try:
            yield
        finally:
            if telling is not None:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)


async def _tell(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox, console: Console, progress: Progress) -> None:
    while console.awaiting:
        now = await lookup.until(fabric, sandbox.uid, lambda _: True, deadline_s=None)
        if now is None or not console.awaiting:
            return
        status = now.status
        phase = sandboxes_pb2.Phase.Name(status.phase).lower()
        progress.update(": ".join(part for part in (f"{sandbox.name} is {phase}", status.message) if part))
        await asyncio.sleep(TELL_S)


async def _finish(
    fabric: Fabric, ended: Exited | Left, sandbox: sandboxes_pb2.Sandbox, options: RunOptions, shell: Shell
) -> int:
    if isinstance(ended, Left):
        shell.say(attachment.how_it_went_on(ended, sandbox.name))
        return attachment.exit_code_of(ended)
    if options.remove:
        await until_gone(fabric, sandbox)
    return told(ended, " ".join(options.process.program), shell)


def told(ended: Exited, program: str, shell: Shell) -> int:
    """The exit code, after a line that says why the program could not be run, if so."""
    if ended.code in COULD_NOT_RUN and ended.message:
        named = bool(program) and program.split()[0] in ended.message
        error = CliError(f"cannot run {program or 'its program'}" if not named else "cannot run it", ended.message)
        os.write(shell.stdio.stderr, f"sandloom: {safe(' '.join(str(error).splitlines()))}\n".encode())
    return ended.code


async def create(fabric: Fabric, options: RunOptions, spec: sandboxes_pb2.SandboxSpec) -> sandboxes_pb2.Sandbox:
    """The sandbox, recorded and placed. A lost answer is asked for again, which makes no second one."""
    request = sandboxes_pb2.CreateSandboxRequest(
        name=options.name, spec=spec, request_id=options.request_id or str(uuid.uuid4())
    )
    remedies = {
        Condition.NOT_FOUND: "bring it in with `sandloom image import PATH`; `sandloom image ls` lists those there are",
        Condition.ALREADY_EXISTS: "choose another --name, or remove that one (`sandloom rm`)",
        Condition.EXHAUSTED: "ask for less --memory, or stop something; operators see what there is (`sandloom hosts`)",
        Condition.INVALID: "see `sandloom run --help`",
    }
    for attempt in range(1, CREATE_TRIES + 1):
        try:
            with calling(f"cannot run {options.image}", remedies, FLAGS):
                return await fabric.sandboxes.CreateSandbox(request, timeout=CALL_S)
        except Unreachable:
            if attempt == CREATE_TRIES:
                raise
            await asyncio.sleep(attachment.RETRY_S)
    raise AssertionError("the last try returns or raises")


async def _end(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox, options: RunOptions) -> None:
    if options.remove:
        await _delete(fabric, sandbox)
        return
    with calling(f"cannot stop {sandbox.name}"):
        await fabric.sandboxes.StopSandbox(sandboxes_pb2.StopSandboxRequest(name=sandbox.uid), timeout=CALL_S)


async def _delete(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox) -> None:
    request = sandboxes_pb2.DeleteSandboxRequest(name=sandbox.uid, force=True, allow_missing=True)
    with calling(f"cannot remove {sandbox.name}"):
        await fabric.sandboxes.DeleteSandbox(request, timeout=CALL_S)


async def _remove_failed(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox) -> None:
    """Removes what failed, where it can; the failure itself is what the user is to read."""
    try:
        last = await lookup.until(fabric, sandbox.uid, lambda _: True, deadline_s=0.0)
        if lookup.has_ended(last):
            await _delete(fabric, sandbox)
            await until_gone(fabric, sandbox)
    except CliError:
        return


async def until_gone(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox) -> None:
    """Returns once there is no record of the sandbox. CliError when its host does not let go in time."""
    if await lookup.until(fabric, sandbox.uid, lambda now: now is None, deadline_s=NUDGE_S) is None:
        return
    await _delete(fabric, sandbox)
    if await lookup.until(fabric, sandbox.uid, lambda now: now is None, deadline_s=GONE_S) is not None:
        raise CliError(
            f"{sandbox.name} is not removed yet", f"its host has not let go of it in {GONE_S:.0f} s",
            "`sandloom ps -a` shows it; `sandloom hosts` shows whether its host is up",
        )  # fmt: skip


COMMAND = Command(
    words=("run",),
    summary="start a sandbox and stay with it until its program ends",
    description="Starts a sandbox of IMAGE and runs PROGRAM in it (the image's own command when left out). Its output"
    " comes out here and its exit code is returned; ctrl-p ctrl-q leaves it running when -t is given.",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom run --rm debian -- sh -c 'echo hello; exit 3'",
        "sandloom run --rm -it debian -- bash",
        "sandloom run -d --name web --memory 256M:1G --cpus 2 debian -- python3 -m http.server",
        "sandloom run -d --label app=web --spread zone --affinity ssd --trust no-smt debian -- sleep 60",
        "sandloom run --rm --allow 'tcp:*.debian.org:80' debian -- apt-get update",
        "sandloom run -d -p 8080:80 web",
        "cat data | sandloom run --rm -i debian -- sha256sum",
    ),
    takes_command=True,
    operand="image",
    failed_code=EXIT_RUN_FAILED,
)
