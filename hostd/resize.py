"""Resize as a contract: what was desired, what this host allocated, what the guest actually has. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hostd.spec import BLOCK_MIB, MemoryShape, Resources

RESIZE_DEADLINE_S = 30.0


class ResizeState(Enum):
    """How far the last resize got."""

    DONE = "done"
    IN_PROGRESS = "in progress"
    DEFERRED = "deferred"  # the guest did not follow in time; it may yet, and then it is DONE
    INFEASIBLE = "infeasible"  # can never be: above the ceiling the guest was started with
    ERROR = "error"


@dataclass(frozen=True)
class ResizeProgress:
    """The contract's three sizes, and what stands between them. MiB, and thousandths of a CPU."""

    state: ResizeState
    desired_mib: int
    allocated_mib: int
    actual_mib: int
    cpu_milli: int
    message: str = ""


def judge(
    resources: Resources, shape: MemoryShape, actual_mib: int, waited_s: float, deadline_s: float = RESIZE_DEADLINE_S
) -> ResizeProgress:
    """Where a resize to `resources` stands when the guest has `actual_mib` after `waited_s`."""
    allocated = shape.base_mib + shape.requested_mib(resources.memory_mib)
    sizes = (resources.memory_mib, allocated, actual_mib, resources.cpu_milli)
    if abs(actual_mib - allocated) < BLOCK_MIB:
        return ResizeProgress(ResizeState.DONE, *sizes)
    if waited_s < deadline_s:
        return ResizeProgress(ResizeState.IN_PROGRESS, *sizes)
    direction = "gave back" if actual_mib > allocated else "took"
    return ResizeProgress(
        ResizeState.DEFERRED,
        *sizes,
        f"after {waited_s:.0f} s the guest {direction} only part of it: {abs(actual_mib - allocated)} MiB are missing",
    )


def infeasible(ceiling_mib: int, vcpus: int, wanted: Resources) -> str:
    """Why a guest that can have `ceiling_mib` and `vcpus` at most can never reach `wanted`; empty when it can."""
    if wanted.memory_mib >= ceiling_mib + BLOCK_MIB:  # a ceiling is rounded down to a block
        return f"{wanted.memory_mib} MiB is above the ceiling of {ceiling_mib} MiB it was started with"
    if wanted.vcpus > vcpus:
        return f"{wanted.cpu_milli / 1000:g} CPUs are above the {vcpus} vCPUs it was started with"
    return ""
