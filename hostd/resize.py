"""Resize as a contract: what was desired, what this host allocated, what the engine actually has. Pure values.

One table of states, as Kubernetes has them for pods (KEP-1287): IN_PROGRESS from the request on; DEFERRED while the
host has no room or the guest does not follow, tried again by itself; INFEASIBLE when no waiting can help, with the
limit that it meets (on a host that has become smaller, also what was DONE before); ERROR when the engine refuses,
tried again with a growing pause; DONE when desired is there.
`allocated` may be above desired: a sandbox that shows that it needs more gets more, up to its ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from hostd.errors import HostdError
from hostd.memory.values import Resized, ShortfallCause
from hostd.spec import BLOCK_MIB, MemoryShape, Resources

RESIZE_DEADLINE_S = 30.0
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0


class ResizeState(Enum):
    """How far the last resize got."""

    DONE = "done"
    IN_PROGRESS = "in progress"
    DEFERRED = "deferred"  # not now; it is tried again, and then it is DONE
    INFEASIBLE = "infeasible"  # can never be: `cause` is the limit
    ERROR = "error"  # the engine refused; it is tried again


TRANSITIONS: dict[ResizeState, frozenset[ResizeState]] = {
    ResizeState.DONE: frozenset(
        {ResizeState.IN_PROGRESS, ResizeState.DEFERRED, ResizeState.INFEASIBLE, ResizeState.ERROR}
    ),
    ResizeState.IN_PROGRESS: frozenset(
        {ResizeState.DONE, ResizeState.DEFERRED, ResizeState.INFEASIBLE, ResizeState.ERROR}
    ),
    ResizeState.DEFERRED: frozenset(
        {ResizeState.IN_PROGRESS, ResizeState.DONE, ResizeState.INFEASIBLE, ResizeState.ERROR}
    ),
    ResizeState.ERROR: frozenset(
        {ResizeState.IN_PROGRESS, ResizeState.DONE, ResizeState.DEFERRED, ResizeState.INFEASIBLE}
    ),
    ResizeState.INFEASIBLE: frozenset({ResizeState.IN_PROGRESS}),  # only another request
}


class Cause(Enum):
    """What stands between desired and actual; of INFEASIBLE the limit."""

    NONE = ""
    HOST_ROOM = "host-room"  # others hold what is missing; it is given as soon as it is free
    SQUEEZED = "squeezed"  # the host is short, and others come first
    GUEST = "guest"  # the guest uses what it should give back, or does not follow
    CONTROL = "control"  # the engine refused
    MAX = "max"
    VCPUS = "vcpus"
    HOST_CAPACITY = "host-capacity"


@dataclass(frozen=True)
class Grant:
    """What the host lets a sandbox have now, why not more, and how that came about, with numbers."""

    memory_mib: int
    cause: Cause = Cause.NONE
    message: str = ""


@dataclass(frozen=True)
class ResizeProgress:
    """The contract's three sizes, and what stands between them. MiB, and thousandths of a CPU."""

    state: ResizeState
    desired_mib: int
    allocated_mib: int
    actual_mib: int
    cpu_milli: int
    message: str = ""
    desired_cpu_milli: int = 0
    cause: Cause = Cause.NONE
    deadline_s: float = 0.0  # seconds since 1970; 0: none was set
    attempts: int = 0

    @property
    def shortfall_mib(self) -> int:
        """By how much desired is missed: too little, or, where it was to shrink, too much."""
        if self.state is ResizeState.DONE:
            return 0
        too_little_mib = self.desired_mib - min(self.allocated_mib, self.actual_mib)
        return too_little_mib if too_little_mib > 0 else max(0, self.actual_mib - self.allocated_mib)

    def covers(self, wanted: Resources) -> bool:
        """Whether it tells of this request, not of an earlier one."""
        return (self.desired_mib, self.desired_cpu_milli) == (wanted.memory_mib, wanted.cpu_milli)


def move(now: ResizeProgress | None, to: ResizeProgress) -> ResizeProgress:
    """`to`, if the table allows it after `now`; another request may always begin. HostdError: a bug."""
    same_request = now is not None and (now.desired_mib, now.desired_cpu_milli) == (
        to.desired_mib, to.desired_cpu_milli,
    )  # fmt: skip
    if now is not None and same_request and to.state is not now.state and to.state not in TRANSITIONS[now.state]:
        raise HostdError(f"a resize cannot go from {now.state.value} to {to.state.value}", reason="BadTransition")
    return to


def begun(wanted: Resources, before: ResizeProgress | None, allocated_mib: int, now_s: float) -> ResizeProgress:
    """A request that has just come; one that is known already (hostd was restarted) keeps its deadline and sizes."""
    if before is not None and before.covers(wanted) and before.state is not ResizeState.INFEASIBLE:
        return replace(before, allocated_mib=allocated_mib)
    return ResizeProgress(
        ResizeState.IN_PROGRESS,
        wanted.memory_mib,
        allocated_mib,
        before.actual_mib if before else 0,
        before.cpu_milli if before else 0,
        desired_cpu_milli=wanted.cpu_milli,
        deadline_s=now_s + RESIZE_DEADLINE_S,
    )


def judge(begun: ResizeProgress, shape: MemoryShape, grant: Grant, resized: Resized, now_s: float) -> ResizeProgress:
    """Where a resize stands when the engine came as far as `resized` with what is granted."""
    granted_mib = shape.base_mib + shape.requested_mib(grant.memory_mib)
    desired_mib = shape.base_mib + shape.requested_mib(begun.desired_mib)
    seen = replace(
        begun, allocated_mib=granted_mib, actual_mib=resized.actual_mib, cpu_milli=begun.desired_cpu_milli, attempts=0
    )
    if granted_mib < desired_mib:
        return replace(seen, state=ResizeState.DEFERRED, cause=grant.cause, message=grant.message)
    missing_mib = abs(resized.actual_mib - granted_mib)
    enough = granted_mib > desired_mib and resized.actual_mib > desired_mib - BLOCK_MIB
    if missing_mib < BLOCK_MIB or enough:
        return replace(seen, state=ResizeState.DONE, cause=Cause.NONE, message=grant.message)
    if now_s < begun.deadline_s:
        return replace(seen, state=ResizeState.IN_PROGRESS, cause=Cause.NONE, message="")
    direction = "gave back" if resized.actual_mib > granted_mib else "took"
    text = f"the guest {direction} only part of it in {RESIZE_DEADLINE_S:.0f} s: {missing_mib} MiB are missing"
    why = f" ({resized.message})" if resized.message else ""
    cause = Cause.HOST_ROOM if resized.cause is ShortfallCause.HOST_FULL else Cause.GUEST
    return replace(seen, state=ResizeState.DEFERRED, cause=cause, message=text + why)


def refused(begun: ResizeProgress, grant: Grant, error: HostdError) -> ResizeProgress:
    """Where a resize stands when the engine did not take it: once more."""
    return replace(
        begun,
        state=ResizeState.ERROR,
        allocated_mib=grant.memory_mib,
        cause=Cause.CONTROL,
        message=f"{error}; tried again",
        attempts=begun.attempts + 1,
    )


def retry_s(attempts: int) -> float:
    """How long to wait after so many refusals."""
    return min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(attempts - 1, 10))


def infeasible(ceiling_mib: int, vcpus: int, most_mib: int, wanted: Resources) -> tuple[Cause, str]:
    """The limit by which `wanted` can never be, and why; NONE when it can. `most_mib` is what the host has for one."""
    if wanted.memory_mib >= ceiling_mib + BLOCK_MIB:  # a ceiling is rounded down to a block
        text = f"{wanted.memory_mib} MiB is above the ceiling of {ceiling_mib} MiB it was started with"
        return Cause.MAX, f"{text}: make a new one with a higher maximum"
    if wanted.vcpus > vcpus:
        return Cause.VCPUS, f"{wanted.cpu_milli / 1000:g} CPUs are above the {vcpus} vCPUs it was started with"
    if wanted.memory_mib > most_mib:
        text = f"{wanted.memory_mib} MiB is more than this host has for sandboxes at all, {most_mib} MiB"
        return Cause.HOST_CAPACITY, f"{text}: ask for less, or give the host more"
    return Cause.NONE, ""
