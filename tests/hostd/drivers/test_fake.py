"""The fake driver keeps the drivers' contract, and its faults are what they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hostd.drivers.contract import Driver, StartPlan
from hostd.drivers.fake import FakeDriver
from hostd.errors import ControlLost, StartFailed
from hostd.journal import Handle
from hostd.memory.values import Mechanism, MemoryEvent, MemoryEventKind, ShortfallCause
from hostd.spec import Resources
from tests.contract.driver_suite import FLOOD_BYTES, DriverSuite, Handles, Programs, Rig, command, spec_of

PROGRAMS = Programs(
    cat=("cat",), sleep=("sleep",), deaf=("deaf",), polite=("polite", "3"), env=("env",), pwd=("pwd",), size=("size",),
    fault=("fault",), unrunnable=("/etc/passwd",), flood=("flood", str(FLOOD_BYTES)), say=("say", "out", "err", "7"),
)  # fmt: skip


def plan_of(uid: str) -> StartPlan:
    return StartPlan(spec_of(uid), (), 200_000, Path("/nonexistent") / uid)


class FakeRig(Rig):
    programs = PROGRAMS

    def __init__(self) -> None:
        self.driver: Driver
        self.driver = self.fake = FakeDriver()

    def plan(self, uid: str) -> StartPlan:
        return plan_of(uid)

    def reborn(self) -> Driver:
        return self.driver

    def kill(self, handle: Handle) -> None:
        self.fake.crash(next(uid for uid, machine in self.fake.machines.items() if machine.handle == handle))

    def left(self, plan: StartPlan) -> list[str]:
        uid = plan.spec.uid
        tasks = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(f"fake {uid} ")]
        return [*(name for name in self.fake.machines if name == uid), *tasks]


class TestFake(DriverSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls) -> AsyncIterator[Rig]:
        rig = FakeRig()
        yield rig
        assert rig.fake.machines == {}


async def test_a_start_that_fails_leaves_no_machine() -> None:
    driver = FakeDriver()
    driver.faults.start = StartFailed("no kernel came up")
    with pytest.raises(StartFailed, match="no kernel"):
        await driver.start(plan_of("a"), Handles())
    assert driver.machines == {}


async def test_memory_follows_as_slowly_and_as_far_as_it_is_told() -> None:
    driver = FakeDriver()
    engine = await driver.start(plan_of("a"), Handles())
    driver.faults.most_mib = 400
    await engine.resize(Resources(256, 768, 768, 1000))
    assert (await engine.memory()).actual_mib == 400
    driver.faults.most_mib = None
    assert (await engine.memory()).actual_mib == 768
    driver.faults.control = ControlLost("no answer")
    with pytest.raises(ControlLost):
        await engine.memory()


async def test_a_resize_that_falls_short_says_why() -> None:
    driver = FakeDriver()
    engine = await driver.start(plan_of("a"), Handles())
    driver.faults.most_mib = 400
    grown = await engine.resize(Resources(256, 768, 768, 1000), deadline_s=1)
    assert (grown.actual_mib, grown.shortfall_mib, grown.cause) == (400, 368, ShortfallCause.HOST_FULL)
    assert [(moved.mechanism, moved.mib) for moved in grown.moved] == [(Mechanism.VIRTIO_MEM, 144)]
    driver.faults.most_mib, driver.faults.least_mib = None, 300
    shrunk = await engine.resize(Resources(256, 768, 256, 1000), deadline_s=1)
    assert (shrunk.actual_mib, shrunk.shortfall_mib, shrunk.cause) == (300, 44, ShortfallCause.IN_USE)
    driver.faults.follow_s = 3600
    silent = await engine.resize(Resources(256, 768, 768, 1000), deadline_s=0.01)
    assert (silent.actual_mib, silent.cause, silent.moved) == (300, ShortfallCause.UNCOOPERATIVE, ())
    waiting = await engine.resize(Resources(256, 768, 768, 1000))
    assert waiting.cause is ShortfallCause.FOLLOWING


async def test_memory_events_are_the_newest_and_end_with_the_machine() -> None:
    driver = FakeDriver()
    engine = await driver.start(plan_of("a"), Handles())
    events = engine.memory_events()
    for number in range(100):
        driver.tell_memory("a", MemoryEvent(MemoryEventKind.PRESSURE, 10, 256, wants_mib=number))
    driver.crash("a")
    assert [event.wants_mib async for event in events] == list(range(36, 100))


async def test_used_memory_is_not_available(tmp_path: Path) -> None:
    driver = FakeDriver()
    engine = await driver.start(plan_of("a"), Handles())
    before = await engine.memory()
    hog = await engine.spawn(command(("use", "100")), main=True)
    await anext(hog.output())
    assert before.available_mib - (await engine.memory()).available_mib == 100
    await driver.destroy("a", tmp_path / "a", None)
