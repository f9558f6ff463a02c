"""The edge every RPC passes: who calls, may they, how long may it take, and errors to statuses. Once, here.

    async with gate.admit(context) as caller: ...

Roles come from the peer's certificate, and access.py says which of them may call a method. An operator acts as tenant
`default` unless the call's metadata names another one (`sandloom-tenant`); nobody else may say who they are, and a
tenant's certificate counts only as long as the tenant is recorded. What leaves the block as an error becomes a gRPC
status with details (api/status.py); anything that is not one of ours is a bug, is logged with its trace and told as
INTERNAL.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from controlplane import access
from controlplane.api.errors import ControlPlaneError
from controlplane.api.identity import NAME_PATTERN, TENANT_HEADER, Identity, Role, peer_identity, peer_serial
from controlplane.api.status import HOST_REMOVED, Condition, Failure, abort, parse_error
from controlplane.errors import Denied, IdentityError, Invalid, NotFound, OperationError, Unavailable
from controlplane.tenancy import DEFAULT_TENANT

log = logging.getLogger("sandloom.controlplane.gate")

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

UNARY_DEADLINE_S = 30.0
"""How long a call that answers once may take when the client set no deadline of its own."""

GARBLED = object()
"""In the place of a request that cannot be read."""

_METHOD: ContextVar[str] = ContextVar("method", default="")
"""The full name of the method whose handler runs."""


@dataclass(frozen=True)
class Caller:
    """Who calls: the certificate's identity, and the tenant it acts for (empty for hosts)."""

    identity: Identity
    tenant: str

    @property
    def is_operator(self) -> bool:
        """Whether the caller sees the fabric as a whole."""
        return self.identity.role is Role.OPERATOR


class Gate:
    """One server's gate: services are registered at `guarding`. `close` ends every call that is open."""

    def __init__(
        self, is_tenant: Callable[[str], bool], is_host: Callable[[str, str], bool],
        *, unary_deadline_s: float = UNARY_DEADLINE_S,
    ) -> None:  # fmt: skip
        self._is_tenant, self._is_host, self.unary_deadline_s = is_tenant, is_host, unary_deadline_s
        self._sending: set[asyncio.Task[Any]] = set()
        self._open: set[asyncio.Task[Any]] = set()
        self._closing = False

    @asynccontextmanager
    async def admit(self, context: Context, *, stream: bool = False) -> AsyncIterator[Caller]:
        """The caller, if its role may call this method. A stream may last; other calls have a deadline in any case."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        operator = False
        try:
            caller = self._caller(context)
            operator = caller.is_operator
            if self._closing:
                raise _stopping()
            unbounded = stream or context.time_remaining() is not None
            async with asyncio.timeout(None if unbounded else self.unary_deadline_s):
                yield caller
        except (OperationError, ControlPlaneError) as error:
            await abort(context, failure_of(error, operator=operator))
        except grpc.aio.AioRpcError as error:
            await abort(context, parse_error(error))
        except DecodeError:  # of a later message of a stream
            await _refuse_garbled(context)
        except TimeoutError:
            await abort(context, late())
        except asyncio.CancelledError:
            if not task.cancelling():  # not this call was cancelled but one it made: grpc.aio cut that off
                await abort(context, _cut_off().failure())
            if not self._closing or context.cancelled():
                raise
            task.uncancel()
            await abort(context, _stopping().failure())
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            log.exception("a bug: %s", context.peer())
            text = f"{type(error).__name__} in the control plane: look at its log"
            await abort(context, Failure(Condition.INTERNAL, "InternalError", text))
        finally:
            self._open.discard(task)

    def guarding(self, server: grpc.aio.Server) -> Any:
        """Where services are to be registered instead of `server`, so that their calls pass here. An interceptor would
        make every handler anew for every call."""
        return _Guarded(server, self._guarded)

    def _guarded(self, method: str, handler: Handler) -> Handler:
        """Marks which streams are about to send: a task that is cancelled inside grpc's own code sends no status.
        Refuses requests that are no messages, which grpc's own code would tell of without details."""
        if inspect.iscoroutinefunction(handler.unary_unary):
            return grpc.unary_unary_rpc_method_handler(
                _read(handler.unary_unary, method), _parser(handler.request_deserializer), handler.response_serializer
            )
        inner: Any = handler.unary_stream or handler.stream_stream
        if not inspect.isasyncgenfunction(inner):
            return handler

        async def marked(request: Any, context: Context) -> AsyncIterator[Any]:
            _METHOD.set(method)
            task = asyncio.current_task()
            assert task is not None
            if request is GARBLED:
                await _refuse_garbled(context)
            async with aclosing(inner(request, context)) as messages:
                async for message in messages:
                    self._sending.add(task)
                    try:
                        yield message
                    finally:
                        self._sending.discard(task)
                    if self._closing:
                        task.cancel()

        if handler.unary_stream:
            parse = _parser(handler.request_deserializer)
            return grpc.unary_stream_rpc_method_handler(marked, parse, handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(marked, handler.request_deserializer, handler.response_serializer)

    def _caller(self, context: Context) -> Caller:
        identity, roles = peer_identity(context.auth_context()), access.roles_of(_METHOD.get())
        if identity.role not in roles:
            wanted = " or ".join(sorted(role.value for role in roles)) or "nobody: no role is named for this method"
            raise Denied("WrongRole", f"{identity} may not do this: it takes a certificate of the role {wanted}")
        asked = [str(value) for key, value in context.invocation_metadata() or () if key == TENANT_HEADER]
        if identity.role is Role.TENANT:
            if asked and asked != [identity.name]:
                raise Denied("WrongTenant", f"{identity} may not act for tenant {asked[0]!r}")
            if not self._is_tenant(identity.name):
                raise Denied("TenantUnknown", f"{identity} is not recorded (any more): ask an operator")
            return Caller(identity, identity.name)
        if identity.role is Role.HOST:
            self.require_host(context)
        if identity.role is not Role.OPERATOR:
            return Caller(identity, "")
        tenant = asked[0] if asked else DEFAULT_TENANT
        if not NAME_PATTERN.fullmatch(tenant):
            raise Invalid(TENANT_HEADER, f"{tenant!r} is not a tenant's name: it must match {NAME_PATTERN.pattern}")
        if not self._is_tenant(tenant):
            text = f"there is no tenant {tenant}: `sandloom tenants create {tenant}` makes it"
            raise NotFound("TenantNotFound", text, tenant=tenant)
        return Caller(identity, tenant)

    def require_host(self, context: Context) -> None:
        """Denied once the host that calls was removed, or its certificate replaced."""
        peer = context.auth_context()
        identity = peer_identity(peer)
        if not self._is_host(identity.name, peer_serial(peer)):
            text = f"{identity} was removed, or joined anew with another certificate: end what it runs, or join again"
            raise Denied(HOST_REMOVED, text, host=identity.name)

    async def close(self, grace_s: float) -> None:
        """Ends every open call, and every later one, with UNAVAILABLE (ServerStopping); returns when they have ended,
        after `grace_s` in any case."""
        self._closing = True
        ending = list(self._open)
        for task in ending:
            if task not in self._sending:  # else it ends as soon as its message is sent
                task.cancel()
        if ending:
            await asyncio.wait(ending, timeout=grace_s)


class _Guarded:
    """The part of a server that generated code registers services at."""

    def __init__(self, server: grpc.aio.Server, guarded: Callable[[str, Handler], Handler]) -> None:
        self._server, self._guarded = server, guarded

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: generated code names the same ones by service next."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """All methods of a service."""
        guarded = {name: self._guarded(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))


def _parser(parse: Any) -> Callable[[bytes], Any]:
    """`parse`, but GARBLED for bytes that are no message of its type."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return GARBLED

    return parsed


def _read(answer: Any, method: str) -> Any:
    """`answer`, for requests that could be read."""

    async def read(request: Any, context: Context) -> Any:
        _METHOD.set(method)
        if request is GARBLED:
            await _refuse_garbled(context)
        return await answer(request, context)

    return read


async def _refuse_garbled(context: Context) -> NoReturn:
    text = "the request is no message of this call's type: compare the client's protos with this server's (reflection)"
    await abort(context, Failure(Condition.INVALID, "InvalidArgument", text))


def _stopping() -> Unavailable:
    return Unavailable("ServerStopping", "this control plane is stopping: connect again")


def _cut_off() -> Unavailable:
    return Unavailable("CutOff", "a connection that this needs broke: read what became of it, then retry")


def late() -> Failure:
    """What is told of something that took too long."""
    text = "it took longer than it may: read what became of it, then retry"
    return Failure(Condition.DEADLINE, "DeadlineExceeded", text)


def failure_of(error: ControlPlaneError, *, operator: bool = False) -> Failure:
    """What goes on the wire for one of our errors; an operator is told of hosts."""
    if isinstance(error, OperationError):
        return error.failure_for(operator=operator)
    condition = Condition.UNAUTHENTICATED if isinstance(error, IdentityError) else Condition.INTERNAL
    return Failure(condition, type(error).__name__, str(error))
