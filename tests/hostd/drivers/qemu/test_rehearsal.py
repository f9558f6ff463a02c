"""Rehearsals over a real link with an agent in memory: what is run, what is done to what does not end, what is told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from guestagent.fake import FakeAgent, Script
from guestagent.messages import Configure, Kind, Prepare, StartProcess
from hostd.agentlink import AgentLink
from hostd.drivers.qemu import rehearsal
from hostd.drivers.qemu.rehearsal import PROGRAMS, ROUNDS, rehearse
from hostd.errors import StartFailed
from tests.hostd.agentport import port_of

LAYERS = (b"u" * 16,)


def identities() -> Callable[[], Configure]:
    numbers = itertools.count(1)
    return lambda: Configure(b"nobody", LAYERS, 64, bytes([next(numbers)]) * 32, b"0" * 32, 1, 1000)


@asynccontextmanager
async def prepared(
    folder: Path, script: Callable[[StartProcess], Script]
) -> AsyncIterator[tuple[AgentLink, FakeAgent]]:
    agent = FakeAgent(script)
    async with port_of(folder, agent) as port:
        link = await AgentLink.connect(port.path, deadline_s=10.0, gone=asyncio.get_running_loop().create_future())
        try:
            await link.prepare(Prepare(LAYERS, 1000))
            yield link, agent
        finally:
            await link.close()


async def test_every_program_runs_between_identities_that_are_new_each_time(tmp_path: Path) -> None:
    ran: list[tuple[bytes, ...]] = []

    def script(start: StartProcess) -> Script:
        ran.append(start.argv)
        return Script(stdout=b"something")

    async with prepared(tmp_path, script) as (link, agent):
        assert await rehearse(link, identities()) == ""
        assert ran == list(PROGRAMS) * ROUNDS
        assert agent.rehearsed is not None and agent.rehearsed.entropy == bytes([ROUNDS + 1]) * 32
        assert agent.requests[-1] is Kind.REHEARSE
        await link.configure(identities()())
        assert agent.configured is not None


async def test_what_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "RUN_DEADLINE_S", 0.01)
    async with prepared(tmp_path, lambda _: Script(exit_code=None)) as (link, agent):
        assert await rehearse(link, identities()) == ""
        assert agent.requests.count(Kind.SIGNAL) == len(PROGRAMS) * ROUNDS


async def test_an_image_without_these_programs_is_told_of(tmp_path: Path) -> None:
    async with prepared(tmp_path, lambda _: Script(refuse=2, message="not found in PATH")) as (link, agent):
        assert await rehearse(link, identities()) == "sh: not found in PATH; true: not found in PATH"
        await link.configure(identities()())
        assert agent.configured is not None


async def test_one_of_them_is_enough(tmp_path: Path) -> None:
    async with prepared(
        tmp_path, lambda start: Script(refuse=2, message="no") if start.argv[0] == b"sh" else Script()
    ) as (link, _):
        assert await rehearse(link, identities()) == ""


async def test_a_guest_that_kept_something_cannot_be_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "RUN_DEADLINE_S", 0.01)
    monkeypatch.setattr(rehearsal, "END_DEADLINE_S", 0.05)
    async with prepared(tmp_path, lambda _: Script(exit_code=None)) as (link, agent):
        monkeypatch.setattr(agent, "_signal", lambda proc, signo: None)  # it outlives its kill
        with pytest.raises(StartFailed, match="outlived"):
            await rehearse(link, identities())
        with pytest.raises(StartFailed, match="something of a rehearsal is left") as caught:
            await link.rehearse(identities()())
        assert caught.value.reason == "RehearsalFailed"
