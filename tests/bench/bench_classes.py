"""`make bench-classes`: what the OCI classes cost above their bare runtimes, and how often an image is in memory.

Start: from nothing to the first byte of a workload that says one, each round in turn:
- peer: the bare runtime (`crun run`, `runsc run`) on the bundle that hostd wrote for it, with the same limits, which it
  puts into cgroups itself; its root file system mounted already, read through a pipe.
- us: the driver, which mounts the root file system, makes the cgroup, starts the monitor and through it the runtime,
  and reads through the agent protocol.

Sharing: 50 sandboxes of one image, half user-kernel, half host-kernel, that all read the same 75 MiB of it. One copy is
what the page cache holds of the image after the first of them; what is asked is how much more it is after the last. The
pages are charged to the first one's cgroup, so it must have room for them: in 64 MiB the kernel takes 6 of them back
while it reads, and what is left is less than a copy. That next to nothing was evicted is part of the measure.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

from hostd.drivers.contract import LayerFile
from hostd.drivers.oci.driver import OciDriver
from hostd.spec import Resources
from native import _dax
from tests.bench.bare import SAY, Place, bare_bundle, bare_run, place, where_crun_runs
from tests.bench.report import CannotMeasure, Report, Runs, interleaved, ratio, run
from tests.contract.driver_suite import command
from tests.hostd.busybox import busybox, rootfs_tar
from tests.userland import UserlandUnavailable, userland_tar

ROUNDS = 61
SANDBOXES = 50
PAGE_MIB = 4096 / (1 << 20)
EVICTED_SHARE = 0.01
ROOMY = Resources(256, 512, 256, 2000)
"""Of who reads: the whole of it fits."""

READ = (
    "sh", "-c",
    "cat /usr/bin/* /usr/lib/*/lib*.so* /usr/lib/python3*/*.py 2>/dev/null | wc -c; echo ready; exec sleep 100000",
)  # fmt: skip
POOL_MEASURE = "host-kernel start from a pool"
BARS = {"crun": ("host-kernel start", 1.2), "runsc": ("user-kernel start", 1.1)}


def start(at: Place, report: Report, name: str, layer: LayerFile) -> None:
    """One class against its bare runtime."""
    driver, runtime = at.driver(name), at.runtimes[name]
    measure, bound = BARS[name]
    with asyncio.Runner() as runner:

        def ours() -> float:
            return runner.run(_ours(at, driver, layer))

        bare = runner.run(bare_bundle(at, driver, (layer,)))
        try:
            times = interleaved({"peer": lambda: bare_run(runtime, bare), "us": ours}, rounds=ROUNDS)
        finally:
            runner.run(driver.destroy(bare.spec.uid, bare.folder, None))
    report.row(f"{name} run, bare, to its first output", times["peer"])
    report.row(f"{measure}, by the driver, to its first output", times["us"])
    overhead = ratio(times["us"], times["peer"])
    report.bar(measure, overhead, at_most=bound, peer=f"bare {name} run")


async def _ours(at: Place, driver: OciDriver, layer: LayerFile) -> float:
    plan = at.plan("us", (layer,))
    begin = time.perf_counter()
    engine = await driver.start(plan, lambda _: None)
    try:
        main = await engine.spawn(command(SAY), main=True)
        async for _ in main.output():
            break
        return 1000 * (time.perf_counter() - begin)
    finally:
        await engine.detach()
        await driver.destroy(plan.spec.uid, plan.folder, engine.handle)


def claim(at: Place, report: Report, layer: LayerFile) -> None:
    """A warm host-kernel sandbox's claim against bare `runsc run`."""
    driver, peer = at.driver("crun"), at.driver("runsc")
    with asyncio.Runner() as runner:
        bare = runner.run(bare_bundle(at, peer, (layer,)))
        try:
            times = interleaved(
                {
                    "peer": lambda: bare_run(at.runtimes["runsc"], bare),
                    "us": lambda: runner.run(_claimed(at, driver, layer)),
                },
                rounds=ROUNDS,
            )
        finally:
            runner.run(peer.destroy(bare.spec.uid, bare.folder, None))
    report.row(f"{POOL_MEASURE}, to its first output", times["us"])
    report.bar(POOL_MEASURE, ratio(times["peer"], times["us"]), at_least=5, peer="bare runsc run")


async def _claimed(at: Place, driver: OciDriver, layer: LayerFile) -> float:
    """From a claim to the first byte; the member is made before, as a pool does."""
    plan = at.plan("pool", (layer,))
    assert driver.warming is not None
    guest = await driver.warming.prewarm(plan, lambda _: None)
    mine = at.plan("claims", (layer,))
    begin = time.perf_counter()
    engine = await driver.warming.claim(guest, mine, lambda _: None)
    try:
        main = await engine.spawn(command(SAY), main=True)
        async for _ in main.output():
            break
        return 1000 * (time.perf_counter() - begin)
    finally:
        await engine.detach()
        await driver.destroy(mine.spec.uid, mine.folder, engine.handle)


def sharing(at: Place, report: Report) -> None:
    """Fifty sandboxes of one image."""
    try:
        layer = at.layer(userland_tar(), "userland")
    except UserlandUnavailable as error:
        raise CannotMeasure(str(error)) from error
    with asyncio.Runner() as runner:
        first_mib, cached, blob_mib, read_mib, private = runner.run(_fifty(at, layer))
    report.row("the image in the page cache after one", Runs((first_mib,), "MiB"))
    report.row(f"the image in the page cache after {SANDBOXES}", Runs((cached,), "MiB"))
    report.row("of it the blob file itself", Runs((blob_mib,), "MiB"))
    report.row("each of them read", Runs((read_mib,), "MiB"))
    for name, values in private.items():
        report.row(f"charged to one more {name} sandbox", Runs(tuple(values), "MiB"))
    measure = f"{SANDBOXES} sandboxes of two classes: the image in memory"
    report.bar(measure, Runs((cached / first_mib,), "x"), at_most=1.05, peer="one copy")
    report.note("Guests of the image are given the same pages: tests/hostd/drivers/oci/test_onecopy.py counts them.")


async def _fifty(at: Place, layer: LayerFile) -> tuple[float, float, float, float, dict[str, list[float]]]:
    names = list(BARS)
    drivers = {name: at.driver(name) for name in names}
    private: dict[str, list[float]] = {name: [] for name in names}
    first_mib = read_mib = 0.0
    async with AsyncExitStack() as stack:
        for number in range(SANDBOXES):
            name = names[number % 2]
            plan = at.plan(f"{number}", (layer,), ROOMY)
            engine = await drivers[name].start(plan, lambda _: None)
            stack.push_async_callback(drivers[name].destroy, plan.spec.uid, plan.folder, engine.handle)
            stack.push_async_callback(engine.detach)
            main = await engine.spawn(command(READ), main=True)
            said = b""
            async for piece in main.output():
                said += piece.data
                if b"ready" in said:
                    break
            read_mib = int(said.split()[0]) / (1 << 20)
            if number == 0:
                first_mib, _, evicted_mib = cached_mib(drivers[name].layers.point(layer), layer.path)
                if evicted_mib > EVICTED_SHARE * first_mib:
                    raise CannotMeasure(f"{evicted_mib:.1f} MiB of the one copy were evicted while it was read")
            else:
                private[name].append(at.cgroups.usage_bytes(plan.spec.uid) / (1 << 20))
        all_mib, blob_mib, _ = cached_mib(drivers[names[0]].layers.point(layer), layer.path)
    return first_mib, all_mib, blob_mib, read_mib, private


def cached_mib(mount: Path, blob: Path) -> tuple[float, float, float]:
    """(the image's files and its blob together, the blob) in the page cache, each page once; and what was but is no
    more."""
    files: dict[int, tuple[int, int]] = {}
    for folder, _, names in os.walk(mount):
        for name in names:
            path = Path(folder) / name
            if not path.is_file() or path.is_symlink():
                continue
            with path.open("rb") as file:
                pages = _dax.cachestat(file)
                files[os.fstat(file.fileno()).st_ino] = pages.cached, pages.evicted
    with blob.open("rb") as file:
        blob_pages = _dax.cachestat(file).cached
    cached, evicted = (sum(each) for each in zip(*files.values(), strict=True))
    return (cached + blob_pages) * PAGE_MIB, blob_pages * PAGE_MIB, evicted * PAGE_MIB


def body(report: Report) -> None:
    program = busybox()
    if program is None:
        raise CannotMeasure("needs busybox (Debian: busybox-static)")
    with place() as at:
        report.machine["runsc_platform"] = at.runtimes["runsc"].platform
        layer = at.layer(rootfs_tar(program), "busybox")
        for name in BARS:
            start(at, report, name, layer)
        claim(at, report, layer)
        sharing(at, report)


if __name__ == "__main__":
    where_crun_runs(__spec__.name)
    raise SystemExit(run("classes", body, [*BARS.values(), (POOL_MEASURE, 5)]))
