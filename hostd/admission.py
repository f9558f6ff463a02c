"""May one more sandbox start here now? Pure: numbers in, nothing or an error out.

The error says by how much it is too much, and not what the host has or has promised: it becomes the sandbox's status,
which its tenant reads. Operators read a host's sizes in `sandloom hosts -o wide`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hostd.errors import ShortOfResources
from hostd.spec import Resources

GUEST_OVERHEAD_MIB = 64
"""What a guest costs beside its RAM: measured 38-50 MiB private of QEMU under TCG, and page tables."""


@dataclass(frozen=True)
class HostNow:
    """What the host has: sizes in MiB."""

    memory_total_mib: int
    memory_available_mib: int
    memory_reserve_mib: int
    disk_free_mib: int
    disk_reserve_mib: int
    closed: str = ""  # why the broker admits nothing now


def with_max(resources: Resources) -> Resources:
    """A sandbox whose guest does not give memory back, as it counts: no less than all that it may have."""
    return replace(resources, memory_min_mib=resources.memory_max_mib, memory_mib=resources.memory_max_mib)


def reserved_mib(live: Iterable[Resources]) -> int:
    """What the guarantees of live sandboxes and their overhead add up to."""
    return sum(resources.memory_min_mib + GUEST_OVERHEAD_MIB for resources in live)


def admit(host: HostNow, live: Iterable[Resources], wanted: Resources, *, holds_mib: int = 0) -> None:
    """ShortOfResources, with what is asked and by how much it is too much, when `wanted` must not start. `holds_mib`:
    so much it holds as soon as it runs, for it goes on from where it was."""
    promised = reserved_mib(live)
    need = wanted.memory_min_mib + GUEST_OVERHEAD_MIB
    room = host.memory_total_mib - host.memory_reserve_mib - promised
    if need > room:
        raise ShortOfResources(
            f"short of memory: {need} MiB needed ({wanted.memory_min_mib} guaranteed + {GUEST_OVERHEAD_MIB} overhead),"
            f" {need - max(0, room)} MiB too many: stop a sandbox, or ask for a lower minimum",
            reason="ShortOfMemory",
        )
    if host.closed:
        text = f"nothing new is admitted now: {host.closed}; retry"
        raise ShortOfResources(text, reason="AdmissionClosed", passing=True)
    usable = host.memory_available_mib - host.memory_reserve_mib
    need = max(need, holds_mib + GUEST_OVERHEAD_MIB)
    if need > usable:
        raise ShortOfResources(
            f"short of memory: {need} MiB needed, {need - max(0, usable)} MiB more than is available now: free some on"
            " the host, or ask for a lower minimum",
            reason="ShortOfMemory",
            passing=True,
        )
    if host.disk_free_mib < host.disk_reserve_mib:
        raise ShortOfResources(
            f"short of disk: {host.disk_free_mib} MiB free, {host.disk_reserve_mib} MiB are kept in reserve:"
            " remove images or logs",
            reason="ShortOfDisk",
        )
