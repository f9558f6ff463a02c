"""Elastic memory and vCPUs of real guests: grown, shrunk, ballooned, given back, defended. One guest for all of it,
whose kernel does not clear pages (init_on_alloc=0), and a fork of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from guestagent.elastic import SetBalloon, SetCpus
from guestagent.messages import GuestEvent, ReplyBody
from hostd.drivers.contract import Engine, StartPlan
from hostd.drivers.qemu.engine import QemuEngine
from hostd.errors import AgentLost
from hostd.memory import elasticfile
from hostd.memory.policy import Step
from hostd.memory.values import Mechanism, MemoryEvent, MemoryEventKind, ShortfallCause
from hostd.spec import Resources
from tests.contract.driver_suite import Handles, command
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings

pytestmark = [pytest.mark.guest]

DEADLINE_S = 250.0
TOUCHED_MIB, SLACK_MIB = 640, 16
BIG = Resources(memory_min_mib=256, memory_max_mib=1024, memory_mib=1024, cpu_milli=1000)
SMALL = replace(BIG, memory_mib=BIG.memory_mib - TOUCHED_MIB)
LEAST = replace(BIG, memory_mib=BIG.memory_min_mib)


@dataclass
class Box:
    """A running guest whose main process sleeps."""

    engine: QemuEngine
    plan: StartPlan

    async def sh(self, script: str) -> str:
        """Standard output of a shell script, whatever its end."""
        process = await self.engine.spawn(command(("sh", "-c", script)), main=False)
        said = b""
        async with asyncio.timeout(DEADLINE_S):  # under TCG, on a machine that others use, too
            async for piece in process.output():
                said += piece.data if piece.stream == 1 else b""
            await process.wait()
        await process.release()
        return said.decode().strip()

    async def resize(self, resources: Resources) -> None:
        """All the way."""
        resized = await self.engine.resize(resources, deadline_s=DEADLINE_S)
        assert resized.cause is None, resized

    def touch_all(self) -> None:
        """The host has all of the guest's plugged memory, as after a program that used it and ended. Done from the host
        (a guest needs 100 us for each page under TCG)."""
        descriptor = elasticfile.find_elastic(self.engine.handle.pid, 896 << 20)
        assert descriptor is not None
        try:
            os.posix_fallocate(descriptor, 0, (BIG.memory_mib - self.engine.handle.base_mib) << 20)
        finally:
            os.close(descriptor)

    async def touch(self, mib: int) -> None:
        """A program uses so much memory, and ends."""
        assert await self.sh(f"dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null && echo well") == "well"

    async def usable(self, mib: int) -> None:
        """Waits until the guest's kernel has that much available: it counts plugged memory a moment later."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.engine.memory()).available_mib < mib:  # noqa: ASYNC110 - the guest tells nobody
                await asyncio.sleep(0.05)


@pytest.mark.asyncio(loop_scope="class")
class TestElastic:
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def box(cls, around: Surroundings) -> AsyncIterator[Box]:
        rig = QemuRig(replace(around, kernel=replace(around.kernel, init_on_alloc=False)), 262_000)
        plan = rig.plan("elastic", LEAST)
        engine = await rig.driver.start(plan, Handles())
        assert isinstance(engine, QemuEngine)
        try:
            await engine.spawn(command(("sleep", "100000")), main=True)
            yield Box(engine, plan)
        finally:
            await engine.detach()
            await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        assert rig.left(plan) == []

    async def test_without_help_it_is_an_oom_with_numbers_and_never_a_hang(self, box: Box) -> None:
        heard: list[MemoryEvent] = []
        events = box.engine.memory_events()

        async def listen() -> None:
            async for event in events:
                heard.append(event)
                if event.kind is MemoryEventKind.OOM_KILL:
                    return

        listening = asyncio.create_task(listen())
        assert "well" not in await box.sh("tail /dev/zero > /dev/null && echo well")
        async with asyncio.timeout(DEADLINE_S):
            await listening
        assert heard[-1].oom_kills >= 1 and 200 < heard[-1].total_mib <= 256
        assert [event.kind for event in heard[:-1]].count(MemoryEventKind.PRESSURE) >= 1
        assert await box.sh("echo well") == "well"

    async def test_touched_memory_comes_back_to_the_host_and_goes_again(self, box: Box) -> None:
        await box.resize(BIG)
        await box.usable(TOUCHED_MIB + 120)
        box.touch_all()
        full = await box.engine.memory()
        assert full.held_mib == full.plugged_mib == BIG.memory_mib - box.engine.handle.base_mib
        assert full.ballooned_mib == 0 and full.punchable
        resized = await box.engine.resize(SMALL, deadline_s=DEADLINE_S)
        assert resized.cause is None, resized
        assert (resized.actual_mib, resized.shortfall_mib, resized.message) == (SMALL.memory_mib, 0, "")
        assert [(moved.mechanism, moved.mib) for moved in resized.moved] == [(Mechanism.BALLOON, -TOUCHED_MIB)]
        small = await box.engine.memory()
        assert small.ballooned_mib == TOUCHED_MIB and small.plugged_mib == full.plugged_mib
        assert small.held_mib == full.held_mib - TOUCHED_MIB  # by st_blocks: the host's count
        assert small.available_mib <= SMALL.memory_mib
        grown = await box.engine.resize(BIG, deadline_s=DEADLINE_S)
        assert [(moved.mechanism, moved.mib) for moved in grown.moved] == [(Mechanism.BALLOON, TOUCHED_MIB)]
        await box.touch(64)  # it is there to be used, at once, and comes from the host anew
        assert (await box.engine.memory()).held_mib > small.held_mib

    async def test_unplugging_moves_the_balloons_blocks_and_the_host_follows(self, box: Box) -> None:
        """virtio-mem puts other frames in the place of those that the balloon has in what it unplugs."""
        await box.resize(BIG)
        await box.resize(SMALL)
        box.touch_all()
        memory = box.engine._memory
        now = (await memory.look())[1]
        await memory.act(Step(Mechanism.VIRTIO_MEM, now.plugged_mib - 128), now, lambda: None)
        after = await box.engine.memory()
        assert after.plugged_mib == now.plugged_mib - 128 and after.ballooned_mib == TOUCHED_MIB
        assert after.held_mib <= after.plugged_mib - TOUCHED_MIB + SLACK_MIB
        await box.resize(BIG)

    async def test_signals_of_its_memory(self, box: Box) -> None:
        signals = (await box.engine.memory()).signals
        assert signals.psi_some_us >= signals.psi_full_us > 0 and signals.oom_kills == 1  # of the test above
        assert (await box.engine.link.stats()).inactive_kib > 0

    async def test_a_workload_cannot_use_what_the_balloon_holds(self, box: Box) -> None:
        await box.resize(BIG)
        await box.resize(SMALL)
        free = int(await box.sh("awk '/HugePages_Free/ {print $2}' /proc/meminfo"))
        assert free == TOUCHED_MIB // 2
        await box.resize(BIG)

    async def test_a_hog_is_stalled_and_helped_by_the_balloon_before_anything_is_killed(self, box: Box) -> None:
        await box.resize(BIG)
        await box.usable(TOUCHED_MIB + 120)
        await box.resize(LEAST)
        kills = (await box.engine.memory()).signals.oom_kills
        events = box.engine.memory_events()
        hearing = asyncio.ensure_future(anext(events))
        await box.touch(LEAST.memory_mib + 100)  # far more than it has, faster than anybody looks
        async with asyncio.timeout(DEADLINE_S):
            event = await hearing
        assert event.kind is MemoryEventKind.PRESSURE and event.gave_back_mib >= 32 and event.wants_mib >= 64
        assert 0 < event.available_mib < event.total_mib <= BIG.memory_mib
        after = await box.engine.memory()
        assert after.signals.oom_kills == kills and after.ballooned_mib < BIG.memory_mib - LEAST.memory_mib
        squeezed = await box.engine.resize(LEAST, deadline_s=0.2)  # not while it has just told of pressure
        assert squeezed.actual_mib > LEAST.memory_mib and squeezed.cause is not None
        await box.resize(BIG)

    async def test_vcpus_come_and_go(self, box: Box) -> None:
        for milli, online in ((3000, "3"), (1500, "2"), (500, "1")):
            resized = await box.engine.resize(replace(BIG, cpu_milli=milli), deadline_s=DEADLINE_S)
            assert resized.vcpus == int(online), resized
            assert await box.sh("grep -c ^processor /proc/cpuinfo") == online
        assert box.engine.handle.ceiling_vcpus == 4

    async def test_a_guest_that_ignores_the_balloon_is_told_apart(
        self, box: Box, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An agent of the guest's own, as a hostile one would be: it answers all but what is about memory and vCPUs."""
        await box.resize(BIG)
        link, honest = box.engine.link, box.engine.link.elastic

        async def deaf(request: object, deadline_s: float) -> ReplyBody:
            if isinstance(request, SetBalloon | SetCpus):
                raise AgentLost("the agent did not answer")
            return await honest(request, deadline_s)  # type: ignore[arg-type]

        monkeypatch.setattr(box.engine._memory._balloon, "_ask", deaf)
        monkeypatch.setattr("hostd.drivers.qemu.elastic.PLUG_STILL_S", 0.0)
        monkeypatch.setattr(box.engine.control, "request_elastic_mib", _ignored)
        resized = await box.engine.resize(SMALL, deadline_s=1.0)
        assert resized.cause is ShortfallCause.UNCOOPERATIVE and resized.shortfall_mib == TOUCHED_MIB
        assert "does not follow" in resized.message
        monkeypatch.undo()
        await box.resize(BIG)
        assert not link.lost.done()

    async def test_a_copy_has_its_balloon_and_vcpus_and_shrinks_by_virtio_mem(
        self, box: Box, around: Surroundings
    ) -> None:
        await box.resize(replace(SMALL, cpu_milli=2000))
        rig = QemuRig(around, 263_000)
        checkpointing = rig.driver.checkpointing
        assert checkpointing is not None
        taken = await checkpointing.checkpoint(box.engine, lambda: {1: 0, 2: 0})
        plan = rig.plan("copy", SMALL)
        plan = replace(plan, spec=replace(plan.spec, checkpoint="c-1", resources=replace(SMALL, cpu_milli=2000)))
        try:
            engine = await checkpointing.restore(plan, taken.memory, taken.form, taken.offsets, Handles())
        finally:
            taken.memory.close()
        try:
            assert isinstance(engine, QemuEngine)
            copy = Box(engine, plan)
            assert await copy.sh("grep -c ^processor /proc/cpuinfo") == "2"
            now = await engine.memory()
            assert (now.ballooned_mib, now.punchable, now.held_mib) == (TOUCHED_MIB, False, 0)
            await copy.resize(replace(BIG, cpu_milli=2000))  # from the balloon
            shrunk = await engine.resize(replace(SMALL, cpu_milli=1000), deadline_s=DEADLINE_S)
            assert shrunk.cause is None and shrunk.vcpus == 1, shrunk
            assert [moved.mechanism for moved in shrunk.moved] == [Mechanism.VIRTIO_MEM]
        finally:
            await engine.detach()
            await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        await box.resize(BIG)

    async def test_the_file_is_huge_where_the_host_can(self, box: Box) -> None:
        if not elasticfile.probe().huge:
            pytest.skip(f"needs huge pages for shared memory: {elasticfile.probe().why}")
        await box.touch(48)
        text = await asyncio.to_thread(Path(f"/proc/{box.engine.handle.pid}/smaps").read_text)
        elastic = text[text.index(elasticfile.ELASTIC_NAME) :]
        mapped_kib = int(elastic.split("ShmemPmdMapped:")[1].split()[0])
        assert mapped_kib >= 32 << 10


async def _ignored(size_mib: int) -> None:
    """virtio-mem's request, to a guest that does nothing about it."""


def test_events_that_say_nonsense_are_cut() -> None:
    from hostd.drivers.qemu.elastic import event_of

    told = event_of(GuestEvent("psi_memory", (("available_kib", -5), ("wants_kib", 2**64 - 1))))
    assert told is not None and told.available_mib == 0 and told.total_mib == 0
    assert event_of(GuestEvent("weather", ())) is None


_: type[Engine] = QemuEngine
