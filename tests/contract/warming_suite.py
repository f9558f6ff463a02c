"""What every driver that keeps guests warm must do (hostd.drivers.contract.Warming), written once.

A module for each such driver subclasses it, with a rig as in tests.contract.driver_suite.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from hostd.drivers.contract import StartPlan, WarmGuest, Warming
from hostd.drivers.seat import seat_of
from hostd.errors import HostdError
from hostd.spec import Resources
from tests.contract.driver_suite import DEADLINE_S, Handles, Rig, collect, command


def warming_of(rig: Rig) -> Warming:
    assert rig.driver.warming is not None
    return rig.driver.warming


def sandbox_for(plan: StartPlan, uid: str) -> StartPlan:
    """The plan of a sandbox that a member of `plan` fits; its own directory is beside the member's."""
    spec = replace(plan.spec, uid=uid, name=uid, hostname=uid)
    return replace(plan, spec=spec, folder=plan.folder.parent / uid)


async def prewarmed(rig: Rig, uid: str) -> tuple[StartPlan, WarmGuest]:
    plan, made = rig.plan(uid), Handles()
    guest = await warming_of(rig).prewarm(plan, made)
    assert made[0].member == guest.handle.member == plan.spec.uid
    assert guest.current()
    return plan, guest


@pytest.mark.asyncio(loop_scope="class")
class WarmingSuite:
    """See the module."""

    async def test_a_claim_gives_an_engine_of_its_own_name(self, rig: Rig) -> None:
        plan, guest = await prewarmed(rig, "warm")
        mine, made = sandbox_for(plan, "claimer"), Handles()
        engine = await warming_of(rig).claim(guest, mine, made)
        assert made == [engine.handle]
        assert engine.origin == "warm claim"
        assert [name for name, _ in engine.start_phases] == ["resume", "agent"]
        assert seat_of("claimer", mine.folder, engine.handle).folder == plan.folder
        main = await engine.spawn(command(rig.programs.cat, stdin=True), main=True)
        say = await engine.spawn(command(rig.programs.say), main=False)
        assert (await collect(say))[:2] == (b"out", b"err")

        await engine.detach()  # hostd stops; the next one takes it over by its handle
        adopted = await rig.reborn().adopt(mine, engine.handle, {1: 0, 2: 0})
        assert adopted is not None
        again = adopted.resume()
        assert again is not None
        await again.write(b"still here\n")
        assert (await anext(aiter(again.output()))).data == b"still here\n"
        await adopted.resize(Resources(256, 768, 512, 1000))
        await adopted.detach()
        assert main is not None
        assert rig.left(plan) != []
        await rig.driver.destroy("claimer", mine.folder, engine.handle)
        assert rig.left(plan) == []
        assert rig.left(mine) == []

    async def test_a_guest_that_nobody_claims_is_ended(self, rig: Rig) -> None:
        plan, guest = await prewarmed(rig, "idle")
        await guest.detach()
        await guest.detach()  # idempotent
        await rig.driver.destroy(plan.spec.uid, plan.folder, guest.handle)
        assert rig.left(plan) == []

    async def test_what_a_dead_hostd_kept_warm_is_ended_without_a_handle(self, rig: Rig) -> None:
        plan, guest = await prewarmed(rig, "orphan")
        assert rig.left(plan) != []
        await guest.detach()
        await rig.reborn().destroy(plan.spec.uid, plan.folder, None)
        assert rig.left(plan) == []

    async def test_a_guest_that_dies_is_noticed_and_cannot_be_claimed(self, rig: Rig) -> None:
        plan, guest = await prewarmed(rig, "dying")
        rig.kill(guest.handle)
        loss = await asyncio.wait_for(guest.wait_gone(), DEADLINE_S)
        assert loss.reason == "VmmExited"
        with pytest.raises(HostdError):
            await warming_of(rig).claim(guest, sandbox_for(plan, "unlucky"), Handles())
        assert rig.left(plan) == []

    async def test_a_claim_that_is_given_up_leaves_nothing(self, rig: Rig) -> None:
        plan, guest = await prewarmed(rig, "given-up")
        claiming = asyncio.create_task(warming_of(rig).claim(guest, sandbox_for(plan, "hasty"), Handles()))
        await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.wait({claiming})
        assert claiming.cancelled()
        assert rig.left(plan) == []

    async def test_a_prewarm_that_is_given_up_leaves_nothing(self, rig: Rig) -> None:
        plan, made = rig.plan("early-warm"), asyncio.Event()
        warming = asyncio.create_task(warming_of(rig).prewarm(plan, lambda _: made.set()))
        async with asyncio.timeout(DEADLINE_S):
            await made.wait()
        warming.cancel()
        await asyncio.wait({warming})
        assert rig.left(plan) == []

    async def test_nothing_is_there_to_destroy(self, rig: Rig, tmp_path: Path) -> None:
        await rig.driver.destroy("pool-never", tmp_path / "pool-never", None)
