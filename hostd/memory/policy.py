"""How a resize is carried out: which mechanism moves how much next. Pure: values in, a decision out.

Growing: the balloon gives back first (nothing has to be plugged, and the guest has the pages in milliseconds), then
virtio-mem plugs the rest. Shrinking: the balloon takes first (the host has the memory in milliseconds), what it cannot
get virtio-mem unplugs by moving pages, what the guest cannot free is swapped out by the host where it can, else there
is nothing but waiting. Where the host cannot punch (a fork's memory is a private mapping) virtio-mem does all.

A kernel that clears each page it gives out (init_on_alloc, Debian's default) clears the balloon's, too, which under TCG
is slower than unplugging: there the balloon takes no more than CLEARED_MOST_MIB.

Hysteresis: a difference below a block is none; and a guest that told of pressure a moment ago is not squeezed, so that
self-defence and squeeze do not fight each other. The guarantee is held whatever is asked.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hostd.memory.values import Mechanism, ShortfallCause
from hostd.spec import BLOCK_MIB

CALM_S = 10.0
"""How long after a guest told of pressure it is not squeezed."""

CLEARED_MOST_MIB = 64
"""What the balloon of a clearing kernel may hold: enough for a small growth to come at once."""

LIE_SLACK_MIB = 16
"""By how much the host's count of a guest's memory may pass the guest's own: pages on their way."""

IDLE_MIB = 96
"""A guest that keeps so much more available than it was asked for does not follow, rather than cannot."""


@dataclass(frozen=True)
class ElasticNow:
    """A guest's memory, MiB. `usable_mib` is the elastic part it may have at most, `held_mib` what the host counts of
    it (None: it cannot), `clears` whether its kernel clears pages that it gives out, `pressed_s_ago` when the guest
    last told of pressure (None: never)."""

    base_mib: int
    usable_mib: int
    plugged_mib: int
    ballooned_mib: int
    available_mib: int
    punchable: bool
    held_mib: int | None = None
    clears: bool = False
    swappable_mib: int = 0
    pressed_s_ago: float | None = None

    @property
    def actual_mib(self) -> int:
        """What the guest can use."""
        return self.base_mib + self.plugged_mib - self.ballooned_mib


@dataclass(frozen=True)
class Step:
    """One mechanism's next move: BALLOON to hold `mib`, VIRTIO_MEM to have `mib` plugged, SWAP to swap out `mib`."""

    mechanism: Mechanism
    mib: int


def target_of(memory_mib: int, guarantee_mib: int, now: ElasticNow) -> int:
    """What is aimed at: whole blocks, never below the guarantee nor above what the guest may have."""
    wanted = max(memory_mib, guarantee_mib)
    elastic = min(now.usable_mib, max(0, wanted - now.base_mib)) // BLOCK_MIB * BLOCK_MIB
    return now.base_mib + elastic


def next_step(now: ElasticNow, target_mib: int, failed: Collection[Mechanism] = ()) -> Step | None:
    """What to do next towards `target_mib`, without the mechanisms that gave nothing a moment ago; None when it is
    reached, or when only waiting helps."""
    need_mib = target_mib - now.actual_mib
    if abs(need_mib) < BLOCK_MIB:
        return None
    if need_mib > 0:
        return _grow(now, need_mib, failed)
    if now.pressed_s_ago is not None and now.pressed_s_ago < CALM_S:
        return None
    return _shrink(now, -need_mib, failed)


def _grow(now: ElasticNow, need_mib: int, failed: Collection[Mechanism]) -> Step | None:
    from_balloon_mib = min(now.ballooned_mib, _up(need_mib))
    if from_balloon_mib and Mechanism.BALLOON not in failed:
        return Step(Mechanism.BALLOON, now.ballooned_mib - from_balloon_mib)
    plugged_mib = min(now.usable_mib, now.plugged_mib + need_mib)
    if plugged_mib > now.plugged_mib and Mechanism.VIRTIO_MEM not in failed:
        return Step(Mechanism.VIRTIO_MEM, plugged_mib)
    return None


def _shrink(now: ElasticNow, need_mib: int, failed: Collection[Mechanism]) -> Step | None:
    most_mib = min(now.plugged_mib, CLEARED_MOST_MIB) if now.clears else now.plugged_mib
    ballooned_mib = min(most_mib, now.ballooned_mib + _up(need_mib))
    if now.punchable and ballooned_mib > now.ballooned_mib and Mechanism.BALLOON not in failed:
        return Step(Mechanism.BALLOON, ballooned_mib)
    if Mechanism.VIRTIO_MEM not in failed and now.plugged_mib:
        return Step(Mechanism.VIRTIO_MEM, max(0, now.plugged_mib - need_mib) // BLOCK_MIB * BLOCK_MIB)
    if now.swappable_mib and Mechanism.SWAP not in failed:
        return Step(Mechanism.SWAP, min(need_mib, now.swappable_mib))
    return None


def _up(mib: int) -> int:
    return -(-mib // BLOCK_MIB) * BLOCK_MIB


def lies(now: ElasticNow) -> bool:
    """Whether the guest holds more of the host's memory than it can by what it says."""
    if now.held_mib is None or not now.punchable:
        return False
    return now.held_mib > now.plugged_mib - now.ballooned_mib + LIE_SLACK_MIB


def cause_of(now: ElasticNow, target_mib: int, *, over: bool, silent: bool) -> ShortfallCause | None:
    """Why the target is not reached, None when it is. `over`: the deadline is; `silent`: the agent left a request
    without an answer."""
    surplus_mib = now.actual_mib - target_mib
    if lies(now) and over:
        return ShortfallCause.UNCOOPERATIVE
    if abs(surplus_mib) < BLOCK_MIB:
        return None
    if silent:
        return ShortfallCause.UNCOOPERATIVE
    if not over:
        return ShortfallCause.FOLLOWING
    if surplus_mib < 0:
        return ShortfallCause.UNCOOPERATIVE
    idle_mib = now.available_mib - surplus_mib
    return ShortfallCause.UNCOOPERATIVE if idle_mib > max(IDLE_MIB, now.actual_mib // 4) else ShortfallCause.IN_USE
