"""The bare OCI runtimes, for who wants to be measured beside them: `crun run` and `runsc run` of a bundle of hostd's.

The root file system is mounted already and the output read through a pipe; the runtime makes the cgroup itself, with
the limits that the bundle has.

Bare crun refuses to run beside a cgroup v2 tree on a v1 host. A benchmark that can live where none is in sight goes
there as a whole (where_crun_runs); one that cannot has a process of this module there, which runs what it is told to:

    stdin   a line: the name of a runtime
    stdout  a line of JSON: {"ms": 12.3}, or {"lacks": "why it cannot be measured"}; the first one, {"ms": 0}, says
            that all is prepared

It ends, and leaves nothing, when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from hostd.cgroups import Hierarchy
from hostd.drivers.contract import LayerFile, StartPlan
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.oci.plan import limits_for
from hostd.drivers.oci.probe import HYBRID_CGROUPS, decide
from hostd.drivers.oci.runtime import Runtime
from hostd.spec import Resources
from tests.bench.leftovers import unwound_by_signals
from tests.bench.report import CannotMeasure
from tests.contract.driver_suite import command, spec_of
from tests.sharedcache.tarkit import convert

RUNTIMES = ("crun", "runsc")
CACHE = Path("/var/cache/sandloom")
SMALL = Resources(64, 256, 64, 2000)
SAY = ("sh", "-c", "echo ready; exec sleep 100000")
ECHO, ECHOED = ("echo", "here"), b"here\n"
INSIDE = "SANDLOOM_BENCH_INSIDE"
ANSWER_DEADLINE_S, END_DEADLINE_S = 120.0, 60.0


@dataclass(frozen=True)
class Place:
    """Where and with what the benchmark runs."""

    root: Path
    cgroups: Hierarchy
    runtimes: dict[str, Runtime]

    def driver(self, name: str) -> OciDriver:
        return OciDriver(self.runtimes[name], Layers(self.root / "mounts"), self.cgroups)

    def plan(self, uid: str, layers: tuple[LayerFile, ...], resources: Resources = SMALL) -> StartPlan:
        name = f"bench-{uid}-{os.getpid()}"
        return StartPlan(spec_of(name, resources, hostname=uid), layers, 0, self.root / "run" / name)

    def layer(self, tar: bytes | Path, name: str) -> LayerFile:
        blob = self.root / f"{name}.blob"
        meta = convert(tar, blob)
        with blob.open("rb") as file:
            os.fsync(file.fileno())  # as the store does; dirty pages cannot be let go of
        return LayerFile(blob, meta.blob_bytes, meta.volume_uuid, 0)


@contextmanager
def place() -> Iterator[Place]:
    """CannotMeasure, and says why, where no container runs. Its sandboxes are in a group of the benchmark's own: in the
    one of a hostd that runs here, or of another benchmark, all of them would share one task's weight, which a bare
    runtime has to itself."""
    if os.geteuid() != 0:
        raise CannotMeasure("needs root: the OCI classes mount, and make cgroups")
    cgroups = Hierarchy.probe(name=f"sandloom-bench-{os.getpid()}")
    root = Path(tempfile.mkdtemp(prefix="sl-bench-", dir="/var/tmp"))
    try:
        cgroups.prepare()
        runtimes: dict[str, Runtime] = {}
        for name in RUNTIMES:
            runtime, why = asyncio.run(decide(name, cgroups, CACHE))
            if runtime is None:
                raise CannotMeasure(why)
            runtimes[name] = runtime
        (root / "run").mkdir()
        yield Place(root, cgroups, runtimes)
    finally:
        shutil.rmtree(root)
        _forget(name_of(cgroups))


def _forget(name: str) -> None:
    """Removes the groups that a bare runtime made, in every tree; where crun took a v2 tree's place for one that is not
    in sight, what it made there are plain files."""
    for group in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        if str(group.parent) == HYBRID_CGROUPS and not os.path.ismount(HYBRID_CGROUPS):
            shutil.rmtree(group)
        else:
            group.rmdir()
    v2 = Path("/sys/fs/cgroup", name)
    if v2.exists():
        v2.rmdir()


def name_of(cgroups: Hierarchy) -> str:
    """The parent group of its sandboxes. Pure."""
    return next(iter(cgroups.roots.values())).name


async def bare_bundle(
    at: Place,
    driver: OciDriver,
    layers: tuple[LayerFile, ...],
    argv: tuple[str, ...] = SAY,
    resources: Resources = SMALL,
) -> StartPlan:
    """A mounted root file system and the bundle that hostd writes, with `argv` in place of its own init. The driver's
    destroy() of the plan removes it."""
    name = driver.runtime.name
    plan = at.plan(f"bare-{name}", layers, resources)
    engine = await driver.start(plan, lambda _: None)
    main = await engine.spawn(command(SAY), main=True)
    await main.signal(9)
    await main.wait()
    await engine.detach()
    path = plan.folder / "config.json"
    config = json.loads(path.read_text())
    config["process"]["args"] = list(argv)
    limits = limits_for(resources, driver.runtime)
    config["linux"]["cgroupsPath"] = f"/{name_of(at.cgroups)}/{plan.spec.uid}-own"
    config["linux"]["resources"] = {
        "memory": {"limit": limits.memory_bytes},
        "cpu": {"quota": limits.cpu_milli * 100, "period": 100_000},
        "pids": {"limit": limits.pids},
    }
    path.write_text(json.dumps(config))
    return plan


def bare_run(runtime: Runtime, bundle: StartPlan, says: bytes = b"ready\n") -> float:
    """Milliseconds from the exec of the runtime to the workload's first bytes, which are `says`. CannotMeasure when
    they are not. Nothing of the container is left."""
    options = replace(runtime, state=bundle.folder / "bare").base(bundle.folder)
    base = [word for word in options if word not in ("--cgroup-manager=disabled", "--ignore-cgroups")]
    begin = time.perf_counter()
    with subprocess.Popen(
        [*base, "run", "--bundle", str(bundle.folder), "bare"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        said = os.read(child.stdout.fileno(), 64)
        took = 1000 * (time.perf_counter() - begin)
        subprocess.run([*base, "kill", "bare", "KILL"], capture_output=True, timeout=30)
        child.stdout.read()
        child.wait(timeout=30)
    subprocess.run([*base, "delete", "--force", "bare"], capture_output=True, timeout=30)
    if said != says:
        raise CannotMeasure(f"bare {runtime.name} run said {said!r}")
    return took


def inside(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` where no cgroup v2 tree is in sight. Pure, but for this Python's path."""
    script = f'umount -l {HYBRID_CGROUPS}; exec "$@"'
    away = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", script, "sh"]
    return [*away, sys.executable, "-m", module, *arguments]


def hybrid() -> bool:
    """Whether a cgroup v2 tree is beside a v1 one here, and this process is still in sight of it."""
    return os.path.ismount(HYBRID_CGROUPS) and os.geteuid() == 0 and INSIDE not in os.environ


def where_crun_runs(module: str) -> None:
    """Starts `module` anew where bare crun runs; returns where it runs already."""
    if hybrid():
        argv = inside(module)
        os.execvpe(argv[0], argv, {**os.environ, INSIDE: "1"})


def render(layers: tuple[LayerFile, ...], resources: Resources) -> str:
    """What a process of this module is told to prepare. Pure."""
    each = [[str(layer.path), layer.size_bytes, layer.volume_uuid.hex(), layer.gid] for layer in layers]
    return json.dumps({"layers": each, "resources": astuple(resources)})


def parse(text: str) -> tuple[tuple[LayerFile, ...], Resources]:
    """The reverse of render. Pure."""
    told: dict[str, Any] = json.loads(text)
    layers = tuple(LayerFile(Path(path), size, bytes.fromhex(uuid), gid) for path, size, uuid, gid in told["layers"])
    return layers, Resources(*told["resources"])


@dataclass(frozen=True)
class Bare:
    """A process of this module that has prepared all."""

    process: asyncio.subprocess.Process

    async def run(self, name: str) -> float:
        """Milliseconds to the first byte of `echo` in a bare container of this runtime. CannotMeasure."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n".encode())
        return await self.answer()

    async def answer(self) -> float:
        """Its next one. CannotMeasure."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                line = await self.process.stdout.readline()
        except TimeoutError as error:
            raise CannotMeasure(f"the bare runtimes gave no answer in {ANSWER_DEADLINE_S:.0f} s") from error
        told = json.loads(line or '{"lacks": "the process of the bare runtimes ended; its words are above"}')
        if "lacks" in told:
            raise CannotMeasure(told["lacks"])
        return float(told["ms"])


@asynccontextmanager
async def bare(layers: tuple[LayerFile, ...], resources: Resources) -> AsyncIterator[Bare]:
    """Bare containers of an image, beside guests of the same. CannotMeasure where none runs; leaves nothing."""
    told, module = render(layers, resources), "tests.bench.bare"
    argv = inside(module, told) if hybrid() else [sys.executable, "-m", module, told]
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, INSIDE: "1"},
        start_new_session=True,  # ^C is for the benchmark: this one ends in good order when its stdin does
    )
    try:
        made = Bare(process)
        await made.answer()
        yield made
    finally:
        await asyncio.shield(_end(process))


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def serve(told: str) -> None:
    """A process of this module."""
    layers, resources = parse(told)
    with place() as at, asyncio.Runner() as runner:
        drivers = {name: at.driver(name) for name in RUNTIMES}
        bundles: dict[str, StartPlan] = {}
        try:
            for name, driver in drivers.items():
                bundles[name] = runner.run(bare_bundle(at, driver, layers, ECHO, resources))
            _say(ms=0)
            for line in sys.stdin:
                name = line.strip()
                _say(ms=bare_run(at.runtimes[name], bundles[name], ECHOED))
        finally:
            for name, bundle in bundles.items():
                runner.run(drivers[name].destroy(bundle.spec.uid, bundle.folder, None))


def _say(**told: float | str) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    try:
        with unwound_by_signals():
            serve(sys.argv[1])
    except CannotMeasure as lack:
        _say(lacks=str(lack))
