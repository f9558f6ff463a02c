"""How a sandbox ends on its host: its engine destroyed, everything let go of, then said so, and known for a while.

Each step may be done again, by this task or by a restarted hostd, until it has worked; whoever reads the record finds
an ended sandbox only once nothing of it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from hostd.errors import HostdError
from hostd.journal import Outcome, Record
from hostd.spec import DesiredState
from hostd.starting import Starting

CLEAN_UP_RETRY_S = 1.0
LINGER_FIRST_S, LINGER_LAST_S = 5.0, 10.0
"""How long an ended sandbox with remove_on_exit waits for its first, and its present, followers."""


class Ending(Starting, Protocol):
    """What is needed of the sandbox; hostd/sandbox.py is it."""

    followers: int
    followed: bool

    async def wait_for(self, condition: Callable[[Record], bool]) -> Record: ...


async def finish(box: Ending, outcome: Outcome) -> None:
    """Ends the engine, then says so: once a sandbox is told to have ended, nothing of it runs."""
    host = box.host
    box.write(replace(box.record, outcome=outcome))
    told = False
    while True:
        try:
            await host.driver.destroy(box.spec.uid, box.folder, box.record.handle)
            break
        except (HostdError, OSError) as error:
            if not told:
                box.tell("CleanUpStuck", f"tried again until it works: {error}")
                told = True
            await asyncio.sleep(CLEAN_UP_RETRY_S)
    await host.release_image(box.spec.uid)
    handle = box.record.handle
    for key in {box.spec.checkpoint, handle.checkpoint if handle else ""} - {""}:
        host.checkpoints.release(key, box.spec.uid)
    if box.record.parked:
        await host.checkpoints.remove(box.record.parked)
    box.log.close()
    box.step(
        outcome.phase,
        reason=outcome.reason,
        message=outcome.message,
        exit_code=outcome.exit_code,
        handle=None,
        parked="",
        finished_at_s=host.now_s(),
    )
    box.tell(outcome.reason, outcome.message or outcome.phase.value)


async def until_removed(box: Ending) -> None:
    """Until it is to be removed; one with remove_on_exit first lets its followers read the end of it."""

    def removed() -> bool:
        return box.spec.desired is DesiredState.REMOVED

    if not box.spec.remove_on_exit:
        await box.wait_for(lambda _: removed())
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_FIRST_S):
            await box.wait_for(lambda _: box.followed or removed())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_LAST_S):
            await box.wait_for(lambda _: box.followers == 0 or removed())
