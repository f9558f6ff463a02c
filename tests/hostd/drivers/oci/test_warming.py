"""crun's containers kept warm keep the contract of all warm guests, and what a claim gives is the sandbox's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from hostd.drivers.oci.identity import machine_id
from tests.contract.driver_suite import Handles, Rig, collect, command
from tests.contract.warming_suite import WarmingSuite, prewarmed, sandbox_for, warming_of
from tests.hostd.drivers.oci.rig import OciRig, Surroundings, left_of, run, sh


class TestCrunWarming(WarmingSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, around: Surroundings) -> AsyncIterator[Rig]:
        yield OciRig(around, "crun")


async def test_a_claimed_container_is_the_sandbox_s_own(around: Surroundings) -> None:
    rig = OciRig(around, "crun")
    plan, guest = await prewarmed(rig, "named")
    mine = sandbox_for(plan, "mine")
    engine = await warming_of(rig).claim(guest, mine, Handles())
    main = await engine.spawn(
        command(sh("hostname; trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done")), main=True
    )
    output = main.output()
    said = b""
    async for piece in output:
        said += piece.data
        if b"up" in said:
            break
    assert said == b"mine\nup\n"
    out, _, _ = await run(
        engine, sh("cat /etc/hostname /etc/machine-id; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status")
    )
    assert out.split() == ["mine", machine_id("mine"), "NoNewPrivs:", "1", "Seccomp:", "2"]
    await main.signal(15)
    assert (await main.wait()).code == 5
    await engine.detach()
    await rig.driver.destroy("mine", mine.folder, engine.handle)
    assert left_of(plan.spec.uid, plan.folder) + left_of("mine", mine.folder) == []


async def test_a_claim_s_command_ends_with_its_input(around: Surroundings) -> None:
    rig = OciRig(around, "crun")
    plan, guest = await prewarmed(rig, "broken")
    mine = sandbox_for(plan, "cannot")
    engine = await warming_of(rig).claim(guest, mine, Handles())
    try:
        said = await engine.spawn(command(("cat",), stdin=True), main=True)
        await said.close_stdin()
        assert (await collect(said))[2].code == 0
    finally:
        await engine.detach()
        await rig.driver.destroy("cannot", mine.folder, engine.handle)
