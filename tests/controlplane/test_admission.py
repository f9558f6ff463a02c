"""Quotas under many creates at once, by two control planes that know of each other by the store only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from controlplane import codec, keys, lifecycle
from controlplane.errors import AlreadyExists, Exhausted, OperationError
from controlplane.images import Images
from controlplane.model import (
    Capacity,
    Host,
    Image,
    ImageConfig,
    Layer,
    Process,
    Residency,
    Resources,
    Sandbox,
    SandboxClass,
    SandboxSpec,
)
from controlplane.quotas import Quota
from controlplane.records import Records
from controlplane.requests import Creation
from controlplane.sandboxes import Sandboxes
from controlplane.store.contract import Expect, Put, Store, Write
from controlplane.store.sqlite import open_sqlite
from controlplane.tenants import Tenants
from controlplane.view import View

TENANT, DIGEST = "acme", "sha256:" + "a" * 64
DEADLINE_S = 90.0


class Counted:
    """A store that counts commits under a quota's guard."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.commits = 0

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        revision = await self._store.commit(writes, expect)
        self.commits += any(write.key == keys.quota_guard(TENANT) for write in writes)
        return revision

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@dataclass(frozen=True)
class Replica:
    sandboxes: Sandboxes
    view: View


@dataclass(frozen=True)
class Fabric:
    store: Counted
    replicas: tuple[Replica, ...]


@asynccontextmanager
async def fabric(path: Path, quota: Quota, replicas: int) -> AsyncIterator[Fabric]:
    async with open_sqlite(path / "s.db") as engine, AsyncExitStack() as stack:
        store: Any = Counted(engine)
        host = Host(
            "h1", Capacity(1 << 20, 1 << 20, 0, 1 << 20, 1 << 20, 512, 32), "x:1", 1.0,
            classes=(SandboxClass.GUEST_KERNEL,), accel="kvm", image_digests=(DIGEST,),
        )  # fmt: skip
        image = Image("base", TENANT, DIGEST, (Layer("sha256:" + "b" * 64, 1 << 20),), ImageConfig(), 1 << 20, 1.0, "x")
        held = Residency(TENANT, DIGEST, "h1", 1.0)
        await store.commit(
            [
                Put(keys.host("h1"), codec.encode(host)), Put(keys.alive("h1"), b""),
                Put(keys.image(TENANT, "base"), codec.encode(image)),
                Put(keys.residency(TENANT, DIGEST, "h1"), codec.encode(held)),
            ]
        )  # fmt: skip
        made = []
        for _ in range(replicas):
            view = View(store)
            running = asyncio.create_task(view.run())
            stack.push_async_callback(_ended, running)
            await view.reached(1)
            tenants = Tenants(store, view, {TENANT: quota})
            images = Images(store, view, quota_of=tenants.quota)
            made.append(Replica(Sandboxes(store, view, Records(store, view), images, tenants), view))
        yield Fabric(store, tuple(made))


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def asked(name: str, memory_mib: int = 64) -> Creation:
    spec = SandboxSpec("base", Resources(memory_mib, memory_mib, memory_mib, 10), Process(("sleep",)))
    return Creation(name, spec, request_id=f"r-{name}")


async def most_at_once(store: Store) -> tuple[int, int]:
    """The most live sandboxes, and MiB guaranteed, that any revision of the store had."""
    live: dict[str, int] = {}
    most, most_mib = 0, 0
    revision = (await store.page(keys.ALL, limit=1)).revision
    async with asyncio.timeout(DEADLINE_S), store.watch(keys.SANDBOXES, after=1, progress_s=0.1) as batches:
        async for batch in batches:
            for change in batch.changes:
                live.pop(change.key, None)
                if change.value is not None:
                    sandbox = codec.decode(Sandbox, change.value, change.key)
                    if sandbox.status.phase not in lifecycle.ENDED:
                        live[change.key] = sandbox.spec.resources.memory_min_mib
            most, most_mib = max(most, len(live)), max(most_mib, sum(live.values()))
            if batch.revision >= revision:
                return most, most_mib
    raise AssertionError("the watch ended")


async def test_creates_of_a_tenant_with_a_quota_share_commits(tmp_path: Path) -> None:
    async with fabric(tmp_path, Quota(sandboxes=90), 1) as found:
        (one,) = found.replicas
        outcomes = await asyncio.gather(
            *(one.sandboxes.create(TENANT, asked(f"b{i}")) for i in range(100)), return_exceptions=True
        )
        refused = [error for error in outcomes if isinstance(error, Exhausted)]
        assert len(refused) == 10 and {error.reason for error in refused} == {"QuotaExceeded"}
        assert found.store.commits <= 100 // 20
        assert all(made.host == "h1" for made in outcomes if isinstance(made, Sandbox))
        assert await most_at_once(found.store) == (90, 90 * 64)


async def test_one_that_spoils_a_commit_is_told_and_the_others_are_made(tmp_path: Path) -> None:
    async with fabric(tmp_path, Quota(sandboxes=50), 1) as found:
        (one,) = found.replicas
        first = await one.sandboxes.create(TENANT, asked("taken"))
        other = Creation("taken", asked("taken").spec, request_id="another")
        again = asked("taken")
        twins = [Creation("twin", asked("twin").spec, request_id=f"twin-{i}") for i in range(2)]
        wishes = [asked("b0"), other, asked("b1"), again, *twins, asked("b2")]
        outcomes = await asyncio.gather(
            *(one.sandboxes.create(TENANT, wish) for wish in wishes), return_exceptions=True
        )
        assert isinstance(outcomes[1], AlreadyExists)
        assert isinstance(outcomes[3], Sandbox) and outcomes[3].uid == first.uid
        assert sum(isinstance(twin, AlreadyExists) for twin in outcomes[4:6]) == 1
        made = {outcome.name for outcome in outcomes if isinstance(outcome, Sandbox)}
        assert made == {"b0", "b1", "b2", "taken", "twin"}
        async with asyncio.timeout(DEADLINE_S):
            await one.view.reached(max(made.revision for made in outcomes if isinstance(made, Sandbox)))
        assert not one.view._assumed


async def test_a_caller_that_gives_up_takes_nobody_along(tmp_path: Path) -> None:
    async with fabric(tmp_path, Quota(sandboxes=50), 1) as found:
        (one,) = found.replicas
        tasks = [asyncio.create_task(one.sandboxes.create(TENANT, asked(f"b{i}"))) for i in range(12)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        stayed = [outcome for at, outcome in enumerate(outcomes) if at % 3]
        assert all(isinstance(outcome, Sandbox) for outcome in stayed)


@pytest.mark.parametrize("seed", range(4))
async def test_no_quota_is_ever_exceeded_by_two_replicas_at_once(tmp_path: Path, seed: int) -> None:
    """Creates of random sizes and removals, many at once, through both; some callers give up. At no revision of the
    store has the tenant more than it may, and what is refused would have been too much or too late."""
    random = Random(seed)
    quota = Quota(sandboxes=random.choice((7, 15)), memory_min_mib=random.choice((None, 600)))
    async with fabric(tmp_path, quota, 2) as found:

        async def act(number: int) -> None:
            replica = random.choice(found.replicas)
            for _ in range(random.randrange(8)):
                await asyncio.sleep(0)
            made = await replica.sandboxes.create(TENANT, asked(f"b{number}", random.choice((32, 64, 128))))
            if random.randrange(3) == 0:
                await replica.sandboxes.stop(TENANT, made.name, 1)
                await replica.sandboxes.delete(TENANT, made.name, force=True, allow_missing=True)

        tasks = [asyncio.create_task(act(number)) for number in range(60)]
        for task in tasks[::10]:
            asyncio.get_running_loop().call_later(random.random() / 20, task.cancel)
        async with asyncio.timeout(DEADLINE_S):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [error for error in outcomes if isinstance(error, OperationError)]
        assert {error.reason for error in failed} <= {"QuotaExceeded", "Busy"}
        most, most_mib = await most_at_once(found.store)
        assert 0 < most <= (quota.sandboxes or 0)
        assert most_mib <= (quota.memory_min_mib or most_mib)
