"""Real guests, checkpointed while they run and restored: they go on, share memory, and are sandboxes of their own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hostd.cgroups import Hierarchy
from hostd.drivers.contract import TakenCheckpoint
from hostd.drivers.qemu.checkpointblob import DraftMemory
from hostd.drivers.qemu.checkpointing import QemuMemory
from hostd.drivers.qemu.engine import QemuEngine
from hostd.drivers.qemu.plan import VM_OVERHEAD_MIB
from hostd.drivers.qemu.templates import Templates
from hostd.errors import CannotCheckpoint, CheckpointFailed, CheckpointUnusable
from hostd.journal import Handle
from hostd.spec import Resources
from native import _dax
from tests.contract.driver_suite import command
from tests.hostd.drivers.qemu.forkkit import (
    FILLED_MIB,
    SIZE,
    Counting,
    Nursery,
    Scene,
    checkpointing_of,
    damaged,
    nursery,
    scene,
)
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings, left_of
from tests.hostd.drivers.qemu.test_warming import WarmQemuRig

pytestmark = pytest.mark.guest
FIRST_UID = 263_000 + os.getpid() % 20 * 40
"""Uids are the machine's: two test runs at once should not meet."""

DIGEST = "tail -c 8000000 /filled | md5sum"


async def shared_share(guests: list[Counting]) -> float:
    """How much of the guests' resident RAM is held by more than one of them, in the host's page tables."""
    ranges = [
        (index, region.pid, region.start, region.end)
        for index, guest in enumerate(guests)
        for region in await guest.engine.regions()
        if region.kind == "ram"
    ]
    _, owners = await asyncio.to_thread(_dax.page_split, ranges)
    pages = {holders: sum(owner[2].get(holders, 0) for owner in owners) for holders in range(1, len(guests) + 1)}
    return 1 - pages[1] / sum(pages.values())


class TestForks:
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def world(cls, around: Surroundings) -> AsyncIterator[Scene]:
        async with scene(QemuRig(around, FIRST_UID)) as made:
            yield made

    @pytest.mark.asyncio(loop_scope="class")
    async def test_each_counts_on_from_where_the_source_was(self, world: Scene) -> None:
        source = await world.source.count()
        assert source == list(range(1, len(source) + 1))  # it lost nothing and repeated nothing
        recorded = len(world.source.printed[: world.taken.offsets[1]].split())
        for fork in world.forks:
            numbers = await fork.count()
            assert numbers == list(range(recorded + 1, recorded + 1 + len(numbers)))
        assert 0 < world.taken.pause_s < 10

    @pytest.mark.asyncio(loop_scope="class")
    async def test_each_is_somebody_of_its_own(self, world: Scene) -> None:
        told = [
            (
                await guest.sh("hostname; cat /etc/machine-id /etc/hostname; head -c 16 /dev/urandom | od -An -tx1")
            ).split("\n")
            for guest in (world.source, *world.forks)
        ]
        for column in range(4):
            assert len({lines[column] for lines in told}) == 4
        assert [lines[0] for lines in told[1:]] == [fork.plan.spec.hostname for fork in world.forks]
        assert all(lines[0] == lines[2] for lines in told)
        for guest in world.forks:
            assert abs(int(await guest.sh("date +%s")) - time.time()) < 5

    @pytest.mark.asyncio(loop_scope="class")
    async def test_they_share_what_they_have_not_written(self, world: Scene) -> None:
        digests = {await guest.sh(DIGEST) for guest in (world.source, *world.forks)}
        assert len(digests) == 1
        assert world.taken.memory.held_bytes() > FILLED_MIB << 20
        assert await shared_share(world.forks) > 0.5
        for region in [each for fork in world.forks for each in await fork.engine.regions()]:
            assert region.kind != "ram" or region.resident_kib < SIZE.memory_max_mib << 10

    @pytest.mark.asyncio(loop_scope="class")
    async def test_what_one_writes_no_other_sees(self, world: Scene) -> None:
        for index, fork in enumerate(world.forks):
            await fork.sh(f"echo {index} > /mark; tr 0 {index + 1} < /flood | dd of=/filled conv=notrunc bs=1M seek=46")
        assert [await fork.sh("cat /mark") for fork in world.forks] == ["0", "1", "2"]
        digests = {await guest.sh(DIGEST) for guest in (world.source, *world.forks)}
        assert len(digests) == 4
        assert await world.source.sh("cat /mark") == "before"
        late = await world.nursery.fork(world.taken)
        assert await late.sh("cat /mark") == "before"
        assert await late.sh(DIGEST) == await world.source.sh(DIGEST)

    @pytest.mark.asyncio(loop_scope="class")
    async def test_exec_sessions_end_in_forks_and_stay_in_the_source(self, world: Scene) -> None:
        assert "sleep 4242" in await world.source.sh("ps -o args")
        for fork in world.forks:
            assert "sleep 4242" not in await fork.sh("ps -o args")

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_forks_memory_shrinks_and_grows_and_no_other_is_touched(self, world: Scene) -> None:
        one, other = world.forks[:2]
        before = await other.sh(DIGEST)
        cgroups = world.nursery.rig.around.cgroups
        bound_mib = 2 * SIZE.memory_max_mib + VM_OVERHEAD_MIB
        assert memory_bound_mib(cgroups, one) == bound_mib
        await one.sh("rm /filled")
        small = Resources(256, SIZE.memory_max_mib, 256, 1000)
        await one.engine.resize(small)
        await one.memory_is(SIZE.memory_mib - 64)
        await one.engine.resize(SIZE)
        await one.memory_is(SIZE.memory_max_mib, SIZE.memory_mib)
        await one.sh(f"cat {'/flood ' * 60} > /again; rm /again")
        assert await other.sh(DIGEST) == before
        await one.count()
        assert memory_bound_mib(cgroups, one) == bound_mib

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_fork_can_be_forked(self, world: Scene) -> None:
        parent = world.forks[2]
        taken = world.nursery.closing(await parent.checkpoint())
        child = await world.nursery.fork(taken)
        recorded = parent.printed[: taken.offsets[1] - world.taken.offsets[1]].split()
        numbers = await child.count()
        assert numbers[0] == int(recorded[-1]) + 1
        assert await child.sh(DIGEST) == await parent.sh(DIGEST)
        assert await child.sh("hostname") == child.plan.spec.hostname
        await parent.count()

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_checkpoint_that_fails_or_is_given_up_lets_the_source_go_on(self, world: Scene) -> None:
        def fails() -> dict[int, int]:
            raise CheckpointFailed("no")

        checkpointing = checkpointing_of(world.source.driver)
        with pytest.raises(CheckpointFailed, match="no"):
            await checkpointing.checkpoint(world.source.engine, fails)
        await world.source.count()

        def is_given_up() -> dict[int, int]:
            task.cancel()
            return {}

        task = asyncio.create_task(checkpointing.checkpoint(world.source.engine, is_given_up))
        await asyncio.wait({task})
        assert task.cancelled()
        await world.source.count()

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_guest_that_a_dead_hostd_left_stopped_goes_on_when_adopted(self, world: Scene) -> None:
        guest = world.forks[1]
        assert isinstance(guest.engine, QemuEngine)
        await guest.engine.link.freeze(5)
        await guest.engine.control.execute("stop")
        await guest.engine.detach()
        adopted = await world.nursery.rig.new_driver().adopt(guest.plan, guest.engine.handle, dict(guest.offsets))
        assert adopted is not None
        main = adopted.resume()
        assert main is not None
        async with asyncio.timeout(30):
            async for piece in main.output():
                if piece.data:
                    break
        await adopted.detach()

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize(
        ("harm", "words"),
        [
            (lambda taken: damaged(taken, qemu="QEMU 1.0"), "QEMU 'QEMU 1.0'"),
            (lambda taken: damaged(taken, accel="kvm"), "accelerator 'kvm'"),
            (lambda taken: damaged(taken, base_mib=4096), "not of the size"),
            (lambda taken: damaged(taken, plugged="yes"), "not of this version"),
            (lambda taken: damaged(taken, max_vcpus=1), "QEMU does not take"),
        ],
    )
    async def test_what_does_not_fit_is_refused_and_leaves_nothing(
        self, world: Scene, harm: object, words: str
    ) -> None:
        await _refused(world.nursery, harm(world.taken), words)  # type: ignore[operator]

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_state_that_is_none_is_refused_and_leaves_nothing(self, world: Scene) -> None:
        sealed = world.taken.memory.sealed  # type: ignore[attr-defined]
        with DraftMemory(sealed.ram_bytes, sealed.elastic_bytes) as draft:
            memory = QemuMemory(draft.seal(b"nothing of the kind"))
        taken = TakenCheckpoint(memory, world.taken.form, world.taken.offsets, 0.0)
        await _refused(world.nursery, world.nursery.closing(taken), "QEMU does not take")

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_restore_that_is_given_up_leaves_nothing(self, world: Scene) -> None:
        plan, made = world.nursery.plan("given-up"), asyncio.Event()
        restoring = asyncio.create_task(
            checkpointing_of(world.source.driver).restore(
                plan, world.taken.memory, world.taken.form, world.taken.offsets, lambda _: made.set()
            )
        )
        await made.wait()
        restoring.cancel()
        await asyncio.wait({restoring})
        assert restoring.cancelled()
        assert left_of(plan.spec.uid, plan.folder, plan.vm_uid) == []

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_guest_of_another_driver_is_refused_by_name(self, world: Scene) -> None:
        with pytest.raises(CannotCheckpoint, match="guest-kernel"):
            await checkpointing_of(world.source.driver).checkpoint(object(), dict)  # type: ignore[arg-type]


def memory_bound_mib(cgroups: Hierarchy, guest: Counting) -> int:
    name = "memory.max" if cgroups.version == 2 else "memory.limit_in_bytes"
    folders = cgroups.folders(guest.plan.spec.uid)
    return next(int((folder / name).read_text()) for folder in folders if (folder / name).exists()) >> 20


async def _refused(made: Nursery, taken: TakenCheckpoint, words: str) -> None:
    plan = made.plan("refused")
    handles: list[Handle] = []
    with pytest.raises(CheckpointUnusable, match=words):
        await checkpointing_of(made.rig.driver).restore(plan, taken.memory, taken.form, taken.offsets, handles.append)
    assert left_of(plan.spec.uid, plan.folder, plan.vm_uid) == []


async def test_a_clone_with_hot_plugged_layers_is_forked(around: Surroundings) -> None:
    async with Templates(around.store, lambda *_: None) as templates:
        rig = WarmQemuRig(around, templates)
        async with nursery(rig) as made:
            driver = rig.new_driver()
            first = made.plan("first")
            driver._cloner.choose(first)  # type: ignore[union-attr]  # has the template made
            await templates.settle()
            source = await made.start(driver)
            assert source.engine.origin.startswith("clone of a generic template")
            taken = made.closing(await source.checkpoint())
            assert taken.form["plugged"] is True
            forks = [await made.fork(taken, driver) for _ in range(2)]
            assert len({await guest.sh(f"{DIGEST}; md5sum < /flood") for guest in (source, *forks)}) == 1
            assert await shared_share(forks) > 0.5
            process = await forks[0].engine.spawn(command(("cat", "/etc/hostname")), main=False)
            await process.wait()
            for guest in (source, *forks):
                await guest.count()
