"""`sandloom ca issue`, `sandloom tenants cert`: certificates by hand, with a CA whose folder is at hand."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from controlplane.api.identity import Identity, Role
from controlplane.api.status import Condition
from controlplane.api.v1 import tenants_pb2
from controlplane.ca import LEAF_DAYS, Authority
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import CallFailed, CliError, UsageError


@dataclass(frozen=True)
class IssueOptions:
    """`ca` None: the CA of HOME's own fabric. `create`: make the CA when its folder has none. `known`: only for a
    tenant that the fabric knows; where it cannot be asked, a note says so."""

    role: Role
    name: str
    folder: Path
    ca: Path | None = None
    dns: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    days: int = LEAF_DAYS
    create: bool = False
    known: bool = False


def act(options: IssueOptions, shell: Shell) -> int:
    folder = options.ca or shell.target.home.tls / "ca"
    if not options.create and not (folder / "ca.key").exists():
        raise CliError("there is no CA here", str(folder), "name its folder with --ca; --create makes a new one")
    if options.known:
        _require_tenant(options, shell)
    authority = Authority.ensure(folder)
    try:
        files = authority.issue_files(
            Identity(options.role, options.name), options.folder,
            dns_names=options.dns, ip_addresses=options.addresses, days=options.days,
        )  # fmt: skip
    except ValueError as error:
        raise CliError("no certificate can be made of it", str(error), "give --ip as an address") from error
    shell.printer.write(f"{files.cert}\n")
    shell.say(f"ca.crt, {files.cert.name} and {files.key.name} are in {options.folder}: use them with --tls-dir")
    return 0


def _require_tenant(options: IssueOptions, shell: Shell) -> None:
    """CliError when the fabric says that there is no such tenant: its certificate would be refused."""
    name = options.name

    async def ask(fabric: Fabric) -> None:
        remedies = {Condition.NOT_FOUND: f"`sandloom tenants create {name}` makes it; `--force` issues it all the same"}
        with calling(f"no certificate for tenant {name}", remedies):
            await fabric.tenants.GetTenant(tenants_pb2.GetTenantRequest(name=name), timeout=CALL_S)

    try:
        shell.over(ask)
    except CliError as error:
        if isinstance(error, CallFailed) and error.code == "NOT_FOUND":
            raise
        shell.say(f"sandloom: note: whether there is a tenant {name} could not be asked: {error.what}")


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where ca.crt, certificate and key go")
    parser.add_argument("--ca", type=Path, metavar="DIR", help="the CA's folder; that of HOME's own fabric")
    parser.add_argument("--days", default=str(LEAF_DAYS), metavar="N", help="how long it is good for; a year")


def _configure_issue(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("role", choices=[role.value for role in Role], help="what its holder may be")
    parser.add_argument("name", metavar="NAME", help="who it is, in that role")
    parser.add_argument("--dns", action="append", default=[], metavar="NAME", help="one more DNS name")
    parser.add_argument("--ip", action="append", default=[], metavar="ADDRESS", help="one more address")
    parser.add_argument("--create", action="store_true", help="make the CA first, when its folder has none")
    _shared(parser)


def _configure_cert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="TENANT", help="a tenant's name")
    parser.add_argument("--force", action="store_true", help="also for a tenant that is not there (yet)")
    _shared(parser)


def _parse(namespace: argparse.Namespace) -> IssueOptions:
    if not namespace.days.isdigit() or not 0 < int(namespace.days) <= 3650:
        raise UsageError("not a number of days", namespace.days, "give 1 to 3650")
    return IssueOptions(
        Role(getattr(namespace, "role", Role.TENANT.value)), namespace.name, namespace.out, namespace.ca,
        tuple(getattr(namespace, "dns", ())), tuple(getattr(namespace, "ip", ())), int(namespace.days),
        bool(getattr(namespace, "create", False)), not getattr(namespace, "force", True),
    )  # fmt: skip


ISSUE = Command(
    words=("ca", "issue"),
    summary="issue a certificate of any role with a CA that is at hand",
    configure=_configure_issue,
    parse=_parse,
    act=act,
    examples=(
        "sandloom ca issue controlplane cp-1 --ca ./ca --create --out ./cp-1 --dns cp.example",
        "sandloom ca issue operator ann --ca ./ca --out ./ann",
    ),
)
CERT = Command(
    words=("tenants", "cert"),
    summary="issue a tenant's certificate with the fabric's own CA",
    configure=_configure_cert,
    parse=_parse,
    act=act,
    examples=("sandloom tenants cert acme --out ./acme-tls",),
)
