"""`sandloom context ls|use|add|rm`: contexts by name, as controlplane/cli/contexts.py keeps them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from controlplane.cli import contexts
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import stem_in
from controlplane.cli.contexts import LOCAL, NamedContext
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.home import load_context
from controlplane.cli.output import Column


@dataclass(frozen=True)
class AddOptions:
    """A context to be, and whether it is to be the current one."""

    name: str
    address: str
    tls_dir: Path
    tenant: str = ""
    use: bool = False


@dataclass(frozen=True)
class Row:
    """One line of `context ls`."""

    name: str
    current: bool
    address: str
    tenant: str
    certificate: str


COLUMNS: tuple[Column[Row], ...] = (
    Column("CURRENT", lambda row: "*" if row.current else ""),
    Column("NAME", lambda row: row.name),
    Column("ADDRESS", lambda row: row.address),
    Column("TENANT", lambda row: row.tenant),
    Column("CERTIFICATE", lambda row: row.certificate, wide=True),
)


def act_ls(options: None, shell: Shell) -> int:
    kept = contexts.load(contexts.file_of(shell.environ))
    rows = [Row(LOCAL, not kept.current, f"(the fabric in {shell.target.home.root})", "", "")]
    rows += [
        Row(name, name == kept.current, one.address, one.tenant, one.tls_cert)
        for name, one in sorted(kept.named.items())
    ]
    shell.printer.listing(rows, COLUMNS, name=lambda row: row.name, data=lambda row: row.__dict__)
    return 0


def act_use(name: str, shell: Shell) -> int:
    kept = contexts.load(contexts.file_of(shell.environ))
    if name != LOCAL:
        kept.get(name)
    contexts.save(contexts.Contexts(kept.path, "" if name == LOCAL else name, kept.named))
    shell.printer.write(f"{name}\n")
    return 0


def act_add(options: AddOptions, shell: Shell) -> int:
    folder = options.tls_dir.absolute()
    stem = stem_in(folder)
    made = NamedContext(
        options.address or load_context(shell.target.home).address,
        str(folder / "ca.crt"),
        str(folder / f"{stem}.crt"),
        str(folder / f"{stem}.key"),
        options.tenant,
    )
    for path in (made.tls_ca, made.tls_cert, made.tls_key):
        if not os.access(path, os.R_OK):
            raise CliError("a TLS file cannot be read", path, "--tls-dir names a folder with ca.crt and a certificate")
    kept = contexts.load(contexts.file_of(shell.environ)).with_one(options.name, made)
    contexts.save(contexts.Contexts(kept.path, options.name if options.use else kept.current, kept.named))
    shell.printer.write(f"{options.name}\n")
    return 0


def act_rm(name: str, shell: Shell) -> int:
    contexts.save(contexts.load(contexts.file_of(shell.environ)).without(name))
    shell.printer.write(f"{name}\n")
    return 0


def _configure_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what to call it")
    parser.add_argument("--use", action="store_true", help="make it the current one")
    # --address (else that of HOME's fabric), --tls-dir and --tenant are every command's; here they are kept


def _parse_add(namespace: argparse.Namespace) -> AddOptions:
    if namespace.tls_dir is None:
        raise UsageError("a context needs certificates", "", "give --tls-dir DIR")
    return AddOptions(namespace.name, namespace.address, namespace.tls_dir, namespace.tenant, namespace.use)


def _configure_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a context's name")


LS = Command(
    words=("context", "ls"),
    summary="list the contexts: which fabrics there are, and which one is meant",
    configure=add_output,
    parse=lambda ns: None,
    act=act_ls,
    examples=("sandloom context ls",),
)
USE = Command(
    words=("context", "use"),
    summary="make a context the current one; `local` is the fabric of `dev up`",
    configure=_configure_name,
    parse=lambda ns: str(ns.name),
    act=act_use,
    examples=("sandloom context use prod", "sandloom context use local"),
)
ADD = Command(
    words=("context", "add"),
    summary="keep an address, certificates and a tenant under a name",
    configure=_configure_add,
    parse=_parse_add,
    act=act_add,
    examples=("sandloom context add prod --address cp.example:7420 --tls-dir ~/prod-tls --use",),
)
RM = Command(
    words=("context", "rm"),
    summary="forget a context",
    configure=_configure_name,
    parse=lambda ns: str(ns.name),
    act=act_rm,
    examples=("sandloom context rm prod",),
)
