"""What is said of an engine's elastic memory: what it has, how far a resize came and why no further, what a guest tells
by itself. Pure values, in MiB unless a name says otherwise; hostd/drivers/contract.py is where they are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class MemorySignals:
    """What a kernel says of its memory, for who decides how much it gets. Claims of a guest, where it is a guest's.

    Totals (`_us`, `refaults`, `oom_kills`) count from the engine's start and never fall: take differences. 0 where
    the engine cannot tell."""

    psi_some_us: int = 0  # how long some task stood still for want of memory
    psi_full_us: int = 0  # how long all of them did
    refaults: int = 0  # pages read again soon after they were reclaimed
    oom_kills: int = 0
    active_mib: int = 0  # used lately
    inactive_mib: int = 0  # not used lately: what a squeeze takes first
    swapped_mib: int = 0


@dataclass(frozen=True)
class MemoryNow:
    """What the engine has: `actual_mib` is what its kernel can use, plugged and base less what the balloon holds;
    `available_mib` what that kernel calls available."""

    actual_mib: int
    available_mib: int
    plugged_mib: int = 0  # of the elastic region, ballooned or not
    ballooned_mib: int = 0  # taken from the guest; the host has it back, unless `punchable` is false
    punchable: bool = True  # false: balloon pages of this engine (a fork's) give the host nothing back
    held_mib: int = 0  # of the elastic region, as the host counts it; 0 where it cannot
    signals: MemorySignals = MemorySignals()


class Mechanism(Enum):
    """What moves memory between an engine and its host."""

    BALLOON = "balloon"
    VIRTIO_MEM = "virtio-mem"
    SWAP = "swap"  # cold pages of the guest, to make room for the others
    CGROUP = "cgroup"  # an OCI sandbox's limit


@dataclass(frozen=True)
class Moved:
    """What one mechanism did in a resize: `mib` > 0 went to the engine, < 0 came back from it."""

    mechanism: Mechanism
    mib: int
    took_s: float


class ShortfallCause(Enum):
    """Why an engine has not what was asked for. What its owner can do differs."""

    FOLLOWING = "it is still following"  # before the deadline
    IN_USE = "it uses the memory"  # it answers, and cannot free more: give it time, or ask for less
    UNCOOPERATIVE = "it does not follow"  # silent, or its word and the host's count differ: trust it no more
    HOST_FULL = "the host has no memory for it"
    CEILING = "it is above what it was started with"


@dataclass(frozen=True)
class Resized:
    """How far a resize came. `shortfall_mib` is how far `actual_mib` is from the target, in either direction; with it
    comes its `cause`, and `message` for people."""

    actual_mib: int
    shortfall_mib: int
    cause: ShortfallCause | None
    moved: tuple[Moved, ...]
    vcpus: int  # online now
    message: str = ""


class MemoryEventKind(Enum):
    """What a guest tells of its memory without being asked."""

    PRESSURE = "pressure"  # its processes stall; it gave itself back what the balloon held, and wants `wants_mib` more
    OOM_KILL = "oom kill"  # its kernel killed a process for want of memory


@dataclass(frozen=True)
class MemoryEvent:
    """Claims of a guest, with the numbers it saw when it told."""

    kind: MemoryEventKind
    available_mib: int
    total_mib: int
    gave_back_mib: int = 0  # of the balloon, by itself: ballooned memory is the less for it
    wants_mib: int = 0  # more than it has now, to go on without stalls
    oom_kills: int = 0  # since its start
    stalled_us: int = 0  # of psi_full, since its start
