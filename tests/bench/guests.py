"""Real guests for benchmarks: a store with the Debian userland and a driver, without control plane or journal."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostd import guestkernel
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Driver, Engine, LayerFile, ProcessLink, StartPlan
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.plan import GuestKernel
from hostd.images import domain_of, take
from hostd.spec import Command, ProcessSpec, Resources, SandboxSpec
from sharedcache import oci
from sharedcache.images import ImageRecord
from sharedcache.store import Store
from tests.bench import leftovers
from tests.bench.report import CannotMeasure
from tests.userland import UserlandUnavailable, userland_tar

BOOT_DEADLINE_S = 180.0
TENANT = "default"
RESOURCES = Resources(memory_min_mib=512, memory_max_mib=1024, memory_mib=512, cpu_milli=1000)


@dataclass
class Bench:
    """One host's parts, and the guests that were started on it."""

    folder: Path
    store: Store
    kernel: GuestKernel
    cgroups: Hierarchy
    image: ImageRecord
    accel: str
    layers: tuple[LayerFile, ...]
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def driver(self, layers_as: str = "pmem") -> QemuDriver:
        return QemuDriver(self.kernel, self.accel, self.cgroups, boot_deadline_s=BOOT_DEADLINE_S, layers_as=layers_as)

    def spec(self, name: str, resources: Resources = RESOURCES) -> SandboxSpec:
        return SandboxSpec(name, name, TENANT, self.image.digest, name, resources, ProcessSpec(("true",)), 1)

    def plan(self, resources: Resources = RESOURCES) -> StartPlan:
        """A guest of the image that was not there before."""
        number = next(self._numbers)
        name = f"bench-{os.getpid()}-{number}"
        return StartPlan(self.spec(name, resources), self.layers, 290_000 + number, self.folder / "run" / name)

    async def start(self, driver: Driver, resources: Resources = RESOURCES) -> Engine:
        """A configured guest; it ends with the bench, or by end()."""
        plan = self.plan(resources)
        engine = await driver.start(plan, lambda _: None)
        self._stack.push_async_callback(self.end, driver, plan, engine)
        return engine

    async def end(self, driver: Driver, plan: StartPlan, engine: Engine) -> None:
        await engine.detach()
        await driver.destroy(plan.spec.uid, plan.folder, engine.handle)

    async def end_all(self) -> None:
        await self._stack.aclose()


def command(*argv: str) -> Command:
    return Command(argv, (("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),), "/", "", False, False, 24, 80)


async def run(engine: Engine, *argv: str, main: bool = False, first: Callable[[], None] | None = None) -> bytes:
    """Runs a program to its end; its standard output. `first` is called at its first byte."""
    process: ProcessLink = await engine.spawn(command(*argv), main=main)
    out = b""
    async for piece in process.output():
        if first is not None and not out:
            first()
        if piece.stream == 1:
            out += piece.data
    ended = await process.wait()
    await process.release()
    if ended.code:
        raise CannotMeasure(f"{argv[0]} in the guest gave {ended.code}")
    return out


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{leftovers.FOLDER_PREFIX}{os.getpid()}-", dir=leftovers.FOLDERS))
    folder.chmod(0o711)  # guests' uids pass through
    (folder / "run").mkdir(mode=0o711)
    return folder


@asynccontextmanager
async def bench(accel: str = "tcg") -> AsyncIterator[Bench]:
    """A host's parts in a temporary folder; nothing is left afterwards, also when guests are on their way just then.
    What a benchmark left that was killed outright ends first."""
    if os.geteuid() != 0:
        raise CannotMeasure("needs root: each guest gets a uid and a cgroup of its own")
    try:
        tar = await asyncio.to_thread(userland_tar)
    except UserlandUnavailable as error:
        raise CannotMeasure(str(error)) from error
    cgroups = Hierarchy.probe()
    await asyncio.to_thread(leftovers.sweep, cgroups)
    folder = await asyncio.to_thread(_new_folder)
    try:
        with Store.open(folder / "store", min_free_bytes=0) as store:
            kernel = await asyncio.to_thread(guestkernel.prepare, store, folder, Path("/var/cache/sandloom"))
            image = await asyncio.to_thread(oci.import_archive, store, tar, domain=domain_of(TENANT), cmd=())
            cgroups.prepare()
            draft = Bench(folder, store, kernel, cgroups, image, accel, ())
            layers = (await asyncio.to_thread(take, store, draft.spec("layers"))).layers
            host = Bench(folder, store, kernel, cgroups, image, accel, layers)
            try:
                yield host
            finally:
                try:
                    await host.end_all()
                finally:
                    leftovers.end_guests(cgroups, leftovers.own(cgroups))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
