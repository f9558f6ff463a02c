"""OCI drivers with real runtimes over images of their own, and a look at what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Driver, Engine, LayerFile, ProcessLink, StartPlan
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.monitor import MONITOR
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.oci.probe import decide
from hostd.drivers.oci.runtime import Runtime
from hostd.journal import Handle
from hostd.spec import Resources
from tests.contract.driver_suite import FLOOD_BYTES, SMALL, Programs, Rig, collect, command, spec_of
from tests.hostd.busybox import busybox, rootfs_tar
from tests.sharedcache.tarkit import convert

CACHE = Path("/var/cache/sandloom")
RUNTIMES = ("crun", "runsc")


def sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


PROGRAMS = Programs(
    cat=("cat",),
    sleep=("sleep", "100000"),
    deaf=sh("trap '' TERM INT HUP; echo ready; while :; do sleep 0.1; done"),
    polite=sh("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done"),
    env=("env",),
    pwd=("pwd",),
    size=sh("trap 'stty size' WINCH; stty size; read line & wait; while ! read -t 1 line; do :; done"),
    fault=sh("kill -SEGV $$"),
    unrunnable=("/etc/passwd",),
    flood=sh(f"seq -w 0 {10**15 - 1} | head -c {FLOOD_BYTES}"),
    say=sh("printf out; printf err >&2; exit 7"),
)


def layer_of(tar: bytes | Path, blob: Path) -> LayerFile:
    """A tar converted into a layer at `blob`, on the disk as the store has it: dirty pages cannot be let go of."""
    meta = convert(tar, blob)
    with blob.open("rb") as file:
        os.fsync(file.fileno())
    return LayerFile(blob, meta.blob_bytes, meta.volume_uuid, 0)


@dataclass(frozen=True)
class Surroundings:
    """What OCI drivers need and tests share."""

    root: Path
    cgroups: Hierarchy
    runtimes: dict[str, Runtime]
    layers: tuple[LayerFile, ...]

    def runtime(self, name: str) -> Runtime:
        """Skips, and says why, when it does not run here."""
        return self.runtimes[name]


@contextlib.contextmanager
def surroundings() -> Iterator[Surroundings]:
    """Skips, and says why, when no container can be run here."""
    program = busybox()
    if os.geteuid() != 0:
        pytest.skip("needs root: the OCI classes mount, and make cgroups")
    if program is None:
        pytest.skip("needs busybox (Debian: busybox-static) for the image")
    if not MONITOR.exists():
        pytest.skip("needs sandloom-monitor: run `make setup`")
    cgroups = Hierarchy.probe()
    cgroups.prepare()
    runtimes: dict[str, Runtime] = {}
    for name in RUNTIMES:
        runtime, why = asyncio.run(decide(name, cgroups, CACHE))
        if runtime is None:
            pytest.skip(why)
        runtimes[name] = runtime
    root = Path(tempfile.mkdtemp(prefix="sl-o-", dir="/var/tmp"))
    try:
        (root / "run").mkdir(mode=0o711)
        yield Surroundings(root, cgroups, runtimes, (layer_of(rootfs_tar(program), root / "blob"),))
        left = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(root) in line]
        assert left == [], "mounts stay"
    finally:
        shutil.rmtree(root)


class OciRig(Rig):
    """See tests.contract.driver_suite.Rig."""

    programs = PROGRAMS

    def __init__(self, around: Surroundings, name: str, *, ways: tuple[str, ...] = ("file", "loop")) -> None:
        self.around, self.runtime, self._ways = around, around.runtime(name), ways
        self.driver: Driver = self.new_driver()

    def new_driver(self) -> OciDriver:
        return OciDriver(self.runtime, Layers(self.around.root / "mounts", self._ways), self.around.cgroups)

    def plan(self, uid: str, resources: Resources = SMALL, layers: tuple[LayerFile, ...] | None = None) -> StartPlan:
        name = f"{uid}-{self.runtime.name}-{os.getpid()}"  # cgroups are the machine's: two test runs must not meet
        spec = replace(spec_of(name, resources, hostname=uid))
        return StartPlan(spec, self.around.layers if layers is None else layers, 0, self.around.root / "run" / name)

    def reborn(self) -> Driver:
        return self.new_driver()

    def kill(self, handle: Handle) -> None:
        os.kill(handle.pid, signal.SIGKILL)

    def left(self, plan: StartPlan) -> list[str]:
        return left_of(plan.spec.uid, plan.folder)

    @contextlib.asynccontextmanager
    async def box(
        self,
        uid: str,
        argv: tuple[str, ...] = ("sleep", "100000"),
        resources: Resources = SMALL,
        layers: tuple[LayerFile, ...] | None = None,
        **changes: object,
    ) -> AsyncIterator[tuple[Engine, ProcessLink]]:
        """A sandbox that runs `argv`; nothing of it is left afterwards, which is asserted."""
        plan = self.plan(uid, resources, layers)
        engine = await self.driver.start(plan, lambda _: None)
        try:
            yield engine, await engine.spawn(command(argv, **changes), main=True)
        finally:
            await engine.detach()
            await self.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        assert self.left(plan) == []


async def run(engine: Engine, argv: tuple[str, ...], **changes: object) -> tuple[str, str, int]:
    """Another command in a sandbox: its two streams and its exit code."""
    process = await engine.spawn(command(argv, **changes), main=False)
    out, err, ended = await collect(process)
    await process.release()
    return out.decode(), err.decode(), ended.code


def left_of(uid: str, folder: Path) -> list[str]:
    """Processes, cgroups, folders, sockets and mounts of one sandbox."""
    found = [f"folder {folder}"] if folder.exists() else []
    for pattern in (f"*/sandloom/{uid}", f"sandloom/{uid}"):
        found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(pattern)]
    found += [f"process {pid}: {line}" for pid, line in processes() if uid in line]
    for name in ("/proc/net/unix", "/proc/self/mountinfo"):
        found += [f"{name}: {line}" for line in Path(name).read_text().splitlines() if str(folder) in line]
    return found


def processes() -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process but this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(entry.name), words or (entry / "comm").read_text().strip()
