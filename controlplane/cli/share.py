"""`sandloom share`: the sharing ledger: who holds which memory alone, who shares it, and what sharing saves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import CliError
from controlplane.cli.output import Column, paint, plain, render_json, render_yaml, safe
from controlplane.cli.sizes import format_bytes

LEGEND = (
    "resident: what its page tables hold",
    "private: held by it alone",
    "shared: held by others too",
    "saved: resident less its fair part of what is shared",
)
TOTAL = "TOTAL"


@dataclass(frozen=True)
class ShareOptions:
    """`host` "": all of them."""

    host: str = ""


@dataclass(frozen=True)
class Row:
    """A sandbox's memory in bytes, or the sum of all of them."""

    name: str
    host: str
    resident: int
    private: int
    shared: int
    saved: int
    most_holders: int
    ram: int
    layers: int
    vmm: int


def row_of(memory: sandboxes_pb2.SandboxMemory) -> Row:
    """One sandbox's row."""
    return Row(
        memory.name, memory.host, memory.resident_bytes, memory.private_bytes,
        memory.resident_bytes - memory.private_bytes, memory.saved_bytes,
        max((part.holders for part in memory.shared if part.bytes), default=1),
        memory.guest_ram_bytes, memory.layer_bytes, memory.vmm_bytes,
    )  # fmt: skip


def total_of(rows: Sequence[Row]) -> Row:
    """Their sum."""
    return Row(
        TOTAL, "", sum(r.resident for r in rows), sum(r.private for r in rows), sum(r.shared for r in rows),
        sum(r.saved for r in rows), 0, sum(r.ram for r in rows), sum(r.layers for r in rows), sum(r.vmm for r in rows),
    )  # fmt: skip


def host_line(host: sandboxes_pb2.HostMemory, rows: Sequence[Row]) -> str:
    """What a host spends, beside what its sandboxes would need if they shared nothing."""
    mine = [row for row in rows if row.host == host.host]
    resident = sum(row.resident for row in mine)
    saved = max(0, resident - host.distinct_bytes)
    share = f" ({saved / resident:.0%})" if resident else ""
    who = "1 sandbox holds" if len(mine) == 1 else f"{len(mine)} sandboxes hold"
    return (
        f"host {safe(host.host)}: {who} {format_bytes(resident)},"
        f" in {format_bytes(host.distinct_bytes)} of memory: {format_bytes(saved)}{share} saved;"
        f" image layers cached {format_bytes(host.layer_cache_bytes)};"
        f" {format_bytes(host.mem_available_bytes)} of {format_bytes(host.mem_total_bytes)} available"
    )


def _bytes(header: str, name: str, wide: bool = False) -> Column[Row]:
    return Column(header, lambda row: format_bytes(getattr(row, name)), right=True, wide=wide)


COLUMNS: tuple[Column[Row], ...] = (
    Column("SANDBOX", lambda row: row.name, colour=lambda row: "bold" if row.name == TOTAL else ""),
    _bytes("RESIDENT", "resident"),
    _bytes("PRIVATE", "private"),
    _bytes("SHARED", "shared"),
    Column("WITH", lambda row: str(row.most_holders - 1) if row.most_holders > 1 else "", right=True),
    _bytes("SAVED", "saved"),
    Column("HOST", lambda row: row.host),
    _bytes("RAM", "ram", wide=True),
    _bytes("LAYERS", "layers", wide=True),
    _bytes("VMM", "vmm", wide=True),
)


async def _ledger(fabric: Fabric, host: str) -> sandboxes_pb2.SharingLedger:
    with calling("cannot read the sharing ledger"):
        request = sandboxes_pb2.GetSharingLedgerRequest(host=host)
        return await fabric.sandboxes.GetSharingLedger(request, timeout=CALL_S)


def act(options: ShareOptions, shell: Shell) -> int:
    ledger = shell.over(lambda fabric: _ledger(fabric, options.host))
    printer = shell.printer
    if ledger.lost_hosts and not ledger.sandboxes and not ledger.hosts:
        raise CliError(
            "nothing can be measured", f"LOST: {', '.join(ledger.lost_hosts)}", "`sandloom hosts` shows what is up"
        )
    if ledger.lost_hosts:
        shell.say(f"sandloom: note: not in it, for they are LOST: {', '.join(map(safe, ledger.lost_hosts))}")
    if printer.form in ("json", "yaml"):
        printer.write((render_json if printer.form == "json" else render_yaml)(plain(ledger)))
        return 0
    rows = sorted(map(row_of, ledger.sandboxes), key=lambda row: (row.host, row.name))
    if printer.form == "name":
        printer.write("".join(f"{safe(row.name)}\n" for row in rows))
        return 0
    printer.listing([*rows, total_of(rows)], COLUMNS, name=lambda row: row.name, data=lambda row: None)
    lines = [host_line(host, rows) for host in ledger.hosts]
    printer.write("\n" + "".join(f"{line}\n" for line in lines))
    printer.write(paint("; ".join(LEGEND), "dim", printer.colour) + "\n")
    return 0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="", metavar="NAME", help="this host only")
    add_output(parser)


COMMAND = Command(
    words=("share",),
    summary="show what memory sandboxes share and what that saves",
    description="The sharing ledger, measured now from the hosts' page tables: what each sandbox holds alone, what it"
    " shares with others, and what the host spends on all of them together.",
    configure=configure,
    parse=lambda ns: ShareOptions(ns.host),
    act=act,
    examples=("sandloom share", "sandloom share -o wide", "sandloom share -o json"),
)
