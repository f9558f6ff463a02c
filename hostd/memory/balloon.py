"""The balloon's conversation with one guest: blocks taken, told, punched; or given back.

Promise: only bytes of the elastic file are ever punched, whatever the guest says (native/_balloon.pyi); and the guest
is told that the holes are made only when they are, so that an honest one never uses a page that is about to go. A
conversation that was begun is ended, also when it is cancelled: nobody punches after the link was let go of.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from guestagent.elastic import BalloonDone, ElasticRequest, MoreRuns, SetBalloon
from guestagent.errors import GuestRefused
from guestagent.messages import BalloonReport, ReplyBody
from hostd.errors import AgentLost, ControlLost
from hostd.tasks import to_its_end
from native import _balloon

BLOCK_BYTES = 2 << 20
BLOCK_MIB = 2
LATE_S = 10.0
"""How much longer than the guest itself the host waits for an answer."""

MOST_REPORTS = 64
"""A guest that tells on and on is cut short: 64 reports hold all runs of 256 GiB."""

Ask = Callable[[ElasticRequest, float], Awaitable[ReplyBody]]
"""Asks the agent, with a deadline in seconds. GuestRefused with the guest's errno; AgentLost."""


@dataclass(frozen=True)
class ElasticRegion:
    """Where the elastic memory stands in the guest, and the host's file behind it."""

    guest_address: int
    size_bytes: int
    descriptor: int | None  # None: it cannot be punched (a fork's); its balloon can only give back

    def __post_init__(self) -> None:
        if self.guest_address % BLOCK_BYTES or self.size_bytes % BLOCK_BYTES:
            raise ControlLost(f"QEMU put elastic memory at {self.guest_address:#x}, not at a multiple of 2 MiB")

    @property
    def first(self) -> int:
        """Its first block."""
        return self.guest_address // BLOCK_BYTES

    @property
    def end(self) -> int:
        """The block behind its last."""
        return self.first + self.size_bytes // BLOCK_BYTES

    def memory_map(self) -> _balloon.MemoryMap:
        """The only bytes that may be punched."""
        return _balloon.MemoryMap([(self.guest_address, self.size_bytes, 0, 0)])


@dataclass(frozen=True)
class Outcome:
    """What a conversation came to. `blocks` the guest says it holds; `refused_runs` named what is not elastic memory;
    `problem` is the host's own failure to punch, after `punched_bytes`."""

    blocks: int
    punched_bytes: int = 0
    refused_runs: int = 0
    problem: str = ""


class Balloon:
    """One guest's. One conversation at a time."""

    def __init__(self, ask: Ask, region: ElasticRegion) -> None:
        self._ask, self._region = ask, region
        self._map = region.memory_map()
        self._turn = asyncio.Lock()
        self._owed = (
            region.descriptor is not None
        )  # what was told before, to somebody else or too late, may not be punched yet

    async def set(self, blocks: int, deadline_s: float) -> Outcome:
        """Has the guest hold `blocks`, as near as it can within `deadline_s`. AgentLost when it does not answer."""
        async with self._turn:
            return await to_its_end(self._set(blocks, deadline_s))

    async def _set(self, blocks: int, deadline_s: float) -> Outcome:
        owed, self._owed = self._owed, self._region.descriptor is not None
        report = await self._request(blocks, deadline_s)
        if owed and report.blocks and not report.runs:  # it was lowered, which tells no runs
            report = await self._request(report.blocks, deadline_s)
        outcome = Outcome(report.blocks)
        if report.runs:
            try:
                outcome = await self._punch_all(report, outcome, deadline_s)
            finally:
                await self._done()
        self._owed = bool(outcome.problem)
        return outcome

    async def _request(self, blocks: int, deadline_s: float) -> BalloonReport:
        request = SetBalloon(blocks, self._region.first, self._region.end, max(1, int(deadline_s * 1000)))
        try:
            return await self._report(request, deadline_s + LATE_S)
        except GuestRefused as refusal:
            if refusal.errno != errno.EBUSY:
                raise AgentLost(f"the balloon cannot be set: {refusal}", reason="AgentRefused") from refusal
        await self._done()  # of an answer that came too late to be heard
        return await self._report(request, deadline_s + LATE_S)

    async def _punch_all(self, report: BalloonReport, outcome: Outcome, deadline_s: float) -> Outcome:
        at = self._region.first
        for _ in range(MOST_REPORTS):
            outcome = await asyncio.to_thread(self._punch, report.runs, outcome)
            if outcome.problem or not at < report.next_block < self._region.end:
                break
            at = report.next_block
            report = await self._report(MoreRuns(at), deadline_s + LATE_S)
        return outcome

    def _punch(self, runs: bytes, so_far: Outcome) -> Outcome:
        if self._region.descriptor is None:
            return so_far
        plan = self._map.coalesce(runs, BLOCK_BYTES)
        refused = so_far.refused_runs + sum(plan.refused)
        try:
            done = _balloon.punch(plan, [self._region.descriptor])
        except _balloon.PartialError as error:
            words = f"{error.strerror} at byte {error.offset} of the elastic file"
            punched = so_far.punched_bytes + error.done_bytes
            return replace(so_far, punched_bytes=punched, refused_runs=refused, problem=words)
        return replace(so_far, punched_bytes=so_far.punched_bytes + done.bytes, refused_runs=refused)

    async def _report(self, request: ElasticRequest, deadline_s: float) -> BalloonReport:
        answer = await self._ask(request, deadline_s)
        assert isinstance(answer, BalloonReport)
        return answer

    async def _done(self) -> None:
        try:
            await self._ask(BalloonDone(), LATE_S)
        except GuestRefused as refusal:
            raise AgentLost(f"the balloon cannot go on: {refusal}", reason="AgentRefused") from refusal
