"""`service show` and `service set`: who answers a running sandbox's calls, what that did, and other rules for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from controlplane.api.errors import PolicyError
from controlplane.api.policies import ANSWERERS, parse_policy
from controlplane.api.services import SERVICE_NAMES, Service, parse_allow, parse_answerer
from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import UsageError
from controlplane.cli.output import Column

ServiceUsage = sandboxes_pb2.ServiceUsage
DONE = ("allowed", "refused", "cut")


@dataclass(frozen=True)
class ShowOptions:
    """One sandbox."""

    name: str


@dataclass(frozen=True)
class SetOptions:
    """What shall be so: `services` names only what changes; `rules` None leaves the rules."""

    name: str
    services: tuple[tuple[str, str], ...]
    rules: tuple[str, ...] | None


@dataclass(frozen=True)
class Row:
    """A service of a sandbox, as it is shown."""

    service: str
    who: str
    counts: dict[str, int]
    rules: str


def rows_of(sandbox: sandboxes_pb2.Sandbox, usage: ServiceUsage | None) -> list[Row]:
    """A row for each service that somebody else than the kernel answers. Pure."""
    policy = parse_policy(sandbox.spec.services)
    rules = " ".join([*map(str, policy.allow), *(f"-p {port}" for port in policy.publish)])
    decided = usage.decisions if usage is not None else {}
    return [
        Row(
            service.value,
            policy.now(service).value,
            {what: decided[f"{service.value}: {what}"] for what in DONE if f"{service.value}: {what}" in decided},
            rules if service is Service.SOCKETS else "",
        )
        for service, _ in policy.answered
    ]


COLUMNS: tuple[Column[Row], ...] = (
    Column("SERVICE", lambda row: row.service),
    Column("WHO", lambda row: row.who),
    *(Column(what.upper(), lambda row, what=what: str(row.counts.get(what, 0)), right=True) for what in DONE),  # type: ignore[misc]
    Column("RULES", lambda row: row.rules),
)


def usage_text(usage: ServiceUsage) -> str:
    """`12 connections (1 open), 3 datagrams, 4096 bytes out, 512 bytes in; published 127.0.0.1:8080:80/tcp`."""
    text = (
        f"{usage.connections} connections ({usage.open_connections} open), {usage.datagrams} datagrams, "
        f"{usage.bytes_out} bytes out, {usage.bytes_in} bytes in"
    )
    return f"{text}; published {', '.join(usage.published)}" if usage.published else text


async def usage_of(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox) -> ServiceUsage | None:
    """What its services did; None when its kernel answers all, or it does not run. CliError when its host is away."""
    if not parse_policy(sandbox.spec.services).answered or sandbox.status.phase != sandboxes_pb2.RUNNING:
        return None
    with calling(f"cannot ask what the services of {sandbox.name} did"):
        request = sandboxes_pb2.GetServiceUsageRequest(name=sandbox.uid)
        usage: ServiceUsage = await fabric.sandboxes.GetServiceUsage(request, timeout=CALL_S)
        return usage


def act_show(options: ShowOptions, shell: Shell) -> int:
    async def ask(fabric: Fabric) -> tuple[sandboxes_pb2.Sandbox, ServiceUsage | None]:
        sandbox, _ = await lookup.find(fabric, options.name)
        return sandbox, await usage_of(fabric, sandbox)

    sandbox, usage = shell.over(ask)
    rows = rows_of(sandbox, usage)
    shell.printer.listing(rows, COLUMNS, name=lambda row: row.service, data=vars)
    if usage is not None:
        shell.say(usage_text(usage))
    elif not rows:
        shell.say(f"the kernel of {sandbox.name} answers all of its calls")
    return 0


def parse_set(namespace: argparse.Namespace) -> SetOptions:
    """UsageError says what cannot be read."""
    services = []
    try:
        for text in namespace.services:
            name, _, who = text.partition("=")
            if name not in SERVICE_NAMES:
                raise UsageError("no such service", repr(name), f"the services are {', '.join(SERVICE_NAMES)}")
            services.append((name, parse_answerer(who).value))
        rules = tuple(str(parse_allow(text)) for text in namespace.allow)
    except PolicyError as error:
        raise UsageError("that cannot be read", str(error)) from error
    if not services and not rules and not namespace.allow_nothing:
        raise UsageError("nothing to change", "", "give SERVICE=WHO, --allow or --allow-nothing")
    if rules and namespace.allow_nothing:
        raise UsageError("--allow and --allow-nothing contradict each other", "", "give one of them")
    return SetOptions(namespace.name, tuple(services), rules if rules or namespace.allow_nothing else None)


def act_set(options: SetOptions, shell: Shell) -> int:
    async def change(fabric: Fabric) -> sandboxes_pb2.Sandbox:
        _, reference = await lookup.find(fabric, options.name)
        request = sandboxes_pb2.SetServicesRequest(name=reference, replace_allow=options.rules is not None)
        request.services.allow.extend(options.rules or ())
        for name, who in options.services:
            setattr(request.services, name, ANSWERERS[parse_answerer(who)])
        remedies = {Condition.PRECONDITION: f"`sandloom service show {options.name}` shows what it has"}
        with calling(f"cannot change the services of {options.name}", remedies):
            sandbox: sandboxes_pb2.Sandbox = await fabric.sandboxes.SetServices(request, timeout=CALL_S)
            return sandbox

    sandbox = shell.over(change)
    shell.printer.listing(rows_of(sandbox, None), COLUMNS[:2] + COLUMNS[-1:], name=lambda row: row.service, data=vars)
    return 0


def _configure_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a sandbox's name, or the beginning of its uid")
    add_output(parser)


def _configure_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a running sandbox's name, or the beginning of its uid")
    parser.add_argument("services", metavar="SERVICE=WHO", nargs="*", help="sockets=deny, dns=tool: tool or deny")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="RULE",
        help="a rule of sockets=tool, tcp:10.0.0.0/8:443; all rules that there are from now on: give each of them",
    )  # fmt: skip
    parser.add_argument("--allow-nothing", action="store_true", help="no rule from now on")
    add_output(parser)


SHOW = Command(
    words=("service", "show"),
    summary="show who answers a sandbox's calls, and what that did",
    description="Decisions are counted since the host's hostd took the sandbox over: connections, datagrams and bytes, "
    "too. `sandloom events` tells each refusal.",
    configure=_configure_show,
    parse=lambda ns: ShowOptions(ns.name),
    act=act_show,
    examples=("sandloom service show web",),
    operand="sandbox",
)
SET = Command(
    words=("service", "set"),
    summary="change a running sandbox's rules, or deny what a tool answers",
    description="Connections that the new rules do not allow are cut, others live on. What began as kernel or deny "
    "stays so: its processes run under a filter that cannot change.",
    configure=_configure_set,
    parse=parse_set,
    act=act_set,
    examples=(
        "sandloom service set web sockets=deny",
        "sandloom service set web --allow tcp:10.0.0.0/8:443 --allow tcp:10.0.0.0/8:80",
    ),
    operand="live",
)
