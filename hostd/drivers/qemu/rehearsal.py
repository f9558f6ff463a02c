"""Rehearsals: programs of the image run in a warm guest before anybody claims it, so that a claim's run is quick.

Under TCG whatever runs first after a restore is slow: each block of code is translated, some 10 µs each, each page of
the template that is written is copied. So everything of a claim runs before it is asked for: CONFIGURE's steps,
START's, the exec of a program of the image with the kernel's work for it (overlay, DAX, the loader's mappings). What
cannot be had in advance is the translation of the tenant's program itself: TCG of QEMU 7.2 keeps it by virtual address,
which is random in each exec. So the image's own command is not rehearsed: a claim's python3 got no faster by it [m].

What may happen: code of the image, possibly hostile, runs in a guest that has no tenant yet. It gets an identity and
randomness of its own that CONFIGURE replaces, no secret, no argument, and nothing that it does is kept (the agent's
rehearsal.c). Here: it has a deadline, and a guest in which anything of it is left afterwards is none to be claimed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from guestagent.messages import Configure, StartProcess
from hostd.agentlink import AgentLink
from hostd.agentprocess import AgentProcess
from hostd.command import DEFAULT_PATH
from hostd.errors import CommandFailed, StartFailed

log = logging.getLogger("sandloom.hostd.rehearsal")

ROUNDS = 2
RUN_DEADLINE_S, END_DEADLINE_S = 5.0, 20.0
PROGRAMS = ((b"sh", b"-c", b":"), (b"true",))
"""What nearly every image has, and what does nothing."""


async def rehearse(link: AgentLink, throwaway: Callable[[], Configure]) -> str:
    """Runs PROGRAMS, ROUNDS times; "" or why none of them could run.

    `throwaway` makes an identity, a new one each time. StartFailed when the guest cannot be one to claim: a program is
    still there after its kill, or left something."""
    failures: dict[tuple[bytes, ...], str] = {}
    for _ in range(ROUNDS):
        await link.rehearse(throwaway())
        await link.stats()
        for argv in PROGRAMS:
            failure = await _run(link, argv)
            if failure:
                failures[argv] = failure
    await link.rehearse(throwaway())  # refused when anything is left
    return "; ".join(failures.values()) if len(failures) == len(PROGRAMS) else ""


async def _run(link: AgentLink, argv: tuple[bytes, ...]) -> str:
    """Runs one to its end or its deadline; "" or why it could not be started. StartFailed when it cannot be ended."""
    try:
        process = await link.spawn(StartProcess(link.new_proc(), argv, env=(b"PATH=" + DEFAULT_PATH.encode(),)))
    except CommandFailed as error:
        return str(error)
    try:
        async with asyncio.timeout(RUN_DEADLINE_S):
            await _drain(process)
    except TimeoutError:
        log.info("%r still runs after %.0f s of rehearsal: killed", argv, RUN_DEADLINE_S)
        await _kill(process)
    await process.wait()
    await process.release()
    return ""


async def _kill(process: AgentProcess) -> None:
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            await process.signal(signal.SIGKILL)
            await _drain(process)
    except TimeoutError:
        raise StartFailed("a program of the image outlived its rehearsal", reason="RehearsalFailed") from None


async def _drain(process: AgentProcess) -> None:
    async for _ in process.output():
        pass
