"""What the control plane's operations raise, sorted by what the caller can do about it.

One root (`ControlPlaneError`, in controlplane.api so that hosts can share it). Every leaf here names a Condition;
the edge (gate.py) turns it into a gRPC status once, through the one table in api/status.py.
"""

from __future__ import annotations

from typing import ClassVar

from controlplane.api.errors import ControlPlaneError, IdentityError, TlsError
from controlplane.api.status import Condition, Failure, FieldProblem

__all__ = [
    "AlreadyExists",
    "BadState",
    "Compacted",
    "ConfigError",
    "Conflict",
    "ControlPlaneError",
    "Denied",
    "Exhausted",
    "HostsFull",
    "IdentityError",
    "Invalid",
    "NotFound",
    "OperationError",
    "Precondition",
    "Relayed",
    "StoreError",
    "TimedOut",
    "TlsError",
    "Unavailable",
]


class ConfigError(ControlPlaneError):
    """The configuration is not fit to start on: mend it and start again."""


class OperationError(ControlPlaneError):
    """Root of what an RPC can fail with; `details` are names and numbers for programs."""

    condition: ClassVar[Condition] = Condition.INTERNAL

    def __init__(self, reason: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.details = tuple((name, str(value)) for name, value in details.items())

    def failure(self) -> Failure:
        """The value that goes on the wire."""
        return Failure(self.condition, self.reason, str(self), self.details)

    def failure_for(self, *, operator: bool) -> Failure:
        """The same for who asked: see HostsFull."""
        return self.failure()


class Invalid(OperationError):
    """The request can never work as it is: `field` says where to mend it."""

    condition = Condition.INVALID

    def __init__(self, field: str, problem: str, *, reason: str = "InvalidArgument", **details: object) -> None:
        super().__init__(reason, f"{field}: {problem}", **details)
        self.fields = (FieldProblem(field, problem),)

    def failure(self) -> Failure:
        return Failure(self.condition, self.reason, str(self), self.details, self.fields)


class NotFound(OperationError):
    """There is no such thing (or none the caller may know of)."""

    condition = Condition.NOT_FOUND


class AlreadyExists(OperationError):
    """The name is taken: choose another one."""

    condition = Condition.ALREADY_EXISTS


class Precondition(OperationError):
    """The thing is in the wrong state for it: change that first."""

    condition = Condition.PRECONDITION


class Exhausted(OperationError):
    """Not enough of something; the numbers are in message and details."""

    condition = Condition.EXHAUSTED


class HostsFull(Exhausted):
    """No host has room. Hosts are not a tenant's: it is told the text and the numbers here, which name none and tell no
    host's sizes; an operator is told `whole` and `numbers`, too."""

    def __init__(self, message: str, whole: str, numbers: dict[str, int], **details: object) -> None:
        super().__init__("NoHostHasRoom", message, **details)
        self._whole, self._numbers = whole, tuple((name, str(value)) for name, value in numbers.items())

    def failure_for(self, *, operator: bool) -> Failure:
        """See the class."""
        if not operator:
            return self.failure()
        return Failure(self.condition, self.reason, self._whole, self.details + self._numbers)


class Denied(OperationError):
    """The caller's certificate does not allow it."""

    condition = Condition.DENIED


class Unavailable(OperationError):
    """Something that is needed does not answer: retry later."""

    condition = Condition.UNAVAILABLE

    def failure(self) -> Failure:
        return Failure(self.condition, self.reason, str(self), self.details, retry_after_s=1.0)


class TimedOut(OperationError):
    """It took longer than it may; its outcome is to be read again."""

    condition = Condition.DEADLINE


class Relayed(OperationError):
    """A host refused or failed; its failure goes to the caller as it is."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason, failure.message)
        self._failure = failure

    def failure(self) -> Failure:
        return self._failure


class StoreError(OperationError):
    """The store cannot do its work: disk full, file damaged. Look at the control plane's log."""

    condition = Condition.UNAVAILABLE


class Conflict(OperationError):
    """What was read has changed since: read again, then retry."""

    condition = Condition.CONFLICT


class Compacted(OperationError):
    """The revision asked for is no longer kept: list again and watch from there."""

    condition = Condition.OUT_OF_RANGE


class BadState(OperationError):
    """A record in the store cannot be read by this version: upgrade the control plane."""

    condition = Condition.DATA_LOSS
