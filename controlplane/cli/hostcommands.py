"""`sandloom hosts inspect|cordon|uncordon|drain|rm|token`: what operators decide of hosts."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from controlplane.api.status import Condition
from controlplane.api.v1 import hosts_pb2
from controlplane.cli import sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import CliError
from controlplane.cli.hosts import state_text
from controlplane.cli.output import plain, render_json, render_yaml
from controlplane.cli.progress import Progress

MISSING = {Condition.NOT_FOUND: "`sandloom hosts` lists those there are"}
DRAIN_S = 600.0
POLL_S = 0.5


@dataclass(frozen=True)
class HostsOptions:
    """Hosts by name."""

    names: tuple[str, ...]
    form: str = "json"
    force: bool = False


@dataclass(frozen=True)
class DrainOptions:
    """`wait_s`: how long to wait until nothing lives there; 0 only asks for it."""

    name: str
    force: bool = False
    wait_s: float = DRAIN_S


@dataclass(frozen=True)
class TokenOptions:
    """`host`: the only name that may join by it; `out`: a file that it goes to, for its owner alone."""

    host: str = ""
    lifetime_s: int = 0
    out: Path | None = None


async def _get(fabric: Fabric, names: Sequence[str]) -> list[hosts_pb2.Host]:
    found: list[hosts_pb2.Host] = []
    for name in names:
        with calling(f"no host {name}", MISSING):
            found.append(await fabric.hosts.GetHost(hosts_pb2.GetHostRequest(name=name), timeout=CALL_S))
    return found


def act_inspect(options: HostsOptions, shell: Shell) -> int:
    values = [plain(host) for host in shell.over(lambda fabric: _get(fabric, options.names))]
    render = render_yaml if options.form == "yaml" else render_json
    shell.printer.write(render(values[0] if len(values) == 1 else values))
    return 0


def act_cordon(options: HostsOptions, shell: Shell) -> int:
    async def each(fabric: Fabric) -> None:
        for name in options.names:
            with calling(f"cannot cordon {name}", MISSING):
                await fabric.hosts.CordonHost(hosts_pb2.CordonHostRequest(name=name), timeout=CALL_S)
            shell.printer.write(f"{name}\n")

    shell.over(each)
    return 0


def act_uncordon(options: HostsOptions, shell: Shell) -> int:
    async def each(fabric: Fabric) -> None:
        for name in options.names:
            with calling(f"cannot uncordon {name}", MISSING):
                await fabric.hosts.UncordonHost(hosts_pb2.UncordonHostRequest(name=name), timeout=CALL_S)
            shell.printer.write(f"{name}\n")

    shell.over(each)
    return 0


def act_rm(options: HostsOptions, shell: Shell) -> int:
    async def each(fabric: Fabric) -> None:
        for name in options.names:
            with calling(f"cannot remove {name}", MISSING):
                request = hosts_pb2.RemoveHostRequest(name=name, force=options.force)
                await fabric.hosts.RemoveHost(request, timeout=CALL_S)
            shell.printer.write(f"{name}\n")

    shell.over(each)
    return 0


def act_drain(options: DrainOptions, shell: Shell) -> int:
    """Waits until nothing lives there, or only what nobody moves."""

    async def ask(fabric: Fabric) -> hosts_pb2.Host:
        with calling(f"cannot drain {options.name}", MISSING):
            request = hosts_pb2.DrainHostRequest(name=options.name, force=options.force)
            return await fabric.hosts.DrainHost(request, timeout=CALL_S)

    host = shell.over(ask)
    give_up_s = time.monotonic() + options.wait_s
    with Progress(quiet=shell.quiet) as progress:
        while host.state != hosts_pb2.DRAINED and time.monotonic() < give_up_s:
            progress.update(f"{options.name} is {state_text(host)}; to be seen to: {len(host.blockers)}")
            if host.blockers and not options.force and len(host.blockers) >= host.sandboxes:
                break
            time.sleep(POLL_S)
            (host,) = shell.over(lambda fabric: _get(fabric, [options.name]))
    if host.state == hosts_pb2.DRAINED:
        shell.printer.write(f"{options.name}\n")
        return 0
    left = "; ".join(f"{one.sandbox} ({one.reason})" for one in host.blockers) or "sandboxes still move"
    raise CliError(
        f"host {options.name} is not drained yet", left,
        "stop those, or `--force` stops them; moves go on by themselves, `sandloom hosts uncordon` takes it back",
    )  # fmt: skip


def act_token(options: TokenOptions, shell: Shell) -> int:
    async def ask(fabric: Fabric) -> hosts_pb2.JoinToken:
        with calling("no token can be made"):
            request = hosts_pb2.CreateJoinTokenRequest(host=options.host, lifetime_s=options.lifetime_s)
            return await fabric.hosts.CreateJoinToken(request, timeout=CALL_S)

    if options.out is None:
        shell.printer.write(f"{shell.over(ask).token}\n")
        shell.say("on the new host: sandloom host join TOKEN --name NAME; it works once, and is a secret until then")
        return 0
    with secret_file(options.out) as file:  # first: a token that nobody can keep must not be made
        file.write(f"{shell.over(ask).token}\n")
    shell.say(
        f"on the new host: sandloom host join @{options.out} --name NAME; it works once, and is a secret until then"
    )
    return 0


@contextmanager
def secret_file(path: Path) -> Iterator[TextIO]:
    """A new file that only its owner can read, in the place of what was there; nothing is left when the block fails."""
    beside = path.with_name(f"{path.name}.new-{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            yield file
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="HOST", nargs="+", help="a host's name")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    add_output(parser, ("json", "yaml"))


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.add_argument("--force", action="store_true", help="even with sandboxes: they are replaced, or fail")


def _configure_drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="HOST", help="a host's name")
    parser.add_argument("--force", action="store_true", help="stop what cannot be moved, with its grace")
    parser.add_argument("--wait", default=f"{DRAIN_S:.0f}", metavar="S", help="how long to wait for it; 0: not at all")


def _configure_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="", metavar="NAME", help="only this name may join by it, also anew")
    parser.add_argument("--lifetime", default="3600", metavar="S", help="how long it is good for; an hour")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, readable for its owner only")


def _parse_token(namespace: argparse.Namespace) -> TokenOptions:
    return TokenOptions(namespace.host, int(sizes.parse_duration_s(namespace.lifetime)), namespace.out)


INSPECT = Command(
    words=("hosts", "inspect"),
    summary="show all that is known of a host",
    configure=_configure_inspect,
    parse=lambda ns: HostsOptions(tuple(ns.names), ns.form),
    act=act_inspect,
    examples=("sandloom hosts inspect h1",),
)
CORDON = Command(
    words=("hosts", "cordon"),
    summary="give a host no new sandboxes",
    configure=_names,
    parse=lambda ns: HostsOptions(tuple(ns.names)),
    act=act_cordon,
    examples=("sandloom hosts cordon h1",),
)
UNCORDON = Command(
    words=("hosts", "uncordon"),
    summary="take cordon or drain back",
    configure=_names,
    parse=lambda ns: HostsOptions(tuple(ns.names)),
    act=act_uncordon,
    examples=("sandloom hosts uncordon h1",),
)
DRAIN = Command(
    words=("hosts", "drain"),
    summary="move a host's sandboxes elsewhere and wait until it is empty",
    description="Gives the host nothing new and moves what it has: sandboxes whose restart policy allows it end there"
    " and begin anew on another host. Exit status 1 names what cannot be moved.",
    configure=_configure_drain,
    parse=lambda ns: DrainOptions(ns.name, ns.force, sizes.parse_duration_s(ns.wait)),
    act=act_drain,
    examples=("sandloom hosts drain h1", "sandloom hosts drain h1 --force"),
)
RM = Command(
    words=("hosts", "rm"),
    summary="forget a host and refuse its certificates",
    configure=_configure_rm,
    parse=lambda ns: HostsOptions(tuple(ns.names), force=ns.force),
    act=act_rm,
    examples=("sandloom hosts rm h1",),
)
TOKEN = Command(
    words=("hosts", "token"),
    summary="make a one-time token by which a host joins",
    configure=_configure_token,
    parse=_parse_token,
    act=act_token,
    examples=("sandloom hosts token --out token", "sandloom hosts token --host h2 --lifetime 600"),
)
HOST_TOKEN = Command(
    words=("host", "token"),
    summary="the same as `hosts token`",
    configure=_configure_token,
    parse=_parse_token,
    act=act_token,
    examples=("sandloom host token",),
)
