"""Warm pools on one host, with the fake driver: refill, claims and their races, restarts, what ends with what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostd.drivers.contract import StartPlan
from hostd.drivers.fake import FakeDriver
from hostd.drivers.fakewarming import FakeWarmGuest
from hostd.errors import StartFailed
from hostd.lifecycle import Phase
from hostd.sandbox import Sandbox
from hostd.spec import DesiredState, Resources
from hostd.warmpool import MemberState, PoolSpec
from tests.hostd.hostkit import MODEST, Host, running_host, until


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with running_host(tmp_path) as host:
        yield host


def pool_of(host: Host, wanted: int = 2, resources: Resources = MODEST, uid: str = "p1") -> PoolSpec:
    return PoolSpec(uid, "web", "acme", host.image, resources, wanted)


def ready(host: Host) -> int:
    return sum(status.ready for status in host.sandboxes.pools.status())


async def filled(host: Host, wanted: int = 2) -> None:
    host.sandboxes.pools.assign([pool_of(host, wanted)])
    await until(lambda: ready(host) == wanted)


def machines(host: Host) -> list[str]:
    return sorted(name for name in host.fake.machines if name.startswith("pool-"))


async def runs(sandbox: Sandbox) -> None:
    await until(lambda: sandbox.record.phase is Phase.RUNNING)


def handle_member(sandbox: Sandbox) -> str:
    assert sandbox.record.handle is not None
    return sandbox.record.handle.member


async def test_a_pool_is_filled_counts_and_tells(host: Host) -> None:
    told: list[int] = []
    host.sandboxes.pools.on_change = lambda: told.append(ready(host))
    await filled(host)
    assert len(machines(host)) == 2
    assert host.sandboxes.held_resources() == [MODEST, MODEST]
    assert host.sandboxes.live_resources() == []
    await until(lambda: told[-1:] == [2])
    assert [(e.reason, e.kind) for e in host.events if e.subject == "web"] == [("PoolReady", "pool")]


async def test_what_could_not_be_rehearsed_is_told_once(host: Host) -> None:
    assert host.fake.warming is not None
    host.fake.warming.unrehearsed = "sh: not found in PATH"
    await filled(host)
    told = [(e.reason, e.message) for e in host.events if e.subject == "web"]
    assert told.count(("NotRehearsed", "claims will be slower: sh: not found in PATH")) == 1


async def test_a_claim_takes_over_uid_directory_and_cgroup_and_the_pool_fills_up(host: Host) -> None:
    await filled(host)
    before = machines(host)
    one = host.assign("one", "sleep")
    await runs(one)
    assert one.record.origin == "warm claim from pool web"
    assert handle_member(one) in before
    assert one.record.handle is not None and one.record.vm_uid == one.record.handle.vm_uid
    assert [name for name, _ in one.record.start_phases] == ["resume", "agent", "workload"]
    await until(lambda: ready(host) == 2)
    assert len(machines(host)) == 3
    assert len({m.vm_uid for m, _ in host.sandboxes.pools.ready()} | {one.record.vm_uid}) == 3
    host.want(one, DesiredState.REMOVED)
    await until(lambda: not host.sandboxes.knows("one"))
    assert len(machines(host)) == 2
    assert sorted(folder.name for folder in host.config.run_dir.iterdir()) == machines(host)


@pytest.mark.parametrize(
    "changes",
    [
        {"cold": True},
        {"checkpoint": "c1"},
        {"tenant": "other"},
        {"resources": Resources(256, 1024, 256, 2000)},
        {"resources": Resources(256, 2048, 256, 1000)},
    ],
    ids=["cold", "checkpoint", "tenant", "vcpus", "ceiling"],
)
async def test_what_does_not_fit_claims_nothing(host: Host, changes: dict[str, object]) -> None:
    await filled(host)
    assert host.sandboxes.pools.take(host.spec("one", "sleep", **changes)) is None
    assert ready(host) == 2


async def test_another_size_in_the_same_bucket_fits(host: Host) -> None:
    await filled(host, 1)
    one = host.assign("one", "sleep", resources=Resources(200, 600, 400, 500))
    await runs(one)
    assert handle_member(one)
    assert host.fake.machines[handle_member(one)].resources == Resources(200, 600, 400, 500)


async def test_two_claims_for_the_last_member(host: Host) -> None:
    await filled(host, 1)
    host.fake.faults.boot_s = 0.05  # so that the refill is slower than either start
    both = [host.assign(uid, "sleep") for uid in ("one", "two")]
    for sandbox in both:
        await runs(sandbox)
    origins = sorted(sandbox.record.origin for sandbox in both)
    assert origins == ["", "warm claim from pool web"]


async def test_a_claim_while_the_pool_is_refilled_does_not_wait(host: Host) -> None:
    host.fake.faults.boot_s = 30.0
    host.sandboxes.pools.assign([pool_of(host, 1)])
    await until(lambda: len(machines(host)) > 0)
    host.fake.faults.boot_s = 0.0
    one = host.assign("one", "sleep")
    await runs(one)
    assert one.record.origin == ""
    assert ready(host) == 0


async def test_a_claim_that_fails_is_a_start_of_its_own(host: Host) -> None:
    await filled(host, 1)
    host.fake.faults.claim = StartFailed("the guest did not wake")
    one = host.assign("one", "sleep")
    await runs(one)
    assert one.record.origin == ""
    assert handle_member(one) == ""
    (failed,) = [event for event in host.events if event.reason == "ClaimFailed"]
    assert "pool web" in failed.message and "the guest did not wake" in failed.message
    host.fake.faults.claim = None
    await until(lambda: ready(host) == 1)
    assert len(host.fake.machines) == 2


async def test_a_sandbox_that_is_removed_during_its_claim_leaves_nothing(host: Host) -> None:
    await filled(host, 1)
    host.sandboxes.pools.assign([])  # no refill: what is there then is the claimed one
    await until(lambda: machines(host) == [])
    await filled(host, 1)
    host.fake.faults.claim_s = 30.0
    one = host.assign("one", "sleep")
    await until(lambda: one.record.phase is Phase.STARTING)
    host.sandboxes.pools.assign([])
    host.want(one, DesiredState.REMOVED)
    await until(lambda: not host.sandboxes.knows("one"))
    assert host.fake.machines == {}
    assert list(host.config.run_dir.iterdir()) == []


async def test_a_member_that_dies_is_replaced(host: Host) -> None:
    await filled(host, 1)
    (dead,) = machines(host)
    host.fake.crash(dead)
    await until(lambda: dead not in host.fake.machines)
    await until(lambda: "a ready member was lost" in host.sandboxes.pools.status()[0].message)
    await until(lambda: ready(host) == 1)
    assert machines(host) != [dead]


async def test_shrinking_ends_what_is_too_many_and_removing_the_pool_all(host: Host) -> None:
    await filled(host, 3)
    host.sandboxes.pools.assign([pool_of(host, 1)])
    await until(lambda: len(machines(host)) == 1)
    assert ready(host) == 1
    host.sandboxes.pools.assign([])
    await until(lambda: host.sandboxes.held_resources() == [])
    assert machines(host) == []
    assert not any(owner.startswith("sandbox/pool-") for owner in host.store.pins())
    assert list(host.config.run_dir.iterdir()) == []


async def test_a_pool_of_another_image_has_other_members(host: Host) -> None:
    await filled(host, 1)
    (old,) = machines(host)
    host.sandboxes.pools.assign([pool_of(host, 1, Resources(256, 512, 256, 1000))])
    await until(lambda: machines(host) != [old] and ready(host) == 1)
    assert old not in host.fake.machines


async def test_a_member_whose_template_is_gone_is_made_anew(host: Host) -> None:
    await filled(host, 1)
    ((member, guest),) = host.sandboxes.pools.ready()
    assert isinstance(guest, FakeWarmGuest)
    guest.outdated = True
    host.sandboxes.pools.poke()
    await until(lambda: ready(host) == 1 and machines(host) != [member.uid])


async def test_an_image_that_is_gone_makes_the_pool_short_and_it_backs_off(host: Host) -> None:
    pool = PoolSpec("p2", "gone", "acme", "sha256:" + "9" * 64, MODEST, 1)
    host.sandboxes.pools.assign([pool])
    await until(lambda: "PoolShort" in [event.reason for event in host.events])
    (status,) = host.sandboxes.pools.status()
    assert "import it again" in status.message
    (told,) = [event for event in host.events if event.reason == "PoolShort"]
    assert told.message.startswith("0 of 1 members are ready: its last 1 makings failed, the next in 2 s")


async def test_short_of_memory_is_told_with_numbers(tmp_path: Path) -> None:
    async with running_host(tmp_path) as host:
        total_mib = host.sandboxes.host_now().memory_total_mib
        large = Resources(total_mib * 2 // 3, total_mib, total_mib * 2 // 3, 1000)
        host.sandboxes.pools.assign([pool_of(host, 2, large)])
        await until(lambda: "PoolShort" in [event.reason for event in host.events])
        (told,) = [event for event in host.events if event.reason == "PoolShort"]
        assert "MiB needed for one more" in told.message
        assert len(machines(host)) <= 1


async def test_a_member_s_memory_is_its_claimer_s_at_admission(host: Host) -> None:
    """With room for one guest only, the claim of it is admitted, and a second sandbox is not."""
    total_mib = host.sandboxes.host_now().memory_total_mib
    large = Resources(total_mib // 2, total_mib, total_mib // 2, 1000)
    host.sandboxes.pools.assign([pool_of(host, 1, large)])
    await until(lambda: ready(host) == 1)
    refused = host.assign("refused", "sleep", resources=large, cold=True)
    await until(lambda: refused.record.phase is Phase.FAILED)
    assert refused.record.reason == "ShortOfMemory"
    claimer = host.assign("claimer", "sleep", resources=large)
    await runs(claimer)
    assert handle_member(claimer)


async def test_members_end_with_hostd_and_claimed_ones_are_taken_over(host: Host) -> None:
    await filled(host, 2)
    one = host.assign("one", "sleep")
    await runs(one)
    mine = handle_member(one)
    await until(lambda: ready(host) == 2)
    await host.restart()
    assert machines(host) == [mine]
    one = host.sandboxes.find("one")
    await until(lambda: one.live is not None)
    assert one.record.origin == "warm claim from pool web"
    assert one.record.adoptions == 1
    await filled(host, 2)
    assert one.record.vm_uid not in {member.vm_uid for member, _ in host.sandboxes.pools.ready()}
    host.want(one, DesiredState.STOPPED)
    await until(lambda: one.record.phase is Phase.EXITED)
    assert mine not in host.fake.machines


async def test_what_a_killed_hostd_left_is_ended_by_the_next(tmp_path: Path) -> None:
    driver = FakeDriver()
    async with running_host(tmp_path, driver) as host:
        folder = host.config.run_dir / "pool-p1-beef"
        assert driver.warming is not None
        await driver.warming.prewarm(StartPlan(host.spec("pool-p1-beef"), (), 200_077, folder), lambda _: None)
        await host.sandboxes.take_image(host.spec("pool-p1-beef"))
        await host.restart()
        assert driver.machines == {}
        assert not folder.exists()
        assert "sandbox/pool-p1-beef" not in host.store.pins()


async def test_the_table_of_states_is_kept(host: Host) -> None:
    await filled(host, 1)
    taken = host.sandboxes.pools.take(host.spec("one", "sleep"))
    assert taken is not None and taken.member.state is MemberState.CLAIMED
    host.sandboxes.pools.assign([])
    for _ in range(5):
        await asyncio.sleep(0)
    assert taken.member.uid in host.fake.machines  # it is the taker's, whatever becomes of the pool
    await host.sandboxes.pools.end(taken)
    assert host.fake.machines == {}


async def test_a_driver_that_keeps_nothing_warm_says_so(tmp_path: Path) -> None:
    driver = FakeDriver()
    driver.warming = None
    async with running_host(tmp_path, driver) as host:
        host.sandboxes.pools.assign([pool_of(host, 1)])
        await until(lambda: host.sandboxes.pools.status()[0].message != "")
        assert "keeps no guests warm" in host.sandboxes.pools.status()[0].message
