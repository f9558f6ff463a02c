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


async def test_used_memory_is_not_available(tmp_path: Path) -> None:
    driver = FakeDriver()
    engine = await driver.start(plan_of("a"), Handles())
    before = await engine.memory()
    hog = await engine.spawn(command(("use", "100")), main=True)
    await anext(hog.output())
    assert before.available_mib - (await engine.memory()).available_mib == 100
    await driver.destroy("a", tmp_path / "a", None)
