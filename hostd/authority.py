"""Who may call a host: the control plane, known by the SAN of its certificate; other hosts where it is for them
(HostPeers). Everything else is refused.

TLS has already checked that the certificate is of this fabric's CA; this is about whose it is. The check runs before
a handler sees the call, whatever service it belongs to, so that no RPC can be forgotten.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from controlplane.api.errors import IdentityError
from controlplane.api.identity import Role, peer_identity
from controlplane.api.status import Condition, Failure, abort

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    Base = grpc.aio.ServerInterceptor[Any, Any]
else:
    Base = grpc.aio.ServerInterceptor


PEERS = "/sandloom.v1.HostPeers/"
"""The methods that hosts call, and nobody else."""


def refusal(auth_context: Any, role: Role = Role.CONTROLPLANE) -> Failure | None:
    """Why the peer, who must be of `role`, may not call; None when it may. DENIED for another role, UNAUTHENTICATED
    for no identity."""
    try:
        identity = peer_identity(auth_context)
    except IdentityError as error:
        return Failure(Condition.UNAUTHENTICATED, "NoIdentity", str(error))
    if identity.role is role:
        return None
    if role is Role.HOST:
        return Failure(Condition.DENIED, "NotHost", f"{identity} may not call this; only other hosts may")
    message = f"{identity} may not call a host; only the control plane may: ask it instead"
    return Failure(Condition.DENIED, "NotControlPlane", message)


class OnlyControlPlane(Base):
    """Wraps every handler of a server with the check."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler behind the check. A method that nobody serves stays None (UNIMPLEMENTED)."""
        handler = await continuation(handler_call_details)
        role = Role.HOST if str(handler_call_details.method).startswith(PEERS) else Role.CONTROLPLANE
        return handler if handler is None else _guarded(handler, role)


def _guarded(handler: Handler, role: Role) -> Handler:
    if handler.unary_unary or handler.stream_unary:
        inner: Any = handler.unary_unary or handler.stream_unary

        async def single(request: Any, context: Context) -> Any:
            await _check(context, role)
            return await inner(request, context)

        build = grpc.unary_unary_rpc_method_handler if handler.unary_unary else grpc.stream_unary_rpc_method_handler
        return build(single, handler.request_deserializer, handler.response_serializer)

    streaming: Any = handler.unary_stream or handler.stream_stream

    async def many(request: Any, context: Context) -> Any:
        await _check(context, role)
        async for response in streaming(request, context):
            yield response

    build = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.stream_stream_rpc_method_handler
    return build(many, handler.request_deserializer, handler.response_serializer)


async def _check(context: Context, role: Role) -> None:
    failure = refusal(context.auth_context(), role)
    if failure is not None:
        await abort(context, failure)
