"""Who may call a host: only the control plane, known by the SAN of its certificate. Everything else is refused.

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


def refusal(auth_context: Any) -> Failure | None:
    """Why the peer may not call; None when it may. DENIED for another role, UNAUTHENTICATED for no identity."""
    try:
        identity = peer_identity(auth_context)
    except IdentityError as error:
        return Failure(Condition.UNAUTHENTICATED, "NoIdentity", str(error))
    if identity.role is Role.CONTROLPLANE:
        return None
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
        return handler if handler is None else _guarded(handler)


def _guarded(handler: Handler) -> Handler:
    if handler.unary_unary or handler.stream_unary:
        inner: Any = handler.unary_unary or handler.stream_unary

        async def single(request: Any, context: Context) -> Any:
            await _check(context)
            return await inner(request, context)

        build = grpc.unary_unary_rpc_method_handler if handler.unary_unary else grpc.stream_unary_rpc_method_handler
        return build(single, handler.request_deserializer, handler.response_serializer)

    streaming: Any = handler.unary_stream or handler.stream_stream

    async def many(request: Any, context: Context) -> Any:
        await _check(context)
        async for response in streaming(request, context):
            yield response

    build = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.stream_stream_rpc_method_handler
    return build(many, handler.request_deserializer, handler.response_serializer)


async def _check(context: Context) -> None:
    failure = refusal(context.auth_context())
    if failure is not None:
        await abort(context, failure)
