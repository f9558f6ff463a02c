"""Calls of methods that a server does not have: UNIMPLEMENTED with an ErrorInfo, as every other error (status.py).

grpc answers such a call by itself, without details. `UNKNOWN_METHODS` is asked after every service, if it is registered
after them, and takes whatever is left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from controlplane.api.status import Condition, Failure, abort

if TYPE_CHECKING:
    Handler = grpc.GenericRpcHandler[Any, Any]
else:
    Handler = grpc.GenericRpcHandler


class _UnknownMethods(Handler):
    """See the module."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """A handler that fails; of streams, since it takes no message of either kind."""
        method = str(handler_call_details.method)

        async def refuse(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            text = f"this server has no method {method}: its version and the client's differ (`sandloom version`)"
            await abort(context, Failure(Condition.UNIMPLEMENTED, "MethodUnknown", text, (("method", method),)))

        return grpc.stream_stream_rpc_method_handler(refuse)


UNKNOWN_METHODS = _UnknownMethods()
