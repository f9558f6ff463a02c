"""Puts right one defect of grpc.aio's client streams: the server's status is lost when it comes while we are sending.

When a server ends a call early (no room on disk, say) while the client's next message is on its way, sending fails, and
grpc.aio then reports INTERNAL "Internal error from Core" instead of the status that the server sent
(grpc/aio/_call.py, StreamRequestMixin._write: set_internal_error comes before the status is read).
tests/controlplane/test_streams.py shows it.
"""

from __future__ import annotations

from typing import Any, TypeVar

Call = TypeVar("Call")
_INNER = "_cython_call"


class _StatusKept:
    """A call's inner half, for which a message that could not be sent says nothing about how the call ended."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def set_internal_error(self, _: str) -> None:
        """The server's own status is there or on its way: keep it."""


def keep_status(call: Call) -> Call:
    """The same call, which ends with the server's status even when that came while a message was being sent.

    Use it on what a stream-stream or stream-unary method returns, at once. Where grpc.aio has no such inner half (any
    more) the call is left as it is."""
    inner = getattr(call, _INNER, None)
    if inner is not None:
        setattr(call, _INNER, _StatusKept(inner))
    return call
