"""Many through at once, one alone: nobody gets in meanwhile, nobody is lost when one gives up."""

from __future__ import annotations

import asyncio

from hostd.turnstile import Turnstile


async def test_many_go_through_together_and_one_alone_waits_for_them() -> None:
    turnstile, told, leave = Turnstile(), [], asyncio.Event()

    async def passing(name: str) -> None:
        async with turnstile.through():
            told.append(f"{name} in")
            await leave.wait()
        told.append(f"{name} out")

    async def alone() -> None:
        async with turnstile.alone():
            told.append("alone")

    first, second = asyncio.create_task(passing("a")), asyncio.create_task(passing("b"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(alone())
    await asyncio.sleep(0)
    late = asyncio.create_task(passing("c"))
    await asyncio.sleep(0)
    assert told == ["a in", "b in"]
    leave.set()
    await asyncio.gather(first, second, closing, late)
    assert told.index("alone") > max(told.index("a out"), told.index("b out"))
    assert told.index("c in") > told.index("alone")


async def test_two_that_want_to_be_alone_take_turns() -> None:
    turnstile, inside, most = Turnstile(), 0, 0

    async def alone() -> None:
        nonlocal inside, most
        async with turnstile.alone():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(alone() for _ in range(5)))
    assert most == 1


async def test_who_gives_up_waiting_lets_the_others_on() -> None:
    turnstile, leave = Turnstile(), asyncio.Event()

    async def passing() -> None:
        async with turnstile.through():
            await leave.wait()

    async def alone() -> None:
        async with turnstile.alone():
            pass

    inside, closing = asyncio.create_task(passing()), asyncio.create_task(alone())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = asyncio.create_task(passing())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    leave.set()
    async with asyncio.timeout(5):
        await asyncio.gather(inside, late)
