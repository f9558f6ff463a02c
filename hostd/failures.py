"""How hostd's and the store's errors look on the wire: one table, read once, at the edge (hostd/service.py).

The control plane relays reason and details as they are, so a reason set where the error arose is what a user sees.
"""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.api.status import Condition, Failure, FieldProblem
from hostd.errors import (
    AgentLost,
    CannotCheckpoint,
    CheckpointFailed,
    CheckpointUnusable,
    CommandFailed,
    ControlLost,
    HostdError,
    ImageMissing,
    InvalidSpec,
    KernelMissing,
    NotAdmitted,
    NotRunning,
    RegistryUnavailable,
    SandboxGone,
    ShortOfResources,
    StartFailed,
)
from sharedcache.errors import (
    BadArchive,
    CacheError,
    CorruptObject,
    LimitExceeded,
    NotAllowed,
    NotFound,
    OutOfSpace,
    StoreBusy,
)

CONDITIONS: Mapping[type[Exception], Condition] = {
    SandboxGone: Condition.NOT_FOUND,
    NotRunning: Condition.PRECONDITION,
    ImageMissing: Condition.NOT_FOUND,
    InvalidSpec: Condition.INVALID,
    ShortOfResources: Condition.EXHAUSTED,
    StartFailed: Condition.PRECONDITION,
    CommandFailed: Condition.PRECONDITION,
    NotAdmitted: Condition.DENIED,
    RegistryUnavailable: Condition.UNAVAILABLE,
    KernelMissing: Condition.PRECONDITION,
    AgentLost: Condition.UNAVAILABLE,
    ControlLost: Condition.UNAVAILABLE,
    CannotCheckpoint: Condition.PRECONDITION,
    CheckpointFailed: Condition.UNAVAILABLE,
    CheckpointUnusable: Condition.PRECONDITION,
    HostdError: Condition.INTERNAL,
    NotFound: Condition.NOT_FOUND,
    BadArchive: Condition.INVALID,
    LimitExceeded: Condition.INVALID,
    OutOfSpace: Condition.EXHAUSTED,
    NotAllowed: Condition.DENIED,
    StoreBusy: Condition.UNAVAILABLE,
    CorruptObject: Condition.DATA_LOSS,
    CacheError: Condition.INTERNAL,
    TimeoutError: Condition.DEADLINE,
    OSError: Condition.INTERNAL,
}
RETRY_S = {Condition.UNAVAILABLE: 1.0, Condition.EXHAUSTED: 5.0}


def failure_of(error: Exception, **details: object) -> Failure:
    """What a client is told of `error`; `details` are names and numbers on top of the error's own. Pure."""
    kind = next((kind for kind in type(error).__mro__ if kind in CONDITIONS), None)
    condition = Condition.INTERNAL if kind is None else CONDITIONS[kind]
    reason = error.reason if isinstance(error, HostdError) else type(error).__name__
    told = {name: str(value) for name, value in (*_details(error).items(), *details.items()) if str(value)}
    fields = (FieldProblem(told["field"], str(error)),) if "field" in told else ()
    return Failure(
        condition, reason, str(error) or type(error).__name__, tuple(told.items()), fields, RETRY_S.get(condition)
    )


def _details(error: Exception) -> dict[str, object]:
    if isinstance(error, LimitExceeded):
        return {"limit": error.limit, "allowed": error.allowed, "where": error.where}
    if isinstance(error, BadArchive):
        return {"where": error.where}
    if isinstance(error, CommandFailed):
        return {"exit_code": error.exit_code}
    return {}
