"""The connection to a control plane: which one, its stubs, and its errors as CliErrors."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from controlplane.api.calls import keep_status
from controlplane.api.channel import TlsFiles, connect
from controlplane.api.status import DETAILS_TRAILER, Condition, Failure, parse_error
from controlplane.api.v1 import (
    checkpoints_pb2_grpc,
    hosts_pb2_grpc,
    images_pb2_grpc,
    pools_pb2_grpc,
    sandboxes_pb2_grpc,
    tenants_pb2_grpc,
)
from controlplane.cli.contexts import NamedContext
from controlplane.cli.errors import CallFailed, CliError, Unreachable
from controlplane.cli.home import Context, Home, load_context

CALL_S = 30.0  # deadline of a call that should answer at once
PAGE_SIZE = 500
CLIENT_STEMS = ("operator", "tenant")  # whose certificates a --tls-dir may hold (controlplane.ca names the files)

T = TypeVar("T")
Remedies = Mapping[Condition, str]

REMEDIES: Remedies = {
    Condition.DENIED: "use a certificate whose role may do it (--tls-dir)",
    Condition.UNAUTHENTICATED: "use a certificate of this fabric's own CA (--tls-dir)",
    Condition.CONFLICT: "it changed meanwhile: try again",
    Condition.UNAVAILABLE: "try again; `sandloom hosts` shows what is up",
    Condition.DEADLINE: "try again; `sandloom hosts` shows what is up",
    Condition.EXHAUSTED: "ask for less, or free something (`sandloom hosts`, `sandloom ps`)",
    Condition.INTERNAL: "the daemons' logs say more (`sandloom dev status` names them)",
}
"""What to do next, where a command knows nothing better."""


@dataclass(frozen=True)
class Target:
    """What the command line says about the connection: `--address`, `--tls-dir` and `--tenant` win over `context`, and
    that over the context file of `home`."""

    home: Home
    address: str = ""
    tls_dir: Path | None = None
    context: NamedContext | None = None
    tenant: str = ""


@dataclass(frozen=True)
class Fabric:
    """The stubs of one open channel."""

    address: str
    sandboxes: sandboxes_pb2_grpc.SandboxesAsyncStub
    images: images_pb2_grpc.ImagesAsyncStub
    hosts: hosts_pb2_grpc.HostsAsyncStub
    pools: pools_pb2_grpc.PoolsAsyncStub
    checkpoints: checkpoints_pb2_grpc.CheckpointsAsyncStub
    tenants: tenants_pb2_grpc.TenantsAsyncStub


def resolve(target: Target) -> Context:
    """The context to use. NoFabric when neither flags nor a context file say; CliError names a missing TLS file."""
    if target.tls_dir is None:
        base = _kept(target)
        context = Context(target.address or base.address, base.tls_ca, base.tls_cert, base.tls_key)
    else:
        address = target.address or _kept(target).address
        folder, stem = target.tls_dir, stem_in(target.tls_dir)
        context = Context(address, folder / "ca.crt", folder / f"{stem}.crt", folder / f"{stem}.key")
    for path in (context.tls_ca, context.tls_cert, context.tls_key):
        if not os.access(path, os.R_OK):
            raise CliError("a TLS file cannot be read", str(path), "be root, or give --tls-dir")
    return context


def _kept(target: Target) -> Context:
    """What is kept in a file: the named context, else HOME's own fabric."""
    named = target.context
    if named is None:
        return load_context(target.home)
    return Context(named.address, Path(named.tls_ca), Path(named.tls_cert), Path(named.tls_key))


def stem_in(folder: Path) -> str:
    """Whose certificate a folder holds: an operator's, else a tenant's."""
    return next((stem for stem in CLIENT_STEMS if (folder / f"{stem}.crt").exists()), CLIENT_STEMS[0])


@asynccontextmanager
async def open_fabric(target: Target) -> AsyncIterator[Fabric]:
    """The stubs, and a channel that is closed afterwards. Nothing is sent before the first call."""
    context = resolve(target)
    tls = TlsFiles(context.tls_ca, context.tls_cert, context.tls_key)
    tenant = target.tenant or (target.context.tenant if target.context else "")
    async with connect(context.address, tls, tenant=tenant) as channel:
        yield Fabric(
            context.address,
            sandboxes_pb2_grpc.SandboxesStub(channel),
            images_pb2_grpc.ImagesStub(channel),
            hosts_pb2_grpc.HostsStub(channel),
            pools_pb2_grpc.PoolsStub(channel),
            checkpoints_pb2_grpc.CheckpointsStub(channel),
            tenants_pb2_grpc.TenantsStub(channel),
        )


@contextmanager
def calling(what: str, remedies: Remedies | None = None, flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns a failed RPC into CallFailed: `what` failed, and what to do by condition (else by REMEDIES). `flags`: by
    which option a user gives a field of the request."""
    try:
        yield
    except grpc.RpcError as error:
        raise translated(what, error, remedies or {}, flags or {}) from error


def translated(
    what: str, error: grpc.RpcError, remedies: Remedies, flags: Mapping[str, str] | None = None
) -> CallFailed:
    """The CallFailed of one RpcError; Unreachable when nothing of ours answered."""
    failure = in_flags(parse_error(error), flags or {})
    if failure.condition is Condition.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in failure.message:
        return CallFailed(
            "another fabric answers, or its certificate has run out",
            "what it shows is not signed by the ca.crt that is used here",
            "use this fabric's own files (--tls-dir, --context)", code="UNAUTHENTICATED", reason="ForeignCertificate",
        )  # fmt: skip
    if failure.condition is Condition.UNAVAILABLE and not _is_ours(error) and "Socket closed" in failure.message:
        return Unreachable(
            "the control plane closes the connection", "it is stopping, or does not take this certificate",
            "use a certificate of this fabric's own CA that has not run out (--tls-dir, --context)",
            code=failure.code.name, reason=failure.reason,
        )  # fmt: skip
    if failure.condition is Condition.UNAVAILABLE and not _is_ours(error):
        return Unreachable(
            "the control plane does not answer", _short(failure.message), "see `sandloom dev status`; "
            "`sandloom dev up` starts it", code=failure.code.name, reason=failure.reason,
        )  # fmt: skip
    remedy = remedies.get(failure.condition, REMEDIES.get(failure.condition, ""))
    if "`sandloom " in failure.message:
        remedy = ""  # it says so itself
    return CallFailed(what, explained(failure), remedy, code=failure.code.name, reason=failure.reason)


def in_flags(failure: Failure, flags: Mapping[str, str]) -> Failure:
    """The failure with the options in the place of the fields at fault; those without one stay as they are. Pure."""
    message = failure.message
    for problem in failure.fields:
        flag = flags.get(problem.field)
        if flag is not None and message == f"{problem.field}: {problem.problem}":
            message = f"{flag}: {problem.problem}"
    return replace(failure, message=message)


def _is_ours(error: grpc.RpcError) -> bool:
    trailers: Any = error.trailing_metadata() if isinstance(error, grpc.aio.AioRpcError) else None
    return any(key == DETAILS_TRAILER for key, _ in trailers or ())


def _short(message: str) -> str:
    """The part of a transport's message that is for people: grpc repeats itself."""
    return message.split("; RPC Error", 1)[0].removeprefix("failed to connect to all addresses; last error: ")[:200]


def explained(failure: Failure) -> str:
    """The message, then those details whose values it does not already say."""
    untold = [f"{name}={value}" for name, value in failure.details if value and value not in failure.message]
    return failure.message + (f" ({', '.join(untold)})" if untold else "")


def open_stream(method: Any) -> Any:
    """A call of a stream-stream method that is written to and read from by hand (the stubs know no such call)."""
    return keep_status(method())


async def every_page(fetch: Callable[[str], Awaitable[Any]], rows: Callable[[Any], list[T]]) -> list[T]:
    """All rows of a paged list: `fetch` a page by its token, `rows` takes them out of an answer."""
    found: list[T] = []
    token = ""
    while True:
        page = await fetch(token)
        found.extend(rows(page))
        token = page.next_page_token
        if not token:
            return found
