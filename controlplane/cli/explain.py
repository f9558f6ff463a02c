"""`sandloom explain`: why a sandbox is on its host, or what each host lacks for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import UsageError
from controlplane.cli.output import Column, paint, plain, render_json, render_table, render_yaml, safe

MOST_HOSTS = 1000
Verdict = sandboxes_pb2.HostVerdict
FORMS = ("table", "wide", "json", "yaml")


@dataclass(frozen=True)
class ExplainOptions:
    """`hosts`: the most hosts to tell of."""

    sandbox: str
    hosts: int


def _verdict(row: Verdict) -> str:
    return "fits" if row.fits else "when it is back" if row.for_now else row.reason


def _why(row: Verdict) -> str:
    if row.fits:
        return "; ".join(part.why for part in row.score if part.what in ("strain", "memory", "fit"))
    return row.message.partition(": ")[2] or row.message


def _whole(row: Verdict) -> str:
    return "; ".join(f"{part.what}: {part.why}" for part in row.score)


COLUMNS: tuple[Column[Verdict], ...] = (
    Column("HOST", lambda row: row.host),
    Column("VERDICT", _verdict, colour=lambda row: "green" if row.fits else "red"),
    Column("LACKING", lambda row: str(row.lacking) if row.lacking else "", right=True),
    Column("WHY", _why),
    Column("SCORE", _whole, wide=True),
)


def text_of(told: sandboxes_pb2.Explanation, *, wide: bool, colour: bool) -> str:
    """For people."""
    lines = [f"{paint(safe(told.name), 'bold', colour)}: {safe(told.message)}"]
    lines += _aligned((part.what, part.why) for part in told.placed_because)
    if told.placed_because:
        sizes = (
            f"charged {told.charge_mib} MiB; added {told.marginal_mib} MiB to its host, shares {told.shared_mib} MiB"
        )
        lines += _aligned([("sizes", f"{sizes} that were there")])
    if told.verdicts:
        lines += ["", "other hosts now:" if told.host else "hosts now:"]
    text = "\n".join(lines) + "\n"
    if told.verdicts:
        text += render_table(COLUMNS, list(told.verdicts), wide=wide, colour=colour)
        left = told.fitting + sum(count.hosts for count in told.refused) - len(told.verdicts)
        text += f"and {left} more (--hosts)\n" if left > 0 else ""
    if told.refused:
        counts = ", ".join(f"{count.hosts} {count.reason}" for count in told.refused)
        text += f"in all: {told.fitting} could take it now; {counts}\n"
    return text


def _aligned(parts: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {what:8}{safe(why)}" for what, why in parts]


async def _explain(fabric: Fabric, options: ExplainOptions) -> sandboxes_pb2.Explanation:
    _, reference = await lookup.find(fabric, options.sandbox)
    with calling(f"cannot explain {options.sandbox}"):
        request = sandboxes_pb2.ExplainSandboxRequest(name=reference, hosts=options.hosts)
        return await fabric.sandboxes.ExplainSandbox(request, timeout=CALL_S)


def act(options: ExplainOptions, shell: Shell) -> int:
    told = shell.over(lambda fabric: _explain(fabric, options))
    printer = shell.printer
    if printer.form in ("json", "yaml"):
        printer.write((render_json if printer.form == "json" else render_yaml)(plain(told)))
    else:
        printer.write(text_of(told, wide=printer.form == "wide", colour=printer.colour))
    return 0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sandbox", metavar="SANDBOX", help="a sandbox's name or uid")
    parser.add_argument("--hosts", default="20", metavar="N", help="tell of N hosts at most, 20 unless given")
    add_output(parser, FORMS)


def parse(namespace: argparse.Namespace) -> ExplainOptions:
    if not namespace.hosts.isdigit() or not 1 <= int(namespace.hosts) <= MOST_HOSTS:
        raise UsageError("not a number of hosts", repr(namespace.hosts), f"1 to {MOST_HOSTS}")
    return ExplainOptions(namespace.sandbox, int(namespace.hosts))


COMMAND = Command(
    words=("explain",),
    summary="say why a sandbox is on its host, or what each host lacks",
    description="For a sandbox that has a host: what spoke for that host when it was chosen, as recorded then, and"
    " how the other hosts stand now. For one that waits: what each host lacks, the nearest first.",
    configure=configure,
    parse=parse,
    act=act,
    examples=("sandloom explain web", "sandloom explain web -o wide --hosts 100"),
    operand="sandbox",
)
