"""Errors that a service expects, as gRPC statuses: once, at the edge."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc.aio

from controlplane.api import status
from hostd.errors import HostdError
from hostd.failures import failure_of
from sharedcache.errors import CacheError

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

EXPECTED = (HostdError, CacheError, OSError)  # OSError: TimeoutError is one


@contextlib.asynccontextmanager
async def translated(context: Context) -> AsyncIterator[None]:
    """Errors that are expected leave as a status; others are bugs, which grpc reports and logs."""
    try:
        yield
    except EXPECTED as error:
        await status.abort(context, failure_of(error))
