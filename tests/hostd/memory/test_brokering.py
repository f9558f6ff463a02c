"""The broker's loop on a host of fake sandboxes: it senses, decides, acts, and says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostd.errors import ShortOfResources
from hostd.lifecycle import ENDED, Phase
from hostd.memory import broker, brokering
from hostd.memory.pressure import HostMemory
from hostd.memory.values import MemoryEvent, MemoryEventKind, MemoryNow, MemorySignals
from hostd.resize import Cause, ResizeState
from hostd.sandbox import Sandbox
from hostd.spec import DesiredState, Resources
from sharedcache.errors import OutOfSpace
from tests.hostd.hostkit import DEADLINE_S, Host, running_host, until

ROOMY = HostMemory(16_384, 15_000)
SIZES = Resources(256, 1024, 256, 1000)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[Host]:
    """A host whose broker looks often, and sees what the test says."""
    async with running_host(tmp_path, memory_sense_s=0.05, memory_reserve_mib=512) as running:
        see(running, ROOMY)
        yield running


def see(host: Host, memory: HostMemory, **rules: Any) -> None:
    mind = host.sandboxes.broker
    mind.sense = lambda: memory
    mind.rules = replace(mind.rules, **rules)
    mind.host_memory()
    mind.poke()


async def runs(host: Host, uid: str = "one", **changes: object) -> Sandbox:
    sandbox = host.assign(uid, **changes)
    async with asyncio.timeout(DEADLINE_S):
        await sandbox.wait_for(lambda record: record.phase is Phase.RUNNING)
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)
    return sandbox


def why(host: Host, reason: str, uid: str = "one") -> str:
    return next((event.message for event in host.events if (event.subject, event.reason) == (uid, reason)), "")


async def test_a_guest_that_uses_nearly_all_it_has_gets_more(world: Host) -> None:
    sandbox = await runs(world)
    world.fake.machines["one"].used_mib = 200
    await until(lambda: world.fake.machines["one"].actual_mib > 256)
    assert sandbox.grant.memory_mib > 256 and sandbox.resize is not None
    await until(lambda: why(world, "MemoryGrown") != "")
    assert "it uses 248 of 256 MiB" in why(world, "MemoryGrown")
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)
    assert sandbox.resize.allocated_mib > sandbox.resize.desired_mib == 256


async def test_a_guest_that_tells_of_pressure_is_served_at_once(tmp_path: Path) -> None:
    async with running_host(tmp_path, memory_sense_s=60.0) as host:  # no round comes by itself
        see(host, ROOMY)
        await runs(host)
        host.fake.tell_memory("one", MemoryEvent(MemoryEventKind.PRESSURE, 4, 256, wants_mib=300))
        await until(lambda: host.fake.machines["one"].actual_mib >= 556)
        assert "asks for 300 MiB" in why(host, "MemoryGrown")


async def test_an_oom_kill_is_told_with_numbers(world: Host) -> None:
    await runs(world)
    event = MemoryEvent(MemoryEventKind.OOM_KILL, 3, 256, oom_kills=1, stalled_us=2_500_000)
    world.fake.tell_memory("one", event)
    await until(lambda: why(world, "GuestOom") != "")
    assert "3 of 256 MiB were available, 1 such kills so far, 2.5 s stood still" in why(world, "GuestOom")


async def test_a_guest_that_stalls_gets_more(world: Host) -> None:
    await runs(world)
    machine = world.fake.machines["one"]
    for _ in range(100):
        machine.signals = MemorySignals(psi_some_us=machine.signals.psi_some_us + 10_000_000)
        await asyncio.sleep(0.01)
        if machine.actual_mib > 256:
            break
    await until(lambda: machine.actual_mib > 256)


async def test_what_is_idle_is_taken_back(world: Host) -> None:
    sandbox = await runs(world)
    machine = world.fake.machines["one"]
    machine.used_mib = 600
    await until(lambda: machine.actual_mib > 600)
    see(world, ROOMY, idle_s=0.2)
    machine.used_mib = 0
    await until(lambda: machine.actual_mib == 256)
    assert "idle for" in why(world, "MemoryTakenBack")
    assert sandbox.resize is not None and sandbox.grant.memory_mib == 256


async def test_a_resize_is_deferred_while_the_host_is_full_and_granted_once_it_is_not(world: Host) -> None:
    sandbox = await runs(world)
    see(world, HostMemory(2048, 500))
    world.want(sandbox, DesiredState.RUNNING, resources=replace(SIZES, memory_mib=1000))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DEFERRED)
    assert sandbox.resize is not None and sandbox.resize.cause is Cause.HOST_ROOM
    assert sandbox.resize.shortfall_mib > 0 and "500 of 2048 MiB" in sandbox.resize.message
    see(world, ROOMY)
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)
    assert world.fake.machines["one"].actual_mib == 1000
    assert {"ResizeDeferred", "ResizeDone"} <= set(world.reasons())


async def test_a_deferred_resize_outlives_hostd(world: Host) -> None:
    sandbox = await runs(world)
    see(world, HostMemory(2048, 500))
    world.want(sandbox, DesiredState.RUNNING, resources=replace(SIZES, memory_mib=1000))
    await until(lambda: sandbox.record.resize is not None and sandbox.record.resize.state is ResizeState.DEFERRED)
    before = sandbox.record.resize
    had_mib = world.fake.machines["one"].actual_mib
    await world.down()
    await world.up()
    see(world, HostMemory(2048, 500))
    again = world.sandboxes.find("one")
    assert again.record.resize == before and before is not None
    await until(lambda: again.live is not None)
    assert world.fake.machines["one"].actual_mib == had_mib
    see(world, ROOMY)
    await until(lambda: again.resize is not None and again.resize.state is ResizeState.DONE)


async def test_more_than_the_host_has_is_infeasible_by_its_capacity(world: Host) -> None:
    sandbox = await runs(world, resources=replace(SIZES, memory_max_mib=4096))
    see(world, HostMemory(2048, 1900))
    world.want(sandbox, DesiredState.RUNNING, resources=replace(SIZES, memory_max_mib=4096, memory_mib=4000))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.INFEASIBLE)
    assert sandbox.resize is not None and sandbox.resize.cause is Cause.HOST_CAPACITY
    assert "more than this host has for sandboxes at all, 1472 MiB" in sandbox.resize.message


async def test_the_lower_priority_pays_when_the_host_is_short(world: Host) -> None:
    low = await runs(world, "low", resources=replace(SIZES, memory_mib=800), priority=-1)
    high = await runs(world, "high", priority=1)
    see(world, HostMemory(1400, 550))
    world.fake.machines["high"].used_mib = 220
    await until(lambda: low.grant.memory_mib < 800 and high.grant.memory_mib > 256)
    await until(lambda: low.resize is not None and low.resize.state is ResizeState.DEFERRED)
    assert low.resize is not None and low.resize.cause is Cause.SQUEEZED
    assert "others need it" in why(world, "MemoryTakenBack", "low")


async def test_a_guest_that_keeps_what_it_calls_idle_is_marked_and_counts_with_its_maximum(
    world: Host,
) -> None:
    sandbox = await runs(world, resources=replace(SIZES, memory_mib=800))
    see(world, ROOMY, follow_s=0.1)
    world.fake.faults.least_mib = 800
    world.want(sandbox, DesiredState.RUNNING, resources=SIZES)
    await until(lambda: not sandbox.cooperative)
    assert "it counts with its maximum of 1024 MiB" in why(world, "Uncooperative")
    assert [one.memory_min_mib for one in world.sandboxes.held_resources()] == [1024]
    await world.restart()
    see(world, ROOMY)
    again = world.sandboxes.find("one")
    assert not again.cooperative
    world.fake.faults.least_mib = None
    await until(lambda: again.cooperative)
    assert "Cooperative" in world.reasons()


async def test_a_short_host_admits_nothing_parks_the_lowest_and_opens_again(world: Host) -> None:
    await runs(world, "high", priority=5)
    low = await runs(world, "low", priority=-5)
    see(world, HostMemory(16_384, 20), park_after_s=0.1, evict_after_s=60.0)
    await until(lambda: low.record.phase is Phase.PARKED and low.record.handle is None)
    assert "20 of 16384 MiB available" in low.record.message and "priority -5" in low.record.message
    with pytest.raises(ShortOfResources, match="nothing new is admitted now"):
        world.sandboxes.admit(world.spec("more"))
    see(world, ROOMY, park_after_s=60.0)
    await until(lambda: world.sandboxes.broker.closed == "")
    host_events = [event.reason for event in world.events if event.kind == "host"]
    assert host_events[:2] == ["AdmissionClosed", "AdmissionOpen"]
    await low.unpark()
    assert low.record.phase is Phase.RUNNING


async def test_the_lowest_is_evicted_with_its_reason_when_nothing_else_helps(world: Host) -> None:
    high = await runs(world, "high", priority=5)
    low = await runs(world, "low", priority=-5)
    for sandbox in (high, low):
        sandbox.session_begins("exec of bash on a terminal")
    see(world, HostMemory(16_384, 20), park_after_s=0.05, evict_after_s=0.1)
    async with asyncio.timeout(DEADLINE_S):
        await low.wait_for(lambda record: record.phase in ENDED)
    see(world, ROOMY)
    assert (low.record.phase, low.record.reason) == (Phase.FAILED, "Evicted")
    assert "none can be parked" in low.record.message and "exec of bash" in low.record.message
    assert high.record.phase is Phase.RUNNING


async def test_a_start_waits_for_room_that_the_broker_makes(world: Host) -> None:
    first = await runs(world, "first", resources=replace(SIZES, memory_mib=1000))
    see(world, HostMemory(16_384, 700))
    second = world.assign("second")
    await until(lambda: second.record.phase is Phase.ASSIGNED)
    see(world, ROOMY)
    async with asyncio.timeout(DEADLINE_S):
        await second.wait_for(lambda record: record.phase is Phase.RUNNING)
    assert first.record.phase is Phase.RUNNING


async def test_without_a_broker_a_resize_gets_what_it_asks_for(tmp_path: Path) -> None:
    async with running_host(tmp_path, memory_broker="off", memory_sense_s=0.05) as host:
        see(host, ROOMY)
        sandbox = await runs(host)
        see(host, HostMemory(4096, 10))
        host.want(sandbox, DesiredState.RUNNING, resources=replace(SIZES, memory_mib=1000))
        await until(lambda: host.fake.machines["one"].actual_mib == 1000)


async def test_what_can_never_be_leaves_the_guest_what_it_needs(world: Host) -> None:
    sandbox = await runs(world)
    see(world, HostMemory(1400, 1200))
    world.want(sandbox, DesiredState.RUNNING, resources=replace(SIZES, memory_mib=1000))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.INFEASIBLE)
    assert (sandbox.grant.memory_mib, sandbox.desired_mib) == (256, 256)  # it keeps what it has
    world.fake.machines["one"].used_mib = 230
    await until(lambda: world.fake.machines["one"].actual_mib >= 300)
    assert sandbox.resize is not None and sandbox.resize.state is ResizeState.INFEASIBLE
    await until(lambda: sandbox.resize is not None and sandbox.resize.actual_mib == sandbox.grant.memory_mib)
    see(world, HostMemory(1400, 1200), idle_s=0.1)
    world.fake.machines["one"].used_mib = 0
    await until(lambda: world.fake.machines["one"].actual_mib == 256)


async def test_a_host_that_has_become_smaller_says_so_and_goes_on(world: Host) -> None:
    await runs(world, resources=replace(SIZES, memory_mib=900))
    await world.restart()
    see(world, HostMemory(1400, 1000))
    again = world.sandboxes.find("one")
    await until(lambda: again.live is not None)
    again.allot(replace(again.grant, memory_mib=800))
    await until(lambda: again.resize is not None and again.resize.state is ResizeState.INFEASIBLE)
    assert again.resize is not None and again.resize.cause is Cause.HOST_CAPACITY
    assert "InternalError" not in world.reasons()


@pytest.mark.parametrize(("desired_mib", "way"), [(512, "growing"), (256, "shrinking")])
async def test_a_resize_under_way_goes_on_when_hostd_is_back(world: Host, desired_mib: int, way: str) -> None:
    sandbox = await runs(world, resources=replace(SIZES, memory_mib=384))
    world.fake.faults.most_mib = 400 if way == "growing" else None
    world.fake.faults.least_mib = 300 if way == "shrinking" else None
    world.want(sandbox, DesiredState.RUNNING, resources=replace(SIZES, memory_mib=desired_mib))
    await until(lambda: sandbox.record.resize is not None and sandbox.record.resize.desired_mib == desired_mib)
    assert sandbox.record.resize is not None and sandbox.record.resize.state is ResizeState.IN_PROGRESS
    before = sandbox.record.resize
    await world.restart()
    see(world, ROOMY)
    again = world.sandboxes.find("one")
    await until(lambda: again.live is not None)
    assert again.grant.memory_mib == desired_mib
    assert again.resize is not None and again.resize.state is ResizeState.IN_PROGRESS
    assert again.resize.deadline_s == before.deadline_s
    world.fake.faults.most_mib = world.fake.faults.least_mib = None
    await until(lambda: again.resize is not None and again.resize.state is ResizeState.DONE)
    assert world.fake.machines["one"].actual_mib == desired_mib


async def test_a_request_that_a_killed_hostd_had_not_begun_is_granted_what_is_free(world: Host) -> None:
    sandbox = await runs(world)
    await world.down()
    world.sandboxes.journal.write(
        replace(sandbox.record, spec=replace(sandbox.spec, resources=replace(SIZES, memory_mib=1000)))
    )
    await world.up()
    see(world, HostMemory(2048, 500))
    again = world.sandboxes.find("one")
    await until(lambda: again.resize is not None and again.resize.desired_mib == 1000)
    await until(lambda: again.resize is not None and again.resize.state is not ResizeState.IN_PROGRESS)
    see(world, ROOMY)
    await until(lambda: again.resize is not None and again.resize.state is ResizeState.DONE)


async def test_a_silent_guest_holds_nobody_up(world: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = await runs(world, "silent")
    await runs(world)

    async def never() -> MemoryNow:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(silent.running().engine, "memory", never)
    rounds = 0
    decide = broker.decide

    def counted(*args: Any, **words: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return decide(*args, **words)

    monkeypatch.setattr("hostd.memory.broker.decide", counted)
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    await until(lambda: rounds >= 4)
    assert loop.time() - begin_s < 4 * brokering.ANSWER_S  # each round waited for its answer before


async def test_a_bug_in_a_decision_leaves_memory_as_it_is_and_hostd_up(
    world: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await runs(world)

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr("hostd.memory.broker.decide", broken)
        world.sandboxes.broker.poke()
        await until(lambda: "BrokerFailed" in world.reasons("host-1"))
    assert "ZeroDivisionError: a bug" in why(world, "BrokerFailed", "host-1")
    world.fake.machines["one"].used_mib = 200
    await until(lambda: world.fake.machines["one"].actual_mib > 256)
    assert world.reasons("host-1").count("BrokerFailed") == 1


async def test_what_cannot_be_parked_is_passed_over_and_the_next_one_goes(world: Host) -> None:
    low, high = await runs(world, "low", priority=-5), await runs(world, "high", priority=5)
    with pytest.MonkeyPatch.context() as patched:

        def full(*_: object) -> None:
            raise OutOfSpace("no room on the disk")

        make = world.sandboxes.checkpoints._store.require_space
        patched.setattr(
            world.sandboxes.checkpoints._store,
            "require_space",
            lambda need: full() if not why(world, "ParkFailed", "low") else make(need),
        )
        see(world, HostMemory(16_384, 20), park_after_s=0.1, evict_after_s=60.0)
        await until(lambda: high.record.phase is Phase.PARKED)
    see(world, ROOMY, park_after_s=60.0)
    assert low.record.phase is Phase.RUNNING
    assert "no room on the disk" in why(world, "ParkFailed", "low")
