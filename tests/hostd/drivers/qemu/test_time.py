"""`time: tool` in real guests: a clock off the host's, kept whoever is inside, and set anew in a copy."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from controlplane.api.services import Answerer, ServicePolicy
from hostd.drivers.contract import Engine
from hostd.drivers.qemu.engine import QemuEngine
from tests.contract.driver_suite import command
from tests.hostd.drivers.qemu.forkkit import SIZE, checkpointing_of, restored
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings
from tests.hostd.drivers.qemu.test_services import said

pytestmark = pytest.mark.guest
DAY_MS, SLACK_S = 86_400_000, 90
POLICY = ServicePolicy(time=Answerer.TOOL, time_offset_ms=-DAY_MS, sysview=Answerer.TOOL)


async def off_by_s(engine: Engine) -> float:
    """How far the sandbox's clock is from the host's."""
    return int(await said(engine, "date +%s")) - time.time()


async def test_a_clock_of_its_own_is_kept(around: Surroundings) -> None:
    rig, told = QemuRig(around, 268_900), list[str]()
    plan = rig.plan("time", SIZE)
    plan = replace(
        plan,
        spec=replace(plan.spec, services=POLICY),
        tell=lambda reason, text: told.append(f"{reason}: {text}"),
    )
    async with AsyncExitStack() as stack:
        engine = await rig.driver.start(plan, lambda _: None)
        stack.push_async_callback(rig.driver.destroy, plan.spec.uid, plan.folder, engine.handle)
        stack.push_async_callback(engine.detach)
        await engine.spawn(command(("sleep", "100000")), main=True)
        assert abs(await off_by_s(engine) + 86_400) < SLACK_S
        assert "not permitted" in await said(engine, "date -s 2001-01-01 2>&1")
        assert any(line.startswith("ServiceRefused: time: pid ") and line.endswith("time: tool") for line in told), told
        taken = await checkpointing_of(rig.driver).checkpoint(engine, lambda: {1: 0, 2: 0})
        stack.callback(taken.memory.close)
        assert abs(await off_by_s(engine) + 86_400) < SLACK_S
        later = rig.plan("later", SIZE)  # goes on with another offset, on a clock that is set anew
        later = restored(replace(later, spec=replace(later.spec, services=replace(POLICY, time_offset_ms=DAY_MS))))
        fork = await checkpointing_of(rig.driver).restore(
            later, taken.memory, taken.form, taken.offsets, lambda _: None
        )
        stack.push_async_callback(rig.driver.destroy, later.spec.uid, later.folder, fork.handle)
        stack.push_async_callback(fork.detach)
        assert isinstance(fork, QemuEngine) and fork.resume() is not None
        assert abs(await off_by_s(fork) - 86_400) < SLACK_S
        actual_mib = (await fork.memory()).actual_mib
        assert (await said(fork, "free -k")).split()[7] == str(actual_mib << 10)
    assert rig.left(plan) == rig.left(later) == []
