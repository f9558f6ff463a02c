"""The balloon's conversation with honest and hostile guests: what a memory file really loses, block by block."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from guestagent.elastic import BalloonDone, ElasticRequest, MoreRuns, SetBalloon
from guestagent.errors import GuestRefused
from guestagent.fakeballoon import FakeBalloon, Runs
from guestagent.messages import RUNS_AT_ONCE, BalloonReport, ReplyBody
from hostd.errors import AgentLost, ControlLost
from hostd.memory.balloon import BLOCK_BYTES, Balloon, ElasticRegion, Outcome
from hostd.memory.elasticfile import held_bytes

BLOCKS = 64
ADDRESS = 4 << 30
FIRST = ADDRESS // BLOCK_BYTES


@dataclass
class Guest:
    """A fake agent's balloon behind the protocol's values; `heard` is what it was asked."""

    balloon: FakeBalloon = field(default_factory=FakeBalloon)
    heard: list[ElasticRequest] = field(default_factory=list)
    silent: int = 0  # so many answers are lost

    async def ask(self, request: ElasticRequest, deadline_s: float) -> ReplyBody:
        self.heard.append(request)
        try:
            body = self._answer(request)
        except OSError as error:
            raise GuestRefused(error.errno or 0, str(error.strerror)) from error
        if self.silent:
            self.silent -= 1
            raise AgentLost("no answer")
        if body is None:
            return None
        return BalloonReport(int(body["blocks"]), bytes(body["runs"]), int(body["next"]))  # type: ignore[call-overload]

    def _answer(self, request: ElasticRequest) -> dict[str, object] | None:
        if isinstance(request, SetBalloon):
            return self.balloon.balloon(*request.fields())
        if isinstance(request, MoreRuns):
            return self.balloon.runs(request.first)
        assert isinstance(request, BalloonDone)
        return self.balloon.done()  # type: ignore[func-returns-value]


@contextmanager
def memory(blocks: int = BLOCKS) -> Iterator[ElasticRegion]:
    """An elastic file that is all in use: the byte of each block is its number."""
    descriptor = os.memfd_create("elastic-test")
    try:
        os.ftruncate(descriptor, blocks * BLOCK_BYTES)
        for block in range(blocks):
            os.pwrite(descriptor, bytes([block % 255 + 1]) * BLOCK_BYTES, block * BLOCK_BYTES)
        yield ElasticRegion(ADDRESS, blocks * BLOCK_BYTES, descriptor)
    finally:
        os.close(descriptor)


def file_of(region: ElasticRegion) -> int:
    assert region.descriptor is not None
    return region.descriptor


def held(region: ElasticRegion) -> int:
    """By st_blocks: the host's own count."""
    return held_bytes(file_of(region))


def holes(region: ElasticRegion) -> set[int]:
    """Blocks that read as zeros, whole; every other one is as it was."""
    gone = set()
    for block in range(region.size_bytes // BLOCK_BYTES):
        data = os.pread(file_of(region), BLOCK_BYTES, block * BLOCK_BYTES)
        if data == bytes(BLOCK_BYTES):
            gone.add(block)
        else:
            assert data == bytes([block % 255 + 1]) * BLOCK_BYTES, f"block {block} is neither whole nor gone"
    return gone


async def test_what_is_taken_is_punched_and_then_done_with() -> None:
    with memory() as region:
        guest = Guest()
        guest.balloon.told = lambda first, taken: [(first + 3, 2), (first + 9, taken - 2)]
        outcome = await Balloon(guest.ask, region).set(5, 1.0)
        assert (outcome.blocks, outcome.punched_bytes, outcome.refused_runs) == (5, 5 * BLOCK_BYTES, 0)
        assert holes(region) == {3, 4, 9, 10, 11}
        assert held(region) == (BLOCKS - 5) * BLOCK_BYTES
        assert isinstance(guest.heard[-1], BalloonDone) and not guest.balloon.busy


async def test_lowering_punches_nothing() -> None:
    with memory() as region:
        guest = Guest()
        balloon = Balloon(guest.ask, region)
        await balloon.set(5, 1.0)
        outcome = await balloon.set(2, 1.0)
        assert (outcome.blocks, outcome.punched_bytes) == (2, 0) and holes(region) == {0, 1, 2, 3, 4}


async def test_many_runs_come_in_parts() -> None:
    blocks = 4 * RUNS_AT_ONCE
    with memory(8) as small:
        region = ElasticRegion(ADDRESS, blocks * BLOCK_BYTES, small.descriptor)  # sparse above: only the map counts
        guest = Guest()
        guest.balloon.told = lambda first, taken: [(first + number, 1) for number in range(0, blocks, 2)]
        outcome = await Balloon(guest.ask, region).set(blocks // 2, 1.0)
        assert outcome.punched_bytes == blocks // 2 * BLOCK_BYTES
        assert [request.first for request in guest.heard if isinstance(request, MoreRuns)] == [FIRST + 2 * RUNS_AT_ONCE]
        assert held(small) == 4 * BLOCK_BYTES


HOSTILE: dict[str, tuple[Runs, set[int], int]] = {
    "base memory": ([(0, 64)], set(), 1),
    "a PCI hole": ([(3 << 30 >> 21, 8)], set(), 1),
    "one block before": ([(FIRST - 1, 2)], set(), 1),
    "one block too many": ([(FIRST + BLOCKS - 1, 2)], set(), 1),
    "the end of all addresses": ([((1 << 64) - 1, 1)], set(), 1),
    "wrapping around": ([((1 << 64) - 1, 3)], set(), 1),
    "wrapping when counted in bytes": ([(FIRST + (1 << 43), 1), (FIRST, 1 << 43)], set(), 2),
    "empty": ([(FIRST + 5, 0)], set(), 1),
    "overlapping": ([(FIRST + 1, 3), (FIRST + 2, 3), (FIRST + 1, 3)], {1, 2, 3, 4}, 0),
    "good beside bad": ([(FIRST + 7, 1), (FIRST + BLOCKS, 1), (FIRST + 8, 1)], {7, 8}, 1),
    "what it does not own": ([(FIRST, BLOCKS)], set(range(BLOCKS)), 0),  # hurts nobody but itself
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_report_hurts_only_its_guest(name: str) -> None:
    runs, gone, refused = HOSTILE[name]
    with memory() as region, memory() as neighbour:
        guest = Guest()
        guest.balloon.told = lambda first, taken: runs
        outcome = await Balloon(guest.ask, region).set(4, 1.0)
        assert holes(region) == gone and outcome.refused_runs == refused
        assert held(region) == (BLOCKS - len(gone)) * BLOCK_BYTES
        assert held(neighbour) == BLOCKS * BLOCK_BYTES


async def test_random_reports_punch_exactly_what_may_be_punched() -> None:
    chosen = random.Random(15)
    for _ in range(30):
        runs = [
            (chosen.choice((FIRST, 0, (1 << 64) - 70)) + chosen.randrange(-3, BLOCKS + 3) & (1 << 64) - 1,
             chosen.choice((0, 1, 2, 9, 1 << 43, (1 << 64) - 1)))
            for _ in range(chosen.randrange(1, 40))
        ]  # fmt: skip
        allowed = {
            block - FIRST
            for first, count in runs
            if count > 0 and first >= FIRST and first + count <= FIRST + BLOCKS
            for block in range(first, first + count)
        }
        with memory() as region:
            guest = Guest()
            guest.balloon.told = lambda first, taken, told=runs: told  # type: ignore[misc]
            await Balloon(guest.ask, region).set(4, 1.0)
            assert held(region) == (BLOCKS - len(allowed)) * BLOCK_BYTES


async def test_a_guest_that_tells_forever_is_cut_short() -> None:
    with memory() as region:
        asked = 0

        async def ask(request: ElasticRequest, deadline_s: float) -> ReplyBody:
            nonlocal asked
            asked += 1
            return None if isinstance(request, BalloonDone) else BalloonReport(1, bytes(16), FIRST + asked % BLOCKS)

        await Balloon(ask, region).set(1, 1.0)
        assert asked < 80


async def test_an_answer_that_was_lost_is_asked_for_again() -> None:
    """The guest holds blocks that it told of, and the host has no holes: neither stays so."""
    with memory() as region:
        guest = Guest(silent=1)
        balloon = Balloon(guest.ask, region)
        with pytest.raises(AgentLost):
            await balloon.set(4, 1.0)
        assert guest.balloon.busy and holes(region) == set()
        outcome = await balloon.set(4, 1.0)
        assert outcome.punched_bytes == 4 * BLOCK_BYTES and holes(region) == {0, 1, 2, 3} and not guest.balloon.busy


async def test_the_next_hostd_makes_the_holes_that_the_last_one_did_not() -> None:
    with memory() as region:
        guest = Guest(balloon=FakeBalloon(blocks=6))
        await Balloon(guest.ask, region).set(4, 1.0)
        assert holes(region) == {0, 1, 2, 3}


async def test_a_host_that_cannot_punch_says_so_and_still_ends_the_conversation() -> None:
    with memory() as region:
        reader = os.open(f"/proc/self/fd/{region.descriptor}", os.O_RDONLY)
        try:
            guest = Guest()
            outcome = await Balloon(guest.ask, ElasticRegion(ADDRESS, region.size_bytes, reader)).set(4, 1.0)
        finally:
            os.close(reader)
        assert os.strerror(errno.EBADF) in outcome.problem and outcome.punched_bytes == 0 and not guest.balloon.busy
        assert held(region) == BLOCKS * BLOCK_BYTES


async def test_a_conversation_that_is_cancelled_is_ended() -> None:
    with memory() as region:
        guest = Guest()
        setting = asyncio.create_task(Balloon(guest.ask, region).set(4, 1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        setting.cancel()
        await asyncio.wait({setting})
        assert setting.cancelled() and holes(region) == {0, 1, 2, 3} and not guest.balloon.busy


async def test_a_forks_balloon_gives_back_and_is_never_punched() -> None:
    guest = Guest(balloon=FakeBalloon(blocks=6))
    balloon = Balloon(guest.ask, ElasticRegion(ADDRESS, BLOCKS * BLOCK_BYTES, None))
    assert await balloon.set(4, 1.0) == Outcome(4) and len(guest.heard) == 1
    assert await balloon.set(8, 1.0) == Outcome(8) and not guest.balloon.busy


def test_a_region_that_blocks_do_not_fit_is_none() -> None:
    with pytest.raises(ControlLost, match="2 MiB"):
        ElasticRegion(ADDRESS + 4096, BLOCK_BYTES, 0)
