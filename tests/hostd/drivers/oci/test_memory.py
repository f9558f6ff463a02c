"""Memory goes both ways under a workload that uses it, pages of an image are there once, and are the ledger's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from hostd.drivers.contract import Engine
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.engine import OciEngine
from hostd.memory.values import MemoryEventKind
from hostd.spec import Resources
from native import _dax
from tests.contract.driver_suite import command, read_until
from tests.hostd.busybox import busybox, rootfs_tar
from tests.hostd.drivers.oci.rig import OciRig, Surroundings, layer_of, run, sh

MIB = 1 << 20
BIG_MIB = 48
DEADLINE_S = 30.0
pytestmark = pytest.mark.slow


async def reach(engine: Engine, memory_mib: int) -> None:
    """Resizes, and waits until it is so."""
    await engine.resize(Resources(64, 768, memory_mib, 1000))
    await settled(engine, memory_mib)


async def settled(engine: Engine, memory_mib: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while abs((await engine.memory()).actual_mib - memory_mib) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def used_mib(engine: Engine) -> int:
    assert isinstance(engine, OciEngine)
    return engine.memory_group.usage().used_bytes // MIB


async def test_a_workload_s_memory_fits_grows_and_comes_back(each: OciRig) -> None:
    hold = sh("head -c 250000000 /dev/zero > /hold; echo held; read line; rm /hold; echo gone; read x")
    async with each.box("elastic", resources=Resources(64, 768, 64, 1000)) as (engine, _):
        await reach(engine, 700)
        holder = await engine.spawn(command(hold, stdin=True), main=False)
        output = holder.output()
        await read_until(output, b"held\n")
        assert used_mib(engine) >= 238
        before = (await engine.memory()).available_mib
        await engine.resize(Resources(64, 768, 100, 1000))  # less than it holds: the limit waits above what is used
        now = await engine.memory()
        assert 180 <= now.actual_mib <= 400  # the user-space kernel has some of it on top
        assert now.available_mib < before
        assert (await run(engine, sh("echo still here")))[0] == "still here\n"
        await holder.write(b"\n")
        await read_until(output, b"gone\n")
        await settled(engine, 100)  # and follows, without being asked again
        await holder.write(b"\n")
        assert (await holder.wait()).code == 0
        await reach(engine, 500)


async def test_the_user_space_kernel_gives_its_memory_back(around: Surroundings) -> None:
    """What a workload frees inside of runsc leaves the host's page tables, not only the Sentry's books."""
    rig = OciRig(around, "runsc")
    async with rig.box("returns", resources=Resources(256, 768, 256, 1000)) as (engine, _):

        async def held_mib() -> int:
            return sum(one.resident_kib for one in await engine.regions() if one.kind == "ram") >> 10

        before = await held_mib()
        await run(engine, sh("head -c 60000000 /dev/zero | tr '\\0' x > /dev/shm/held"))
        assert await held_mib() >= before + 50
        await run(engine, sh("rm /dev/shm/held"))
        async with asyncio.timeout(60):
            while True:
                if await held_mib() <= before + 8:
                    break
                await asyncio.sleep(0.05)
        await engine.resize(Resources(128, 768, 128, 1000))
        await settled(engine, 128)


async def test_page_cache_is_taken_back_without_a_smaller_limit(each: OciRig) -> None:
    async with each.box("reclaims") as (engine, _):
        assert isinstance(engine, OciEngine)
        limit = engine.memory_group.limit_bytes()
        await asyncio.to_thread(engine.memory_group.reclaim, 64 * MIB)
        assert engine.memory_group.limit_bytes() == limit
        assert (await run(engine, sh("echo still here")))[0] == "still here\n"


async def test_a_kill_for_want_of_memory_is_told_with_numbers(around: Surroundings) -> None:
    async with OciRig(around, "crun").box("killed", resources=Resources(64, 600, 64, 1000)) as (engine, _):
        events = aiter(engine.memory_events())
        await run(engine, sh("head -c 220000000 /dev/zero | tail"))
        async with asyncio.timeout(60):
            event = await anext(events)
        assert (event.kind, event.total_mib) == (MemoryEventKind.OOM_KILL, 64)
        assert event.oom_kills >= 1
        assert (await engine.memory()).signals.oom_kills == event.oom_kills


async def test_the_limit_is_hard(each: OciRig) -> None:
    """Who takes more than it may is ended, and nobody else is."""
    async with each.box("greedy", resources=Resources(64, 600, 64, 1000)) as (engine, _):
        _, _, code = await run(engine, sh("head -c 220000000 /dev/zero > /hold"))
        assert code != 0


async def test_cpu_follows_too(each: OciRig) -> None:
    async with each.box("cpu") as (engine, _):
        await engine.resize(Resources(256, 768, 256, 500))
        uid = engine.place.uid  # type: ignore[attr-defined]
        quotas = {
            path.read_text().split()[0]
            for folder in each.around.cgroups.folders(uid)
            for name in ("cpu.cfs_quota_us", "cpu.max")
            if (path := folder / name).exists()
        }
        assert quotas == {"50000"}


@pytest.fixture
async def three(around: Surroundings, tmp_path: Path) -> AsyncIterator[tuple[list[Engine], Path, Path]]:
    """Two user-kernel and one host-kernel sandbox of an image with a big file; that file in its mount, and the blob."""
    program = busybox()
    assert program is not None
    layer = layer_of(rootfs_tar(program, {"big": os.urandom(BIG_MIB * MIB)}), tmp_path / "blob")
    async with AsyncExitStack() as stack:
        engines: list[Engine] = []
        for name, runtime in (("one", "runsc"), ("two", "runsc"), ("three", "crun")):
            rig = OciRig(around, runtime)
            engine, _ = await stack.enter_async_context(rig.box(name, layers=(layer,)))
            engines.append(engine)
        driver = rig.driver
        assert isinstance(driver, OciDriver)
        yield engines, driver.layers.point(layer) / "big", layer.path


def cached_mib(path: Path) -> float:
    with path.open("rb") as file:
        return _dax.cachestat(file).cached * 4096 / MIB


async def test_three_sandboxes_of_two_classes_hold_an_image_once(
    three: tuple[list[Engine], Path, Path],
) -> None:
    engines, big, blob = three
    digest = (await run(engines[0], ("sha256sum", "/big")))[0]
    used = [used_mib(engine) for engine in engines]
    assert BIG_MIB - 1 < cached_mib(big) <= BIG_MIB  # the kernel may drop some of it meanwhile
    for engine in engines[1:]:
        assert (await run(engine, ("sha256sum", "/big")))[0] == digest
    assert BIG_MIB - 1 < cached_mib(big) <= BIG_MIB
    assert cached_mib(blob) < 1  # not a second time beneath
    grown = [used_mib(engine) - before for engine, before in zip(engines[1:], used[1:], strict=True)]
    assert all(mib < BIG_MIB / 4 for mib in grown), grown  # neither in the others' cgroups: the Sentry keeps no copy


async def test_the_ledger_sees_its_processes_and_shared_pages(three: tuple[list[Engine], Path, Path]) -> None:
    engines, _, _ = three
    for engine in engines:
        regions = await engine.regions()
        kinds = {region.kind for region in regions}
        assert {"vmm", "layer"} <= kinds
        assert "ram" in kinds
        assert all(region.end > region.start and region.resident_kib > 0 for region in regions)
    ranges = [(n, r.pid, r.start, r.end) for n, e in enumerate(engines) for r in await e.regions() if r.kind == "layer"]
    _, owners = _dax.page_split(ranges)
    shared = {owner: sum(pages for holders, pages in split.items() if holders == 3) for owner, _, split in owners}
    assert all(pages > 0 for pages in shared.values()), shared  # busybox's pages, in the Sentries and on the host
