"""How many members of which pools are started or ended now. Pure: values in, a decision out.

Sandboxes come first: a member is made only while fewer starts are under way than there are CPUs, within what the host
may still promise, and never while the host is short of memory (then ready members are given back, one a look). A pool
whose makings fail waits, longer each time. The pool that lacks the largest part of what it wants is served first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BACKOFF_FIRST_S, BACKOFF_LAST_S = 2.0, 60.0
LOOK_AGAIN_S = 5.0
"""Memory comes and goes without telling: how long a decision may stand."""


@dataclass(frozen=True)
class PoolNow:
    """A pool at this moment; `failed_at_s` is when the last of `failures` makings in a row failed, and `why`."""

    uid: str
    wanted: int
    ready: int
    making: int
    need_mib: int
    failures: int = 0
    failed_at_s: float = 0.0
    why: str = ""

    @property
    def missing(self) -> int:
        """How many more are wanted than there are or will be; negative: too many."""
        return self.wanted - self.ready - self.making


@dataclass(frozen=True)
class RoomNow:
    """The host at this moment: what may still be promised and used, sandboxes that start, CPUs, and its hardship."""

    room_mib: int
    starting: int
    cpus: int
    short: str = ""  # why nothing more may be started now ("" when it may): low memory, low disk, no driver
    pressed: bool = False  # memory is so low that what is kept in advance is given back


@dataclass(frozen=True)
class Decision:
    """`starts`: a pool's uid for each member to make. `ends`: how many members of a pool are too many. `short`: why a
    pool that lacks members gets none now, in numbers; a pool that only waits for its turn is not in it."""

    starts: tuple[str, ...]
    ends: Mapping[str, int]
    short: Mapping[str, str]
    look_again_s: float


def backoff_s(failures: int) -> float:
    """How long a pool waits after so many failures in a row."""
    return 0.0 if failures == 0 else min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16))


def decide(pools: Iterable[PoolNow], room: RoomNow, now_s: float) -> Decision:
    """See the module."""
    known = sorted(pools, key=lambda pool: (-pool.missing / max(1, pool.wanted), pool.uid))
    ends = {pool.uid: -pool.missing for pool in known if pool.missing < 0}
    if room.pressed and not ends:
        richest = max(known, key=lambda pool: (pool.ready, pool.uid), default=None)
        if richest is not None and richest.ready:
            ends[richest.uid] = 1
    starts: list[str] = []
    short: dict[str, str] = {}
    look_again_s = LOOK_AGAIN_S
    free_mib, slots = room.room_mib, room.cpus - room.starting - sum(pool.making for pool in known)
    lacking = [pool for pool in known if pool.missing > 0]
    for pool in lacking:
        wait_s = pool.failed_at_s + backoff_s(pool.failures) - now_s if pool.failures else 0.0
        if wait_s > 0:
            short[pool.uid] = f"its last {pool.failures} makings failed, the next in {wait_s:.0f} s: {pool.why}"
            look_again_s = min(look_again_s, wait_s)
        elif room.short or room.pressed:
            short[pool.uid] = room.short or "the host is short of memory"
        elif pool.need_mib > free_mib:
            short[pool.uid] = f"{pool.need_mib} MiB needed for one more, {max(0, free_mib)} MiB may be promised here"
    able = [pool for pool in lacking if pool.uid not in short]
    started = {pool.uid: 0 for pool in able}
    while slots > 0:
        open_ = [pool for pool in able if started[pool.uid] < pool.missing and pool.need_mib <= free_mib]
        if not open_:
            break
        chosen = min(open_, key=lambda pool: started[pool.uid])
        started[chosen.uid] += 1
        starts.append(chosen.uid)
        free_mib -= chosen.need_mib
        slots -= 1
    return Decision(tuple(starts), ends, short, max(0.01, look_again_s))
