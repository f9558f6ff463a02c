"""Warm pools over real gRPC: records, tenancy, quotas, what hosts are told and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane.api.identity import Role
from controlplane.api.status import parse_error
from controlplane.api.v1 import hosts_pb2, images_pb2, pools_pb2, sandboxes_pb2, tenants_pb2
from controlplane.quotas import Quota
from tests.controlplane.conftest import Certificates, Client, Configured, Plane, planed
from tests.controlplane.fakehost import DIGEST, FakeHost

DEADLINE_S = 10.0


def spec_of(size: int = 2, memory_mib: int = 256, max_mib: int = 1024, image: str = "base") -> pools_pb2.PoolSpec:
    resources = sandboxes_pb2.Resources(memory_min_mib=memory_mib, memory_max_mib=max_mib, cpu_milli=1000)
    return pools_pb2.PoolSpec(image=image, resources=resources, size=size)


async def create(client: Client, name: str = "web", size: int = 2, **changes: Any) -> pools_pb2.Pool:
    spec = changes.pop("spec", None) or spec_of(size)
    return await client.pools.CreatePool(pools_pb2.CreatePoolRequest(name=name, spec=spec, **changes), timeout=10)


async def get(client: Client, name: str = "web") -> pools_pb2.Pool:
    return await client.pools.GetPool(pools_pb2.GetPoolRequest(name=name), timeout=10)


def refusal(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), parse_error(error.value).reason


class Watch:
    """What a host is told of pools, newest last."""

    def __init__(self) -> None:
        self.told: list[pools_pb2.PoolAssignments] = []
        self._changed = asyncio.Event()

    async def run(self, host: FakeHost) -> None:
        async for whole in host.sync.WatchPools(hosts_pb2.WatchPoolsRequest(host=host.name)):
            self.told.append(whole)
            self._changed.set()

    def wanted(self) -> dict[str, int]:
        return {pool.name: pool.wanted for pool in self.told[-1].pools} if self.told else {"nothing": -1}

    async def until(self, wanted: dict[str, int]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.wanted() != wanted:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def watching(host: FakeHost) -> AsyncIterator[Watch]:
    watch = Watch()
    task = asyncio.create_task(watch.run(host))
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def report(host: FakeHost, pool: pools_pb2.Pool, ready: int, making: int = 0, message: str = "") -> None:
    """A heartbeat in which the host tells of its share of `pool`."""
    about = host.description()
    about.pools.add(
        uid=pool.uid, name=pool.name, tenant=pool.tenant, image_digest=pool.spec.image_digest, ready=ready,
        making=making, message=message, vcpus=1, memory_min_mib=pool.spec.resources.memory_min_mib,
        fits_above_mib=512, fits_to_mib=1024,
    )  # fmt: skip
    await host.sync.ReportHost(hosts_pb2.ReportHostRequest(host=about), timeout=10)


async def test_a_pool_is_recorded_told_to_its_host_and_shows_what_that_says(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    async with watching(host) as watch:
        await watch.until({})
        pool = await create(client)
        assert (pool.name, pool.tenant, pool.spec.image_digest, pool.ready) == ("web", "default", DIGEST, 0)
        assert [(row.host, row.wanted) for row in pool.hosts] == [("h1", 2)]
        await watch.until({"web": 2})
        (told,) = watch.told[-1].pools
        assert (told.uid, told.tenant, told.image_digest) == (pool.uid, "default", DIGEST)
        assert told.resources.memory_max_mib == 1024
        await report(host, pool, 1, 1, "256 MiB needed")
        seen = await get(client)
        assert [(row.ready, row.making, row.message) for row in seen.hosts] == [(1, 1, "256 MiB needed")]
        assert seen.ready == 1
        assert seen.etag == pool.etag

        resize = pools_pb2.ResizePoolRequest(name="web", size=3, etag=pool.etag)
        assert (await client.pools.ResizePool(resize, timeout=10)).spec.size == 3
        await watch.until({"web": 3})
        with pytest.raises(grpc.aio.AioRpcError) as stale:
            await client.pools.ResizePool(resize, timeout=10)
        assert refusal(stale) == (grpc.StatusCode.ABORTED, "EtagMismatch")
        await client.pools.DeletePool(pools_pb2.DeletePoolRequest(name="web"), timeout=10)
        await watch.until({})
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await get(client)
    assert refusal(gone) == (grpc.StatusCode.NOT_FOUND, "PoolNotFound")


async def test_requests_are_idempotent_and_names_are_taken_once(plane: Plane) -> None:
    await plane.host()
    client = await plane.client()
    await client.import_image()
    dry = await create(client, validate_only=True)
    assert dry.uid == ""
    first = await create(client, request_id="r1")
    assert (await create(client, request_id="r1")).uid == first.uid
    with pytest.raises(grpc.aio.AioRpcError) as reused:
        await create(client, size=5, request_id="r1")
    assert refusal(reused) == (grpc.StatusCode.INVALID_ARGUMENT, "RequestIdReused")
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await create(client, request_id="r2")
    assert refusal(taken) == (grpc.StatusCode.ALREADY_EXISTS, "PoolExists")
    await client.pools.DeletePool(pools_pb2.DeletePoolRequest(name="web"), timeout=10)
    await client.pools.DeletePool(pools_pb2.DeletePoolRequest(name="web", allow_missing=True), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError):
        await client.pools.DeletePool(pools_pb2.DeletePoolRequest(name="web"), timeout=10)


async def test_nonsense_is_refused_by_its_field(plane: Plane) -> None:
    await plane.host()
    client = await plane.client()
    await client.import_image()
    other = spec_of()
    setattr(other, "class", sandboxes_pb2.USER_KERNEL)
    for name, spec, code in (
        ("Web", spec_of(), grpc.StatusCode.INVALID_ARGUMENT),
        ("web", spec_of(size=1001), grpc.StatusCode.INVALID_ARGUMENT),
        ("web", spec_of(memory_mib=0), grpc.StatusCode.INVALID_ARGUMENT),
        ("web", spec_of(image=""), grpc.StatusCode.INVALID_ARGUMENT),
        ("web", other, grpc.StatusCode.INVALID_ARGUMENT),
        ("web", spec_of(image="none"), grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await create(client, name, spec=spec)
        assert refused.value.code() == code, (name, spec)


async def test_tenants_do_not_see_each_other_s_pools(plane: Plane) -> None:
    host = await plane.host()
    one, two = await plane.client(Role.TENANT, "one"), await plane.client(Role.TENANT, "two")
    await one.import_image()
    pool = await create(one)
    with pytest.raises(grpc.aio.AioRpcError) as hidden:
        await get(two)
    assert hidden.value.code() == grpc.StatusCode.NOT_FOUND
    assert not (await two.pools.ListPools(pools_pb2.ListPoolsRequest(), timeout=10)).pools
    await report(host, pool, ready=1)
    host.ledger = sandboxes_pb2.SharingLedger(
        sandboxes=[sandboxes_pb2.SandboxMemory(name="web", uid=f"pool-{pool.uid}-beef", host="h1")]
    )
    asked = sandboxes_pb2.GetSharingLedgerRequest()
    assert [row.name for row in (await one.sandboxes.GetSharingLedger(asked, timeout=10)).sandboxes] == ["web"]
    assert not (await two.sandboxes.GetSharingLedger(asked, timeout=10)).sandboxes
    with pytest.raises(grpc.aio.AioRpcError) as denied:
        call = host.sync.WatchPools(hosts_pb2.WatchPoolsRequest(host="another"))
        await anext(aiter(call))
    assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_a_pool_counts_in_its_tenant_s_quota(configured: Configured, certificates: Certificates) -> None:
    config = configured(quotas=(("default", Quota(memory_min_mib=1024)),))
    async with planed(config, certificates) as plane:
        await plane.host()
        client = await plane.client()
        await client.import_image()
        await create(client, size=3)
        await client.create("one", memory_mib=256)
        with pytest.raises(grpc.aio.AioRpcError) as full:
            await client.create("two", memory_mib=256)
        assert refusal(full) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QuotaExceeded")
        with pytest.raises(grpc.aio.AioRpcError) as larger:
            await client.pools.ResizePool(pools_pb2.ResizePoolRequest(name="web", size=4), timeout=10)
        assert refusal(larger) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QuotaExceeded")


@pytest.mark.parametrize(
    ("quota", "bound"),
    [
        (Quota(sandboxes=2), "sandboxes"), (Quota(memory_max_mib=2048), "memory_max_mib"),
        (Quota(cpu_milli=2000), "cpu_milli"), (Quota(memory_min_mib=512), "memory_min_mib"),
    ],
)  # fmt: skip
async def test_members_count_in_every_bound_and_a_claim_counts_once(
    configured: Configured, certificates: Certificates, quota: Quota, bound: str
) -> None:
    async with planed(configured(quotas=(("default", quota),)), certificates) as plane:
        host, client = await plane.host(), await plane.client()
        await client.import_image()
        with pytest.raises(grpc.aio.AioRpcError) as full:
            await create(client, size=3)
        assert parse_error(full.value).detail("quota") == bound
        async with watching(host) as watch:
            pool = await create(client, size=2)
            await watch.until({"web": 2})
            with pytest.raises(grpc.aio.AioRpcError) as beside:  # no member is ready: it would come on top of them
                await client.create("one", max_mib=1024, cpu_milli=1000)
            failure = parse_error(beside.value)
            assert (failure.detail("quota"), failure.reason) == (bound, "QuotaExceeded")
            await report(host, pool, 2)
            one = await client.create("one", max_mib=1024, cpu_milli=1000)
            await host.until(lambda: one.uid in host.assigned)
            await host.tell(one.uid, phase=sandboxes_pb2.RUNNING)
            await watch.until({"web": 1})
            assert "1 of 2 members fit into the tenant's quota" in (await get(client)).message
            used = (await client.tenants.GetTenant(tenants_pb2.GetTenantRequest(name="default"), timeout=10)).usage
            assert (used.sandboxes, used.memory_max_mib, used.cpu_milli) == (2, 2048, 2000)
            await host.tell(one.uid, phase=sandboxes_pb2.EXITED, exit_code=0)
            await watch.until({"web": 2})


async def test_a_host_with_a_ready_member_is_preferred_and_the_event_says_so(plane: Plane) -> None:
    big, small = await plane.host("h1"), await plane.host("h2")
    client = await plane.client()
    start = images_pb2.ImportImageRequest.Start(name="base", host="h1")
    for host in ("h1", "h2"):
        start.host = host
        messages = [images_pb2.ImportImageRequest(start=start), images_pb2.ImportImageRequest(chunk=b"x")]
        assert [answer async for answer in client.images.ImportImage(iter(messages), timeout=10)]
    pool = await create(client, size=2)
    assert [(row.host, row.wanted) for row in pool.hosts] == [("h1", 1), ("h2", 1)]
    await report(small, pool, 1)
    await report(big, pool, 0, 1)
    warm = await client.create("warm", max_mib=1024)
    assert warm.assignment.host == "h2"
    assert "it has a ready member of pool web" in warm.status.message
    larger = await client.create("larger", max_mib=2048)
    assert "ready member" not in larger.status.message  # it goes where its layers are mapped, as any other


async def test_a_pool_ends_with_its_image_and_says_why(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    await create(client)
    async with watching(host) as watch:
        await watch.until({"web": 2})
        await client.images.DeleteImage(images_pb2.DeleteImageRequest(name="base"), timeout=10)
        await watch.until({})
    pool = await get(client)
    assert "image base has been removed" in pool.message
    assert sum(row.wanted for row in pool.hosts) == 0


async def test_events_of_hosts_about_a_pool_reach_its_tenant(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client(Role.TENANT, "one")
    await client.import_image()
    await create(client)
    event = sandboxes_pb2.Event(kind="pool", subject="web", reason="PoolReady", message="2 of 2 members are ready")
    event.time.GetCurrentTime()
    await host.sync.RecordEvent(hosts_pb2.RecordEventRequest(event=event), timeout=10)
    told = client.sandboxes.WatchEvents(sandboxes_pb2.WatchEventsRequest(subject="web"), timeout=10)
    assert [one.reason async for one in told] == ["PoolCreated", "PoolReady"]
