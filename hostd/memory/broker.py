"""The broker's mind: who gets how much of the host's memory now, and what to do when that is not enough. Pure.

As senpai and TMO do it (facebookincubator/senpai; Weiner et al., ASPLOS'22), with a guarantee beneath and a ceiling
above: a sandbox should have what it uses and a headroom, more at once when it stalls, less when it has been idle for a
while. What is short is shared out by priority, and among equals by weight, never below anybody's minimum. The ladder:

    stop admission → take back idle memory → squeeze by priority → park → evict the lowest, with a terminal reason

The first three are one apportionment (idle memory is what a second pass hands out); the last two come, one at a time,
when the host itself stays short. Every move says why, in numbers. hostd/memory/brokering.py senses and acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hostd.memory.pressure import HostMemory
from hostd.resize import Cause

GRANULE_MIB = 2
LEAST_STEP_MIB = 8
"""Less more than that saves nobody, and would be an event a round."""


@dataclass(frozen=True)
class Rules:
    """The operator's settings (hostd/config.py) and what follows from measuring. MiB, per cent, seconds."""

    reserve_mib: int
    overhead_mib: int = 64  # what a sandbox costs beside its memory
    overcommit_percent: int = 50  # how much of what is allocated and idle may be promised to others
    headroom_percent: int = 10
    headroom_least_mib: int = 24
    stall_percent: float = 10.0
    host_stall_percent: float = 20.0
    refaults_per_s: float = 500.0
    idle_s: float = 3.0
    park_after_s: float = 10.0
    evict_after_s: float = 30.0
    follow_s: float = 30.0  # how long a guest may keep what it says is idle before it is called uncooperative


@dataclass(frozen=True)
class SandboxMemory:
    """One sandbox as it is sensed. `used_mib` is what its kernel cannot free by itself; `resident_mib` what the host
    has given it really; `stalled_percent`, `refaults_per_s` since it was last looked at; `wants_mib` more it asked for;
    `idle_s` how long it has had more than it needs; `unparkable` why it cannot be parked, "" when it can."""

    uid: str
    name: str
    min_mib: int
    max_mib: int
    desired_mib: int
    allocated_mib: int
    actual_mib: int
    used_mib: int
    resident_mib: int
    priority: int = 0
    weight: int = 100
    stalled_percent: float = 0.0
    refaults_per_s: float = 0.0
    wants_mib: int = 0
    idle_s: float = 0.0
    cooperative: bool = True
    unparkable: str = ""


@dataclass(frozen=True)
class Move:
    """Another allocation. `cause` is what a resize that misses its desired size is told."""

    uid: str
    reason: str  # of the event: MemoryGrown, MemoryTakenBack, MemorySqueezed
    memory_mib: int
    why: str
    cause: Cause = Cause.NONE


@dataclass(frozen=True)
class Decision:
    """What to do now. `closed` says why nothing new is admitted; "" when it may be."""

    moves: tuple[Move, ...]
    fair: Mapping[str, int]  # what each would have, were all of it free
    closed: str = ""
    park: Move | None = None
    evict: Move | None = None


def headroom_mib(one: SandboxMemory, rules: Rules) -> int:
    """What a sandbox should have free."""
    return max(rules.headroom_least_mib, one.used_mib * rules.headroom_percent // 100)


def stalls(one: SandboxMemory, rules: Rules) -> bool:
    """Whether it shows that it has too little."""
    return (
        one.stalled_percent >= rules.stall_percent
        or one.refaults_per_s >= rules.refaults_per_s
        or one.wants_mib > 0
        or one.actual_mib - one.used_mib < headroom_mib(one, rules)
    )


def need_mib(one: SandboxMemory, rules: Rules) -> int:
    """What a sandbox should have by its own signals; within its bounds. One that does not give back keeps what it has,
    for asking it is no use."""
    head = headroom_mib(one, rules)
    wanted = one.used_mib + 2 * head
    if stalls(one, rules):
        step = one.wants_mib or max(head, one.actual_mib // 8)
        wanted = max(wanted, one.actual_mib + step + head)
    if not one.cooperative:
        wanted = max(wanted, one.actual_mib)
    return _granules(max(one.min_mib, min(one.max_mib, wanted)))


def taken_mib(one: SandboxMemory) -> int:
    """What it takes of the host above its minimum: used, or touched once and not given back. One that gives nothing
    back takes all it has, for whatever it calls idle."""
    held = one.actual_mib if not one.cooperative else max(one.used_mib, min(one.resident_mib, one.allocated_mib))
    return max(0, held - one.min_mib)


def room_mib(host: HostMemory, boxes: Sequence[SandboxMemory], rules: Rules, held_mib: int) -> int:
    """What can be shared out above all minimums; below 0 when not even those fit. `held_mib` is promised elsewhere.

    A part of what is allocated and idle may be promised to others, and what they leave idle of that again: the sum of
    that series is lent at once. So the room depends on what is used and not on what is allocated now: it would follow
    its own decisions otherwise, a step a round."""
    promised = sum(one.min_mib + rules.overhead_mib for one in boxes) + held_mib
    credit_lost = sum(max(0, one.max_mib - one.actual_mib) for one in boxes if not one.cooperative)
    room = host.total_mib - rules.reserve_mib - promised - credit_lost - short_mib(host, rules)
    unused = max(0, room - sum(taken_mib(one) for one in boxes))
    kept_percent = 100 - rules.overcommit_percent
    ceilings = sum(one.max_mib - one.min_mib for one in boxes)
    return room + (unused * rules.overcommit_percent // kept_percent if kept_percent else min(unused, 1) * ceilings)


def short_mib(host: HostMemory, rules: Rules) -> int:
    """How far the host is below its reserve; half of it is there to be used for a moment."""
    return max(0, rules.reserve_mib // 2 - host.available_mib)


def apportion(room: int, boxes: Sequence[SandboxMemory], rules: Rules) -> dict[str, int]:
    """Everybody's minimum; then what each needs, then what each desires beyond that: by priority, equals by weight."""
    shares = {one.uid: one.min_mib for one in boxes}
    for goal in (lambda one: need_mib(one, rules), lambda one: one.desired_mib):
        for priority in sorted({one.priority for one in boxes}, reverse=True):
            tier = [one for one in boxes if one.priority == priority]
            open_ = {one.uid: max(0, min(goal(one), one.max_mib) - shares[one.uid]) for one in tier}
            given = _fill(max(0, room), open_, {one.uid: one.weight for one in tier})
            room -= sum(given.values())
            for uid, mib in given.items():
                shares[uid] += mib
    return shares


def _fill(room: int, asks: Mapping[str, int], weights: Mapping[str, int]) -> dict[str, int]:
    """Water-filling: nobody gets more than asked, what is left over goes to the others by weight. Whole granules."""
    given = dict.fromkeys(asks, 0)
    while room >= GRANULE_MIB:
        thirsty = [uid for uid in sorted(asks) if asks[uid] > given[uid]]
        if not thirsty:
            break
        whole, before = sum(weights[uid] for uid in thirsty), room
        for uid in thirsty:
            part = min(asks[uid] - given[uid], max(GRANULE_MIB, _granules(before * weights[uid] // whole)), room)
            given[uid] += part
            room -= part
    return given


def _granules(size: int) -> int:
    return size // GRANULE_MIB * GRANULE_MIB


def decide(
    host: HostMemory,
    boxes: Sequence[SandboxMemory],
    rules: Rules,
    *,
    held_mib: int = 0,
    arriving_mib: int = 0,
    short_s: float = 0.0,
) -> Decision:
    """What to do now. `short_s` is how long the host has been short since the last park or eviction; `arriving_mib` is
    to be made free for those who wait to start."""
    closed = _closed(host, boxes, rules, room_mib(host, boxes, rules, held_mib))
    room = room_mib(host, boxes, rules, held_mib + arriving_mib)
    fair = apportion(room, boxes, rules)
    state = _state(host, room)
    moves = _shrinking(state, boxes, fair, rules) + _growing(host, state, boxes, fair, rules)
    if not is_short(host, rules) or short_s < rules.park_after_s:
        return Decision(tuple(moves), fair, closed)
    park, evict = _last_resorts(host, boxes, rules, short_s)
    return Decision(tuple(moves), fair, closed, park, evict)


def is_short(host: HostMemory, rules: Rules) -> bool:
    """Whether the host itself suffers: then the last steps of the ladder are due, if it lasts."""
    return short_mib(host, rules) > 0 or host.psi_full >= rules.host_stall_percent


def _shrinking(state: str, boxes: Sequence[SandboxMemory], fair: Mapping[str, int], rules: Rules) -> list[Move]:
    """Who gives back: what is idle for a while, or at once what somebody else comes first for."""
    moves = []
    for one in sorted(boxes, key=lambda each: (each.priority, each.uid)):
        need, head = need_mib(one, rules), headroom_mib(one, rules)
        target = max(fair[one.uid], one.min_mib, _granules(one.used_mib + head // 2))  # what is in use cannot be taken
        target = min(target, one.max_mib)
        if one.allocated_mib - target < max(head, GRANULE_MIB) or not one.cooperative:
            continue
        numbers = f"it uses {one.used_mib} of {one.actual_mib} MiB; {one.allocated_mib} -> {target} MiB"
        if target >= max(need, one.desired_mib):
            if one.idle_s >= rules.idle_s:
                moves.append(Move(one.uid, "MemoryTakenBack", target, f"idle for {one.idle_s:.0f} s: {numbers}"))
        elif target >= need:
            text = f"idle, and others need it ({state}): {numbers}"
            moves.append(Move(one.uid, "MemoryTakenBack", target, text, Cause.SQUEEZED))
        else:
            text = f"others come first, it has priority {one.priority}, weight {one.weight} ({state}): {numbers}"
            moves.append(Move(one.uid, "MemorySqueezed", target, text, Cause.SQUEEZED))
    return moves


def _growing(
    host: HostMemory, state: str, boxes: Sequence[SandboxMemory], fair: Mapping[str, int], rules: Rules
) -> list[Move]:
    """Who gets more, from what is free now and nobody is guaranteed. Who has enough waits until it is worth a step."""
    guaranteed = sum(max(0, one.min_mib - one.resident_mib) for one in boxes)
    free = host.available_mib - rules.reserve_mib // 2 - guaranteed
    moves = []
    for one in sorted(boxes, key=lambda each: (-each.priority, each.uid)):
        wanted = min(fair[one.uid], one.max_mib)
        untouched = max(0, min(one.min_mib, one.allocated_mib) - one.resident_mib)
        target = min(wanted, one.allocated_mib + _granules(max(0, free + untouched)))
        if not _worth_it(one, target, rules):
            continue
        free -= target - one.allocated_mib
        signs = f"it uses {one.used_mib} of {one.actual_mib} MiB, stalls {one.stalled_percent:.0f} %"
        asked = f", asks for {one.wants_mib} MiB" if one.wants_mib else ""
        short = target < max(min(one.desired_mib, one.max_mib), need_mib(one, rules))
        more = f"; more is not free ({state})" if short else ""
        text = f"{signs}{asked}; {one.allocated_mib} -> {target} MiB{more}"
        moves.append(Move(one.uid, "MemoryGrown", target, text, Cause.HOST_ROOM if short else Cause.NONE))
    return moves


def _worth_it(one: SandboxMemory, target: int, rules: Rules) -> bool:
    """Whether to grow to `target` now: who stalls is helped by little, who only desires more waits for a headroom."""
    step = target - one.allocated_mib
    whole = target >= min(one.max_mib, max(one.desired_mib, need_mib(one, rules)))
    if stalls(one, rules):
        return step >= (GRANULE_MIB if whole else LEAST_STEP_MIB)
    return one.allocated_mib < one.desired_mib and step >= (GRANULE_MIB if whole else headroom_mib(one, rules))


def _closed(host: HostMemory, boxes: Sequence[SandboxMemory], rules: Rules, room: int) -> str:
    """The first step of the ladder: nothing new while the host is short."""
    if is_short(host, rules):
        return f"the host is short of memory: {_of(host)}, reserve {rules.reserve_mib} MiB"
    if room < 0 and boxes:
        return f"all that is not reserved is promised: {_of(host)}, {-room} MiB too much"
    return ""


def _last_resorts(
    host: HostMemory, boxes: Sequence[SandboxMemory], rules: Rules, short_s: float
) -> tuple[Move | None, Move | None]:
    """Park the lowest that can be; evict the lowest when none can, or when parking did not help in time."""
    ranked = sorted(boxes, key=rank)
    text = f"the host has been short for {short_s:.0f} s ({_of(host)}, reserve {rules.reserve_mib} MiB)"
    for one in ranked:
        if not one.unparkable:
            why = f"{text}; it has the lowest rank of those that can be parked: {_rank_text(one)}"
            return Move(one.uid, "Parked", 0, why), None
    if not ranked or short_s < rules.evict_after_s:
        return None, None
    lowest = ranked[0]
    why = f"{text} and none can be parked ({lowest.unparkable}); it has the lowest rank: {_rank_text(lowest)}"
    return None, Move(lowest.uid, "Evicted", 0, why)


def rank(one: SandboxMemory) -> tuple[int, bool, int, str]:
    """Who goes first when one must: low priority, then those that are not guaranteed all they may have, then those
    that hold most above their minimum."""
    return one.priority, one.min_mib == one.max_mib, -(max(one.resident_mib, one.used_mib) - one.min_mib), one.uid


def _rank_text(one: SandboxMemory) -> str:
    return f"priority {one.priority}, {one.resident_mib} MiB held, {one.min_mib} MiB guaranteed"


def _of(host: HostMemory) -> str:
    return f"{host.available_mib} of {host.total_mib} MiB available, stalled {host.psi_full:.0f} %"


def _state(host: HostMemory, room: int) -> str:
    return f"{_of(host)}, {max(0, room)} above all guarantees"


def grant_for(
    host: HostMemory, boxes: Sequence[SandboxMemory], rules: Rules, uid: str, *, held_mib: int = 0
) -> Move | None:
    """What `uid`, whose desired size has changed, gets at once; None when it keeps what it has."""
    one = next(each for each in boxes if each.uid == uid)
    room = room_mib(host, boxes, rules, held_mib)
    fair = apportion(room, boxes, rules)[uid]
    need = need_mib(one, rules)
    if one.desired_mib < one.allocated_mib and one.desired_mib <= fair:
        target = max(one.desired_mib, min(fair, need) if stalls(one, rules) else one.min_mib)
        text = f"asked to shrink: {one.allocated_mib} -> {target} MiB"
        return Move(uid, "MemoryTakenBack", target, text)
    shares = {**_as_is(boxes), uid: fair}
    return next((move for move in _growing(host, _state(host, room), boxes, shares, rules) if move.uid == uid), None)


def _as_is(boxes: Sequence[SandboxMemory]) -> dict[str, int]:
    return {one.uid: one.allocated_mib for one in boxes}
