"""`sandloom pool create|ls|inspect|resize|rm`: guests kept ready, so that a sandbox that fits one starts at once."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.api.status import Condition
from controlplane.api.v1 import pools_pb2, sandboxes_pb2
from controlplane.cli import sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, calling, every_page
from controlplane.cli.errors import UsageError
from controlplane.cli.output import Column, plain, render_json, render_yaml
from controlplane.cli.sizes import DEFAULT_MEMORY, MemoryRange

Pool = pools_pb2.Pool
MOST = 1000
MISSING = {Condition.NOT_FOUND: "`sandloom pool ls` lists those there are"}


POOL_CLASSES = {"guest-kernel": sandboxes_pb2.GUEST_KERNEL, "host-kernel": sandboxes_pb2.HOST_KERNEL}


@dataclass(frozen=True)
class CreateOptions:
    """What `pool create` was asked for."""

    name: str
    image: str
    size: int
    memory: MemoryRange = DEFAULT_MEMORY
    cpu_milli: int = 1000
    request_id: str = ""
    sandbox_class: str = "guest-kernel"


@dataclass(frozen=True)
class ResizeOptions:
    """Another size for a pool."""

    name: str
    size: int


@dataclass(frozen=True)
class PoolsOptions:
    """Pools by name."""

    names: tuple[str, ...] = ()
    form: str = "json"
    force: bool = False


def wanted(pool: Pool) -> int:
    """How many members the hosts are to keep; less than its size when not all fit."""
    return sum(host.wanted for host in pool.hosts)


def note(pool: Pool) -> str:
    """Why it is not whole, as far as somebody knows."""
    said = [f"{host.host}: {host.message}" for host in pool.hosts if host.message]
    return "; ".join(part for part in (pool.message, *said) if part)


def _colour(pool: Pool) -> str:
    return "green" if pool.ready >= pool.spec.size else "yellow"


def columns(now_s: float) -> tuple[Column[Pool], ...]:
    """The columns of `pool ls`."""
    return (
        Column("NAME", lambda row: row.name),
        Column("IMAGE", lambda row: row.spec.image),
        Column("READY", lambda row: f"{row.ready}/{row.spec.size}", right=True, colour=_colour),
        Column("MEMORY", lambda row: _memory(row.spec.resources)),
        Column("CPUS", lambda row: sizes.format_cpus(row.spec.resources.cpu_milli), right=True),
        Column("AGE", lambda row: sizes.format_age(now_s - row.created_at.ToNanoseconds() / 1e9), right=True),
        Column("NOTE", note),
        Column("HOSTS", lambda row: ",".join(f"{h.host}={h.ready}/{h.wanted}" for h in row.hosts), wide=True),
        Column("DIGEST", lambda row: row.spec.image_digest[:19], wide=True),
        Column("UID", lambda row: row.uid, wide=True),
    )


def _memory(resources: sandboxes_pb2.Resources) -> str:
    return f"{sizes.format_mib(resources.memory_min_mib)}:{sizes.format_mib(resources.memory_max_mib)}"


def parse_size(text: str) -> int:
    """How many members. UsageError."""
    if not (text.isascii() and text.isdigit()) or int(text) > MOST:
        raise UsageError("not a size of a pool", repr(text), f"give how many to keep ready, 0 to {MOST}")
    return int(text)


def parse_create(namespace: argparse.Namespace) -> CreateOptions:
    return CreateOptions(
        namespace.name,
        namespace.image,
        parse_size(namespace.size),
        sizes.parse_memory_range(namespace.memory) if namespace.memory else DEFAULT_MEMORY,
        sizes.parse_cpu_milli(namespace.cpus),
        namespace.request_id,
        namespace.sandbox_class,
    )


def act_create(options: CreateOptions, shell: Shell) -> int:
    pool = shell.over(lambda fabric: _create(fabric, options))
    _print(pool, shell)
    if pool.message:
        shell.say(f"sandloom: note: {pool.message}")
    return 0


async def _create(fabric: Fabric, options: CreateOptions) -> Pool:
    resources = sandboxes_pb2.Resources(
        memory_min_mib=options.memory.min_mib, memory_max_mib=options.memory.max_mib, cpu_milli=options.cpu_milli
    )
    spec = pools_pb2.PoolSpec(image=options.image, resources=resources, size=options.size)
    setattr(spec, "class", POOL_CLASSES[options.sandbox_class])
    request_id = options.request_id or str(uuid.uuid4())
    remedies = {
        Condition.NOT_FOUND: "`sandloom image ls` lists images",
        Condition.ALREADY_EXISTS: "choose another name, or `sandloom pool resize` it",
    }
    with calling(f"cannot create pool {options.name}", remedies):
        request = pools_pb2.CreatePoolRequest(name=options.name, spec=spec, request_id=request_id)
        return await fabric.pools.CreatePool(request, timeout=CALL_S)


async def list_pools(fabric: Fabric) -> list[Pool]:
    """Every pool, by name."""

    async def page(token: str) -> pools_pb2.ListPoolsResponse:
        with calling("cannot list the pools"):
            request = pools_pb2.ListPoolsRequest(page_size=PAGE_SIZE, page_token=token)
            return await fabric.pools.ListPools(request, timeout=CALL_S)

    return await every_page(page, lambda answer: list(answer.pools))


def act_ls(options: PoolsOptions, shell: Shell) -> int:
    rows = shell.over(list_pools)
    shell.printer.listing(rows, columns(shell.now_s()), name=lambda row: row.name, data=plain)
    if not rows and shell.printer.form in ("table", "wide"):
        shell.say("none yet; `sandloom pool create NAME --image IMAGE --size N` makes one")
    return 0


async def _get(fabric: Fabric, names: Sequence[str]) -> list[Pool]:
    found: list[Pool] = []
    for name in names:
        with calling(f"no pool {name}", MISSING):
            found.append(await fabric.pools.GetPool(pools_pb2.GetPoolRequest(name=name), timeout=CALL_S))
    return found


def act_inspect(options: PoolsOptions, shell: Shell) -> int:
    values = [plain(pool) for pool in shell.over(lambda fabric: _get(fabric, options.names))]
    render = render_yaml if options.form == "yaml" else render_json
    shell.printer.write(render(values[0] if len(values) == 1 else values))
    return 0


def act_resize(options: ResizeOptions, shell: Shell) -> int:
    _print(shell.over(lambda fabric: _resize(fabric, options)), shell)
    return 0


async def _resize(fabric: Fabric, options: ResizeOptions) -> Pool:
    with calling(f"cannot resize pool {options.name}", MISSING):
        request = pools_pb2.ResizePoolRequest(name=options.name, size=options.size)
        return await fabric.pools.ResizePool(request, timeout=CALL_S)


def act_rm(options: PoolsOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _rm(fabric, options, shell))


async def _rm(fabric: Fabric, options: PoolsOptions, shell: Shell) -> int:
    for name in options.names:
        with calling(f"cannot remove pool {name}", MISSING):
            request = pools_pb2.DeletePoolRequest(name=name, allow_missing=options.force)
            await fabric.pools.DeletePool(request, timeout=CALL_S)
        shell.printer.write(f"{name}\n")
    return 0


def _print(pool: Pool, shell: Shell) -> None:
    if shell.printer.form in ("json", "yaml"):
        shell.printer.write((render_json if shell.printer.form == "json" else render_yaml)(plain(pool)))
    elif shell.printer.form == "name":
        shell.printer.write(f"{pool.name}\n")
    else:
        shell.printer.write(f"{pool.name}: {pool.ready} of {pool.spec.size} ready\n")


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what to call the pool")
    parser.add_argument("--image", required=True, metavar="IMAGE", help="whose sandboxes are to start at once")
    parser.add_argument("--size", required=True, metavar="N", help="how many guests to keep ready in all")
    parser.add_argument(
        "--class", dest="sandbox_class", choices=tuple(POOL_CLASSES), default="guest-kernel", help="of its sandboxes"
    )
    parser.add_argument("--memory", metavar="MIN:MAX", help="of a member, 256M:1G unless given")
    parser.add_argument("--cpus", metavar="N", default="1", help="of a member, 1 unless given")
    parser.add_argument("--request-id", default="", metavar="ID", help="the same ID again gives the same pool")
    add_output(parser)


def _configure_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="POOL", nargs="+", help="a pool's name")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    _configure_names(parser)
    add_output(parser, ("json", "yaml"))


def _configure_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="POOL", help="a pool's name")
    parser.add_argument("size", metavar="SIZE", help="how many guests to keep ready in all; 0 keeps none")
    add_output(parser)


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    _configure_names(parser)
    parser.add_argument("-f", "--force", action="store_true", help="do not mind when it is not there")


CREATE = Command(
    words=("pool", "create"),
    summary="keep guests of an image warm, ready to become sandboxes",
    description="Keeps guests cloned, prepared and paused. A sandbox of the same image, CPUs and memory bucket then "
    "starts by claiming one, in milliseconds; the pool fills up again behind it.",
    configure=_configure_create,
    parse=parse_create,
    act=act_create,
    examples=(
        "sandloom pool create web --image debian --size 2",
        "sandloom pool create jobs --image debian --memory 512M:2G --cpus 2 --size 4",
    ),
)
LS = Command(
    words=("pool", "ls"),
    summary="list warm pools and how full they are",
    configure=add_output,
    parse=lambda ns: PoolsOptions(),
    act=act_ls,
    examples=("sandloom pool ls", "sandloom pool ls -o wide"),
)
INSPECT = Command(
    words=("pool", "inspect"),
    summary="show a warm pool, host by host",
    configure=_configure_inspect,
    parse=lambda ns: PoolsOptions(tuple(ns.names), ns.form),
    act=act_inspect,
    examples=("sandloom pool inspect web",),
    operand="pool",
)
RESIZE = Command(
    words=("pool", "resize"),
    summary="change how many guests a warm pool keeps ready",
    configure=_configure_resize,
    parse=lambda ns: ResizeOptions(ns.name, parse_size(ns.size)),
    act=act_resize,
    examples=("sandloom pool resize web 4",),
    operand="pool",
)
RM = Command(
    words=("pool", "rm"),
    summary="remove warm pools; sandboxes that came from them run on",
    configure=_configure_rm,
    parse=lambda ns: PoolsOptions(tuple(ns.names), force=ns.force),
    act=act_rm,
    examples=("sandloom pool rm web",),
    operand="pool",
)
