"""`sandloom tenants create|ls|inspect|quota|rm`: who owns what, and how much of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from controlplane.api.status import Condition
from controlplane.api.v1 import tenants_pb2
from controlplane.cli import sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, calling, every_page
from controlplane.cli.errors import UsageError
from controlplane.cli.output import Column, plain, render_json, render_yaml

Tenant = tenants_pb2.Tenant
MISSING = {Condition.NOT_FOUND: "`sandloom tenants ls` lists those there are"}
NONE = "none"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UsageError("not a number", repr(text), "give a whole number, or none")
    return int(text)


BOUNDS: dict[str, tuple[str, Callable[[str], int], str]] = {
    "sandboxes": ("N", _count, "live sandboxes"),
    "memory-min": ("SIZE", sizes.parse_size_mib, "the sum of guarantees"),
    "memory-max": ("SIZE", sizes.parse_size_mib, "the sum of ceilings"),
    "cpus": ("N", sizes.parse_cpu_milli, "the sum of CPUs"),
    "images": ("N", _count, "images"),
    "image-size": ("SIZE", sizes.parse_size_mib, "the sum of its images' distinct layers"),
    "checkpoint-size": ("SIZE", sizes.parse_size_mib, "the sum of its checkpoints"),
}
FIELDS = {
    "sandboxes": "sandboxes", "memory-min": "memory_min_mib", "memory-max": "memory_max_mib", "cpus": "cpu_milli",
    "images": "images", "image-size": "image_mib", "checkpoint-size": "checkpoint_mib",
}  # fmt: skip


@dataclass(frozen=True)
class TenantOptions:
    """A tenant and what is to change of it: None takes a bound away, what is not there stays."""

    name: str
    bounds: dict[str, int | None] = field(default_factory=dict)
    trusted: bool | None = None


@dataclass(frozen=True)
class TenantsOptions:
    """Tenants by name."""

    names: tuple[str, ...] = ()
    form: str = "json"
    force: bool = False


def bounded(quota: tenants_pb2.Quota, bounds: dict[str, int | None]) -> tenants_pb2.Quota:
    """The quota with some bounds changed."""
    changed = tenants_pb2.Quota()
    changed.CopyFrom(quota)
    for name, most in bounds.items():
        if most is None:
            changed.ClearField(name)  # type: ignore[arg-type]
        else:
            setattr(changed, name, most)
    return changed


def _of(used: str, quota: str, render: Callable[[int], str] = str) -> Callable[[Tenant], str]:
    def text(row: Tenant) -> str:
        most = render(getattr(row.quota, quota)) if row.quota.HasField(quota) else "-"  # type: ignore[arg-type]
        return f"{render(getattr(row.usage, used))}/{most}"

    return text


COLUMNS: tuple[Column[Tenant], ...] = (
    Column("NAME", lambda row: row.name),
    Column("TRUSTED", lambda row: "yes" if row.trusted else "no"),
    Column("SANDBOXES", _of("sandboxes", "sandboxes"), right=True),
    Column("MEMORY MIN", _of("memory_min_mib", "memory_min_mib", sizes.format_mib), right=True),
    Column("MEMORY MAX", _of("memory_max_mib", "memory_max_mib", sizes.format_mib), right=True),
    Column("CPUS", _of("cpu_milli", "cpu_milli", sizes.format_cpus), right=True),
    Column("IMAGES", _of("images", "images"), right=True),
    Column("IMAGE SIZE", _of("image_mib", "image_mib", sizes.format_mib), right=True),
    Column("POOLS", lambda row: str(row.usage.pools), wide=True, right=True),
)


async def list_tenants(fabric: Fabric) -> list[Tenant]:
    """Every tenant, by name."""

    async def page(token: str) -> tenants_pb2.ListTenantsResponse:
        with calling("cannot list the tenants"):
            request = tenants_pb2.ListTenantsRequest(page_size=PAGE_SIZE, page_token=token)
            return await fabric.tenants.ListTenants(request, timeout=CALL_S)

    return await every_page(page, lambda answer: list(answer.tenants))


def act_ls(options: TenantsOptions, shell: Shell) -> int:
    shell.printer.listing(shell.over(list_tenants), COLUMNS, name=lambda row: row.name, data=plain)
    return 0


def act_create(options: TenantOptions, shell: Shell) -> int:
    async def ask(fabric: Fabric) -> Tenant:
        quota = bounded(tenants_pb2.Quota(), options.bounds)
        request = tenants_pb2.CreateTenantRequest(name=options.name, quota=quota, trusted=bool(options.trusted))
        with calling(f"cannot create tenant {options.name}"):
            return await fabric.tenants.CreateTenant(request, timeout=CALL_S)

    shell.printer.write(f"{shell.over(ask).name}\n")
    return 0


async def _get(fabric: Fabric, names: Sequence[str]) -> list[Tenant]:
    found: list[Tenant] = []
    for name in names:
        with calling(f"no tenant {name}", MISSING):
            found.append(await fabric.tenants.GetTenant(tenants_pb2.GetTenantRequest(name=name), timeout=CALL_S))
    return found


def act_inspect(options: TenantsOptions, shell: Shell) -> int:
    values = [plain(tenant) for tenant in shell.over(lambda fabric: _get(fabric, options.names or ("",)))]
    render = render_yaml if options.form == "yaml" else render_json
    shell.printer.write(render(values[0] if len(values) == 1 else values))
    return 0


def act_quota(options: TenantOptions, shell: Shell) -> int:
    async def ask(fabric: Fabric) -> Tenant:
        (now,) = await _get(fabric, [options.name])
        trusted = now.trusted if options.trusted is None else options.trusted
        request = tenants_pb2.UpdateTenantRequest(
            name=now.name, quota=bounded(now.quota, options.bounds), trusted=trusted, etag=now.etag
        )
        with calling(f"cannot change tenant {now.name}", MISSING):
            return await fabric.tenants.UpdateTenant(request, timeout=CALL_S)

    shell.printer.listing([shell.over(ask)], COLUMNS, name=lambda row: row.name, data=plain)
    return 0


def act_rm(options: TenantsOptions, shell: Shell) -> int:
    async def each(fabric: Fabric) -> None:
        for name in options.names:
            with calling(f"cannot remove tenant {name}", MISSING):
                request = tenants_pb2.DeleteTenantRequest(name=name, allow_missing=options.force)
                await fabric.tenants.DeleteTenant(request, timeout=CALL_S)
            shell.printer.write(f"{name}\n")

    shell.over(each)
    return 0


def _configure_bounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="TENANT", help="a tenant's name")
    for name, (metavar, _, text) in BOUNDS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=f"the most of: {text}; none takes the bound away")
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument(
        "--trusted", dest="trusted", action="store_true", default=None, help="may run host-kernel sandboxes"
    )
    trust.add_argument("--not-trusted", dest="trusted", action="store_false", default=None, help="may not")


def _configure_quota(parser: argparse.ArgumentParser) -> None:
    _configure_bounds(parser)
    add_output(parser)


def parse_bounds(namespace: argparse.Namespace) -> TenantOptions:
    given = {name: getattr(namespace, name.replace("-", "_")) for name in BOUNDS}
    bounds = {
        FIELDS[name]: None if text == NONE else BOUNDS[name][1](text)
        for name, text in given.items()
        if text is not None
    }
    return TenantOptions(namespace.name, bounds, namespace.trusted)


def _configure_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="TENANT", nargs="+", help="a tenant's name")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="TENANT", nargs="*", help="a tenant's name; one's own unless given")
    add_output(parser, ("json", "yaml"))


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    _configure_names(parser)
    parser.add_argument("-f", "--force", action="store_true", help="do not mind when it is not there")


CREATE = Command(
    words=("tenants", "create"),
    summary="record a tenant: from then on its certificates are served",
    configure=_configure_bounds,
    parse=parse_bounds,
    act=act_create,
    examples=("sandloom tenants create acme --sandboxes 20 --memory-max 16G",),
)
LS = Command(
    words=("tenants", "ls"),
    summary="list tenants with what they use of what they may",
    configure=add_output,
    parse=lambda ns: TenantsOptions(),
    act=act_ls,
    examples=("sandloom tenants ls",),
)
INSPECT = Command(
    words=("tenants", "inspect"),
    summary="show a tenant's quota and usage; a tenant may ask for its own",
    configure=_configure_inspect,
    parse=lambda ns: TenantsOptions(tuple(ns.names), ns.form),
    act=act_inspect,
    examples=("sandloom tenants inspect acme",),
)
QUOTA = Command(
    words=("tenants", "quota"),
    summary="change how much a tenant may have, and how far it is trusted",
    configure=_configure_quota,
    parse=parse_bounds,
    act=act_quota,
    examples=("sandloom tenants quota acme --memory-min 8G --images none", "sandloom tenants quota acme --trusted"),
)
RM = Command(
    words=("tenants", "rm"),
    summary="remove tenants that have nothing left; their certificates are refused from then on",
    configure=_configure_rm,
    parse=lambda ns: TenantsOptions(tuple(ns.names), force=ns.force),
    act=act_rm,
    examples=("sandloom tenants rm acme",),
)
