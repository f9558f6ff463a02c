"""Errors on the wire, both ends: one table of condition <-> gRPC code, and google.rpc details.

Every error carries a `google.rpc.Status` in the trailer `grpc-status-details-bin` with an ErrorInfo (domain
"sandloom", a stable CamelCase reason, numbers as metadata), a BadRequest where fields are at fault and a RetryInfo
where trying again may help. A reader that finds no such trailer (the transport failed) still gets a Failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

DOMAIN = "sandloom"
DETAILS_TRAILER = "grpc-status-details-bin"
HOST_REMOVED = "HostRemoved"
"""The reason of a refusal that tells a host that it is none any more."""

MAX_MESSAGE_CHARS = 2048
MAX_DETAILS = 32
MAX_DETAIL_CHARS = 256
"""Bounds that keep the trailers below the 8 KiB that HTTP/2 peers accept by default."""


class Condition(Enum):
    """What kind of trouble it is, by what the caller can do about it."""

    INVALID = "invalid"  # send something else
    NOT_FOUND = "not found"
    ALREADY_EXISTS = "already exists"
    PRECONDITION = "precondition"  # change the state of things first
    CONFLICT = "conflict"  # read again, then retry
    EXHAUSTED = "exhausted"  # free something or ask for less
    OUT_OF_RANGE = "out of range"  # compacted: list again
    DENIED = "denied"
    UNAUTHENTICATED = "unauthenticated"
    UNAVAILABLE = "unavailable"  # retry later
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    UNIMPLEMENTED = "unimplemented"
    DATA_LOSS = "data loss"
    INTERNAL = "internal"  # a bug
    UNKNOWN = "unknown"


CODES: Mapping[Condition, grpc.StatusCode] = {
    Condition.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Condition.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Condition.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Condition.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Condition.CONFLICT: grpc.StatusCode.ABORTED,
    Condition.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Condition.OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Condition.DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Condition.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Condition.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Condition.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Condition.CANCELLED: grpc.StatusCode.CANCELLED,
    Condition.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Condition.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Condition.INTERNAL: grpc.StatusCode.INTERNAL,
    Condition.UNKNOWN: grpc.StatusCode.UNKNOWN,
}
CONDITIONS: Mapping[grpc.StatusCode, Condition] = {code: condition for condition, code in CODES.items()}


@dataclass(frozen=True)
class FieldProblem:
    """A request's field and what is wrong with it."""

    field: str
    problem: str


@dataclass(frozen=True)
class Failure:
    """An error as both ends know it. `reason` is a stable CamelCase word; `details` are names and numbers."""

    condition: Condition
    reason: str
    message: str
    details: tuple[tuple[str, str], ...] = ()
    fields: tuple[FieldProblem, ...] = ()
    retry_after_s: float | None = None

    def detail(self, name: str, default: str = "") -> str:
        """The value of one detail."""
        return dict(self.details).get(name, default)

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code of `condition`."""
        return CODES[self.condition]


def to_status(failure: Failure) -> status_pb2.Status:
    """The google.rpc.Status of a failure, bounded in size."""
    info = error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN)
    for name, value in failure.details[:MAX_DETAILS]:
        info.metadata[name[:MAX_DETAIL_CHARS]] = value[:MAX_DETAIL_CHARS]
    messages: list[Any] = [info]
    if failure.fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=problem.field[:MAX_DETAIL_CHARS], description=problem.problem[:MAX_DETAIL_CHARS]
            )
            for problem in failure.fields[:8]
        ]
        messages.append(error_details_pb2.BadRequest(field_violations=violations))
    if failure.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(failure.retry_after_s * 1e9))
        messages.append(retry)
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message[:MAX_MESSAGE_CHARS])
    for message in messages:
        packed = AnyMessage()
        packed.Pack(message)
        status.details.append(packed)
    return status


async def abort(context: Context, failure: Failure) -> NoReturn:
    """Ends the RPC with `failure`. Raises grpc's AbortError, which the handler must let through."""
    status = to_status(failure)
    await context.abort(failure.code, status.message, ((DETAILS_TRAILER, status.SerializeToString()),))
    raise AssertionError("abort returned")


def from_status(status: status_pb2.Status) -> Failure:
    """The failure that a google.rpc.Status states."""
    codes = {code.value[0]: code for code in grpc.StatusCode}
    condition = CONDITIONS.get(codes.get(status.code, grpc.StatusCode.UNKNOWN), Condition.UNKNOWN)
    reason, details = "", ()
    fields: tuple[FieldProblem, ...] = ()
    retry_after_s: float | None = None
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for packed in status.details:
        if packed.Is(info.DESCRIPTOR) and packed.Unpack(info):
            reason, details = info.reason, tuple(sorted(info.metadata.items()))
        elif packed.Is(bad.DESCRIPTOR) and packed.Unpack(bad):
            fields = tuple(FieldProblem(v.field, v.description) for v in bad.field_violations)
        elif packed.Is(retry.DESCRIPTOR) and packed.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Failure(condition, reason or _word(condition), status.message, details, fields, retry_after_s)


def parse_error(error: grpc.RpcError) -> Failure:
    """What a client's RPC failed with. Never raises: without our trailer, code and message of the transport."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return Failure(Condition.UNKNOWN, "Unknown", str(error))
    trailers: Iterable[tuple[str, str | bytes]] = cast(Any, error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAILS_TRAILER:
            try:
                return from_status(status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode()))
            except DecodeError:
                break
    condition = CONDITIONS.get(error.code(), Condition.UNKNOWN)
    return Failure(condition, _word(condition), error.details() or str(error.code()))


def _word(condition: Condition) -> str:
    return "".join(part.capitalize() for part in condition.value.split())
