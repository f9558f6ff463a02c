"""Parking on the fake driver: to disk and back, whoever asks, whatever comes between."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hostd import streams
from hostd.errors import CannotCheckpoint, CheckpointFailed, HostdError, InvalidSpec, NotRunning, ShortOfResources
from hostd.lifecycle import ENDED, Phase
from hostd.memory.pressure import HostMemory
from hostd.resize import Grant, ResizeState
from hostd.sandbox import Sandbox
from hostd.spec import DesiredState, Resources, SandboxClass
from tests.hostd.hostkit import DEADLINE_S, Host, until


async def runs(host: Host, uid: str = "one", *argv: str) -> Sandbox:
    sandbox = host.assign(uid, *argv)
    await reach(sandbox, Phase.RUNNING)
    return sandbox


async def reach(sandbox: Sandbox, *phases: Phase) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await sandbox.wait_for(lambda record: record.phase in phases)


def kept(host: Host) -> list[str]:
    return [each.about.name for each in host.sandboxes.checkpoints.all()]


def open_memory(host: Host) -> set[int]:
    assert host.fake.checkpointing is not None
    return host.fake.checkpointing.open_now


async def test_parked_nothing_runs_and_nothing_is_held(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    record = sandbox.record
    assert (record.phase, record.reason, record.message, record.handle) == (Phase.PARKED, "Parked", "asked for", None)
    assert host.fake.machines == {} and open_memory(host) == set()
    assert host.sandboxes.live_resources() == []
    assert kept(host) == [f"park-{record.parked}"]
    assert host.reports[-1].record.phase is Phase.PARKED
    await sandbox.park("again")  # idempotent
    await sandbox.unpark()
    assert sandbox.record.phase is Phase.RUNNING and sandbox.record.parked == ""
    assert sandbox.record.started_at_s == record.started_at_s
    assert kept(host) == []
    assert host.reasons()[:3] == ["Started", "Parked", "Started"]
    host.want(sandbox, DesiredState.REMOVED)
    await until(lambda: not host.sandboxes.knows("one"))
    assert open_memory(host) == set()


async def test_all_who_ask_a_parked_one_wait_for_the_same(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    starts = host.fake.starts
    await asyncio.gather(*(sandbox.awake() for _ in range(5)))
    assert host.fake.starts == starts + 1


async def test_a_resize_unparks(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 512, 1000))
    await reach(sandbox, Phase.RUNNING)
    await until(lambda: host.fake.machines["one"].actual_mib == 512)


async def test_it_outlives_hostd(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    await host.restart()
    again = host.sandboxes.find("one")
    assert again.record.phase is Phase.PARKED and host.fake.machines == {}
    await again.unpark()
    await reach(again, Phase.RUNNING)
    assert "one" in host.fake.machines


async def test_a_hostd_that_dies_before_the_engine_is_gone_destroys_it(host: Host) -> None:
    sandbox = await runs(host)
    host.fake.faults.destroy = HostdError("the cgroup is busy")
    parking = asyncio.create_task(sandbox.park("asked for"))
    await reach(sandbox, Phase.PARKED)
    assert sandbox.record.handle is not None
    await host.down()
    parking.cancel()
    host.fake.faults.destroy = None
    await host.up()
    again = host.sandboxes.find("one")
    await until(lambda: again.record.handle is None)
    assert host.fake.machines == {}
    await again.unpark()


async def test_what_is_parked_can_be_stopped_and_leaves_nothing(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    host.want(sandbox, DesiredState.STOPPED)
    await reach(sandbox, *ENDED)
    assert (sandbox.record.reason, sandbox.record.exit_code) == ("Stopped", 137)
    assert kept(host) == [] and open_memory(host) == set()
    with pytest.raises(NotRunning):
        await sandbox.awake()


async def test_it_stays_parked_while_there_is_no_room(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")

    def full(*_: object) -> None:
        raise ShortOfResources("no room")

    with monkeypatch.context() as patched:
        patched.setattr(host.sandboxes, "admit", full)
        with pytest.raises(ShortOfResources, match="no room"):
            await sandbox.awake()
    assert sandbox.record.phase is Phase.PARKED and "UnparkFailed" in host.reasons()
    await sandbox.awake()


async def test_a_parked_one_whose_checkpoint_is_gone_fails_by_name(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    await host.sandboxes.checkpoints.remove(sandbox.record.parked)
    with pytest.raises(HostdError, match="there is no checkpoint"):
        await sandbox.unpark()
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.FAILED, "CheckpointMissing")


async def test_a_checkpoint_that_fails_leaves_it_running(host: Host) -> None:
    sandbox = await runs(host)
    host.fake.faults.checkpoint = CheckpointFailed("QEMU does not save")
    with pytest.raises(CheckpointFailed):
        await sandbox.park("asked for")
    assert sandbox.record.phase is Phase.RUNNING and sandbox.unparkable() == ""
    host.fake.faults.checkpoint = None
    await sandbox.park("asked for")


async def test_what_would_lose_something_is_not_parked(host: Host) -> None:
    sandbox = await runs(host)
    sandbox.session_begins("exec of bash on a terminal")
    with pytest.raises(CannotCheckpoint, match="exec of bash"):
        await sandbox.park("asked for")
    sandbox.session_ends("exec of bash on a terminal")
    with streams._executing(sandbox), pytest.raises(CannotCheckpoint, match="1 exec running"):
        await sandbox.park("asked for")
    assert sandbox.unparkable() == ""
    other = host.assign("oci", sandbox_class=SandboxClass.HOST_KERNEL)
    await reach(other, Phase.RUNNING)
    with pytest.raises(InvalidSpec, match="class host-kernel has no checkpoints"):
        await other.park("asked for")
    assert "has no checkpoints" in other.unparkable()


async def test_forgotten_checkpoints_of_the_parked_are_not_swept(host: Host) -> None:
    sandbox = await runs(host)
    await sandbox.park("asked for")
    host.sandboxes.checkpoints._now_s = lambda: 1e12
    await host.sandboxes.checkpoints.drop_ephemeral()
    assert len(kept(host)) == 1


async def test_it_goes_on_only_when_what_it_held_fits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a host that parked it because it was short is short again at once, and parks it again."""
    sandbox = await runs(host)
    await sandbox.park("the host is short")
    monkeypatch.setattr("hostd.arrivals.ADMIT_WAIT_S", 0.1)
    checkpoints = host.sandboxes.checkpoints
    known = checkpoints.find(sandbox.record.parked)
    checkpoints._known[sandbox.record.parked] = replace(known, size_bytes=600 << 20)
    host.sandboxes.broker.sense = lambda: HostMemory(2048, 500)
    with pytest.raises(ShortOfResources, match="664 MiB needed, 164 MiB more than is available now"):
        await sandbox.awake()
    assert sandbox.record.phase is Phase.PARKED and host.sandboxes.arriving_mib() == 0
    host.sandboxes.broker.sense = lambda: HostMemory(2048, 700)
    await sandbox.awake()


async def test_it_comes_back_with_what_it_had_been_let_have(host: Host) -> None:
    """Also by another hostd: a guest that grew far above what it was asked for is not squeezed into that."""
    sandbox = await runs(host)
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)
    sandbox.allot(Grant(900, message="it stalled"))
    await until(lambda: host.fake.machines["one"].actual_mib == 900)
    await sandbox.park("asked for")
    await host.restart()
    again = host.sandboxes.find("one")
    await again.unpark()
    assert again.grant.memory_mib == 900
