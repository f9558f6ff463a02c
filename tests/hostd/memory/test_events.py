"""Memory events: the newest are kept, one consumer hears them, and everybody's iteration ends."""

from __future__ import annotations

import asyncio

from hostd.memory.events import KEPT_EVENTS, MemoryEvents
from hostd.memory.values import MemoryEvent, MemoryEventKind


def event(number: int) -> MemoryEvent:
    return MemoryEvent(MemoryEventKind.PRESSURE, 10, 256, wants_mib=number)


async def test_the_newest_are_kept_for_a_slow_listener() -> None:
    events = MemoryEvents()
    heard = events()
    for number in range(KEPT_EVENTS + 10):
        events.tell(event(number))
    events.close()
    assert [one.wants_mib async for one in heard] == list(range(10, KEPT_EVENTS + 10))


async def test_a_second_listener_ends_the_first_and_hears_only_what_comes() -> None:
    events = MemoryEvents()
    first = asyncio.ensure_future(anext(events(), None))
    await asyncio.sleep(0)
    events.tell(event(1))
    second = events()
    events.tell(event(2))
    async with asyncio.timeout(60):
        assert await first is None
        assert (await anext(second)).wants_mib == 2
        waiting = asyncio.ensure_future(anext(second, None))
        await asyncio.sleep(0)
        events.tell(event(3))
        heard = await waiting
    assert heard is not None and heard.wants_mib == 3


async def test_who_listens_after_the_end_hears_that_it_is_over() -> None:
    events = MemoryEvents()
    events.tell(event(1))
    events.close()
    async with asyncio.timeout(60):
        assert [one async for one in events()] == []
