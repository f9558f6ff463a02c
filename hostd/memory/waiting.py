"""Waits for an engine whose targets are set already to reach them, and says how far it came."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hostd.memory.values import Mechanism, MemoryNow, Moved, Resized, ShortfallCause
from hostd.spec import BLOCK_MIB

POLL_S = 0.02


async def wait_for_target(
    memory: Callable[[], Awaitable[MemoryNow]],
    target_mib: int,
    before_mib: int,
    deadline_s: float,
    vcpus: int,
    mechanism: Mechanism = Mechanism.VIRTIO_MEM,
) -> Resized:
    """Asks `memory` until it is within a block of the target or `deadline_s` is over. Errors are `memory`'s."""
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    while True:
        actual_mib, now_s = (await memory()).actual_mib, loop.time()
        short_mib = abs(actual_mib - target_mib)
        reached = short_mib < BLOCK_MIB
        if reached or now_s - begin_s >= deadline_s:
            break
        await asyncio.sleep(POLL_S)
    cause = None if reached else cause_of(actual_mib - target_mib, waited=deadline_s > 0)
    moved_mib = actual_mib - before_mib
    moved = (Moved(mechanism, moved_mib, now_s - begin_s),) if moved_mib else ()
    message = f"{short_mib} MiB are missing: {cause.value}" if cause else ""
    return Resized(actual_mib, 0 if reached else short_mib, cause, moved, vcpus, message)


def cause_of(surplus_mib: int, *, waited: bool) -> ShortfallCause:
    """Why an engine that answers has `surplus_mib` more (< 0: less) than it should have by now. Pure."""
    if not waited:
        return ShortfallCause.FOLLOWING
    return ShortfallCause.IN_USE if surplus_mib > 0 else ShortfallCause.UNCOOPERATIVE
