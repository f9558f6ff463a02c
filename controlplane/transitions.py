"""What each request and each report does to a sandbox's record. Pure: record in, record or error out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from controlplane import codec, lifecycle
from controlplane.api.errors import PolicyError
from controlplane.api.servicechange import changed
from controlplane.errors import Invalid, Precondition
from controlplane.model import DesiredState, Phase, Resize, ResizeState, Resources, Sandbox, SandboxStatus
from controlplane.requests import Report, ResizeWish, ServiceWish

STOPPED_EXIT_CODE = 137
"""What hostd, too, gives to a sandbox that was stopped before its command ran."""


def scheduled(sandbox: Sandbox, host: str, epoch: int, *, why: str = "") -> Sandbox:
    """Assigned to `host` from `epoch` on, which is higher than any before; `why` says what spoke for that host."""
    status = SandboxStatus(Phase.SCHEDULED, message=f"waiting for host {host} to begin{f'; {why}' if why else ''}")
    return replace(sandbox, host=host, epoch=epoch, status=status, leaving="", leaving_epoch=0)


def stopped(sandbox: Sandbox, grace_s: int, now_s: float) -> Sandbox:
    """Asked to end. Without a host it has ended already; an ended one stays as it is."""
    if sandbox.status.phase in lifecycle.ENDED or sandbox.desired is DesiredState.REMOVED:
        return sandbox
    asked = replace(sandbox, desired=DesiredState.STOPPED, stop_grace_s=grace_s)
    if sandbox.host:
        return asked
    status = replace(
        sandbox.status,
        phase=Phase.EXITED,
        reason="Stopped",
        message="stopped before it ran",
        exit_code=STOPPED_EXIT_CODE,
        finished_at_s=now_s,
    )
    return replace(asked, status=status)


def failed(sandbox: Sandbox, reason: str, message: str, epoch: int, now_s: float) -> Sandbox:
    """Given up on: its host no longer has it, and whatever that host still reports is of an older epoch."""
    status = replace(
        sandbox.status, phase=Phase.FAILED, reason=reason, message=message, exit_code=None, finished_at_s=now_s
    )
    return replace(sandbox, status=status, host="", epoch=epoch)


def replaced(sandbox: Sandbox, why: str, epoch: int) -> Sandbox:
    """Its host is gone: it begins anew wherever there is room, and whatever that host still reports is older."""
    status = SandboxStatus(reason="HostLost", message=f"begins anew: {why}")
    return replace(sandbox, status=status, host="", epoch=epoch, leaving="", leaving_epoch=0)


def moved(sandbox: Sandbox, epoch: int) -> Sandbox:
    """It begins anew elsewhere as soon as its host, which is there, has ended it."""
    status = SandboxStatus(reason="Moving", message=f"begins anew elsewhere once host {sandbox.host} has ended it")
    return replace(sandbox, status=status, host="", epoch=epoch, leaving=sandbox.host, leaving_epoch=sandbox.epoch)


def let_go(sandbox: Sandbox) -> Sandbox:
    """The host that it leaves has nothing of it any more."""
    return replace(sandbox, leaving="", leaving_epoch=0)


def facing(sandbox: Sandbox, host: str) -> Sandbox | None:
    """The sandbox as `host` is to see it: its own, or one that it has to end; None when it is neither."""
    if sandbox.host == host:
        return sandbox
    if sandbox.leaving == host:
        return replace(sandbox, host=host, epoch=sandbox.leaving_epoch, desired=DesiredState.STOPPED)
    return None


def served_otherwise(sandbox: Sandbox, wish: ServiceWish) -> Sandbox:
    """With its services changed. Precondition, which names what cannot change, or when it has ended."""
    if sandbox.status.phase in lifecycle.ENDED or sandbox.desired is not DesiredState.RUNNING:
        raise Precondition(
            "SandboxEnded", f"sandbox {sandbox.name} is {_state(sandbox)}: only a live one's services can change",
            sandbox=sandbox.name, phase=sandbox.status.phase.value,
        )  # fmt: skip
    try:
        services = changed(sandbox.spec.services, wish.change)
    except PolicyError as error:
        raise Precondition("ServiceFixed", f"sandbox {sandbox.name}: {error}", sandbox=sandbox.name) from error
    return replace(sandbox, spec=replace(sandbox.spec, services=services))


def resized(sandbox: Sandbox, wish: ResizeWish) -> Sandbox:
    """With its new target sizes. Precondition when it has ended or above its ceiling, Invalid when they contradict."""
    if sandbox.status.phase in lifecycle.ENDED or sandbox.desired is not DesiredState.RUNNING:
        raise Precondition(
            "SandboxEnded", f"sandbox {sandbox.name} is {_state(sandbox)}: only a live one can be resized",
            sandbox=sandbox.name, phase=sandbox.status.phase.value,
        )  # fmt: skip
    before = sandbox.spec.resources
    sizes = replace(
        before,
        memory_min_mib=wish.memory_min_mib or before.memory_min_mib,
        memory_mib=wish.memory_mib or before.memory_mib,
        cpu_milli=wish.cpu_milli or before.cpu_milli,
    )
    _require_within(sandbox, sizes)
    if sizes == before:
        return sandbox
    last = sandbox.status.resize
    progress = Resize(
        ResizeState.IN_PROGRESS,
        desired_memory_mib=sizes.memory_mib,
        allocated_memory_mib=last.allocated_memory_mib if last else 0,
        actual_memory_mib=last.actual_memory_mib if last else 0,
        cpu_milli=last.cpu_milli if last else 0,
        message="asked of the host",
        desired_cpu_milli=sizes.cpu_milli,
    )
    spec, status = replace(sandbox.spec, resources=sizes), replace(sandbox.status, resize=progress)
    return replace(sandbox, spec=spec, status=status)


def _require_within(sandbox: Sandbox, sizes: Resources) -> None:
    most_mib = sizes.memory_max_mib
    if max(sizes.memory_mib, sizes.memory_min_mib) > most_mib:
        raise Precondition(
            "AboveCeiling",
            f"{max(sizes.memory_mib, sizes.memory_min_mib)} MiB is above sandbox {sandbox.name}'s ceiling of"
            f" {most_mib} MiB, which is fixed when it starts: make a new one with a higher maximum",
            memory_max_mib=most_mib,
            limit="max",
        )  # fmt: skip
    if sizes.vcpus > sandbox.vcpus:
        raise Precondition(
            "AboveCeiling",
            f"{sizes.cpu_milli / 1000:g} CPUs are above the {sandbox.vcpus} that sandbox {sandbox.name} has room for",
            vcpus=sandbox.vcpus,
            limit="vcpus",
        )  # fmt: skip
    if sizes.memory_mib < sizes.memory_min_mib:
        raise Invalid(
            "memory_mib",
            f"{sizes.memory_mib} MiB is below the guaranteed {sizes.memory_min_mib} MiB: raise it, or guarantee less",
        )


def _state(sandbox: Sandbox) -> str:
    if sandbox.status.phase in lifecycle.ENDED or sandbox.desired is DesiredState.RUNNING:
        return sandbox.status.phase.name
    return f"{sandbox.status.phase.name} and to be {sandbox.desired.value}"


def require_current(sandbox: Sandbox, report: Report) -> None:
    """Precondition (StaleEpoch) unless the report is by the host and of the epoch that the sandbox has now."""
    if sandbox.host != report.host or sandbox.epoch != report.epoch:
        raise Precondition(
            "StaleEpoch",
            f"host {report.host} reports sandbox {sandbox.name} at epoch {report.epoch}; it is at epoch"
            f" {sandbox.epoch}{f' on {sandbox.host}' if sandbox.host else ' and on no host'}: let go of it",
            epoch=sandbox.epoch,
        )  # fmt: skip


def goes_back(sandbox: Sandbox, report: Report) -> bool:
    """Whether a host reports a live sandbox as less far than it was known: it lost its own record of it."""
    ended = sandbox.status.phase in lifecycle.ENDED
    return not ended and not lifecycle.allowed(sandbox.status.phase, report.status.phase)


def observed(sandbox: Sandbox, report: Report) -> Sandbox:
    """With what the host observed. Once ended, how it ended stays."""
    if sandbox.status.phase in lifecycle.ENDED:
        return sandbox
    status = replace(report.status, resize=_resize_seen(sandbox, report.status.resize))
    return replace(sandbox, status=status)


def _resize_seen(sandbox: Sandbox, seen: Resize | None) -> Resize | None:
    """The host's progress; a report from before the last request must not look like that request's end."""
    wanted = sandbox.spec.resources
    if seen is None:
        return sandbox.status.resize
    fulfilled = seen.desired_memory_mib == wanted.memory_mib and (
        seen.desired_cpu_milli == wanted.cpu_milli
        if seen.desired_cpu_milli
        else seen.state is not ResizeState.DONE or seen.cpu_milli == wanted.cpu_milli
    )
    if fulfilled:
        return seen
    return replace(seen, state=ResizeState.IN_PROGRESS, desired_memory_mib=wanted.memory_mib, message="", cause="")


def etag(sandbox: Sandbox) -> str:
    """Changes with what is asked of a sandbox, not with what its host reports."""
    asked = f"{sandbox.uid} {sandbox.desired.value} {sandbox.stop_grace_s} ".encode() + codec.encode(sandbox.spec)
    return hashlib.sha256(asked).hexdigest()[:16]
