"""Real guests: what walls one in, what ends with it, how big it can become, what it is made of."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from hostd import images
from hostd.drivers.contract import Engine, Exit, LayerFile, StartPlan
from hostd.drivers.qemu.driver import QemuDriver
from hostd.lifecycle import ENDED, Phase
from hostd.resize import ResizeState
from hostd.spec import DesiredState, ProcessSpec, Resources
from sharedcache import oci
from tests.contract.driver_suite import Handles, collect, command, spec_of
from tests.hostd.busybox import files_tar
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings, left_of
from tests.hostd.hostkit import Host, config_of, until

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def stranger(around: Surroundings) -> LayerFile:
    """A layer of another tenant, with the very bytes of ours."""
    image = oci.import_archive(around.store, around.archive, domain=images.domain_of("globex"))
    ready = images.take(around.store, replace(spec_of("globex-image", image_digest=image.digest), tenant="globex"))
    return ready.layers[0]


@pytest.mark.asyncio(loop_scope="class")
class TestWalls:
    """Two guests side by side."""

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def pair(cls, around: Surroundings) -> AsyncIterator[list[tuple[StartPlan, Engine]]]:
        rig = QemuRig(around, 261_000)
        plans = [rig.plan("left"), rig.plan("right")]
        engines = await asyncio.gather(*(rig.driver.start(plan, Handles()) for plan in plans))
        yield list(zip(plans, engines, strict=True))
        for plan, engine in zip(plans, engines, strict=True):
            await engine.detach()
            await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
            assert rig.left(plan) == []

    async def test_each_has_its_own_uid_and_no_way_back_to_root(
        self, around: Surroundings, pair: list[tuple[StartPlan, Engine]]
    ) -> None:
        assert len({plan.vm_uid for plan, _ in pair}) == 2
        for plan, engine in pair:
            status = status_of(engine.handle.pid)
            assert status["Uid"].split() == [str(plan.vm_uid)] * 4
            assert status["Gid"].split() == [str(plan.vm_uid)] * 4
            groups = {around.kernel.gid, *(layer.gid for layer in plan.layers)}
            assert set(map(int, status["Groups"].split())) == groups
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[kind], 16) == 0, kind
            assert status["NoNewPrivs"] == "1"

    async def test_every_thread_is_behind_the_filter(self, pair: list[tuple[StartPlan, Engine]]) -> None:
        for _, engine in pair:
            threads = threads_of(engine.handle.pid)
            assert len(threads) > 1
            assert [status["Seccomp"] for status in threads] == ["2"] * len(threads)

    async def test_each_is_in_its_own_cgroup_alone(
        self, around: Surroundings, pair: list[tuple[StartPlan, Engine]]
    ) -> None:
        for plan, engine in pair:
            assert around.cgroups.pids(plan.spec.uid) == {engine.handle.pid}
            assert around.cgroups.usage_bytes(plan.spec.uid) > 32 << 20

    async def test_neither_reaches_the_others_directory_nor_another_domains_layer(
        self, pair: list[tuple[StartPlan, Engine]], stranger: LayerFile
    ) -> None:
        (left, engine), (right, _) = pair
        own, others = left.layers[0].path, stranger.path
        assert own.read_bytes() == others.read_bytes()
        assert own.stat().st_ino != others.stat().st_ino
        allowed = ["test", "-r", str(own)]
        refused = [
            ["test", "-r", str(others)],
            ["ls", str(right.folder)],
            ["test", "-e", str(right.folder / "qmp.sock")],
            ["ls", str(left.folder.parent)],
            ["ls", str(own.parent.parent.parent)],
            ["test", "-w", str(own)],
            ["touch", str(own)],
            ["test", "-r", f"/proc/{pair[1][1].handle.pid}/mem"],
            ["kill", "-0", str(pair[1][1].handle.pid)],
        ]
        assert as_vm(engine, allowed) == 0
        assert [argv for argv in refused if as_vm(engine, argv) == 0] == []
        assert left.folder.stat().st_mode & 0o777 == 0o700

    async def test_none_of_its_memory_goes_to_a_core_dump(self, pair: list[tuple[StartPlan, Engine]]) -> None:
        for _, engine in pair:
            assert core_limits(engine.handle.pid) == ["0", "0"]


def core_limits(pid: int) -> list[str]:
    limits = Path(f"/proc/{pid}/limits").read_text()
    return next(line for line in limits.splitlines() if "core file" in line).split()[4:6]


def status_of(pid: int) -> dict[str, str]:
    return parse_status(Path(f"/proc/{pid}/status"))


def threads_of(pid: int) -> list[dict[str, str]]:
    return [parse_status(task / "status") for task in Path(f"/proc/{pid}/task").iterdir()]


def parse_status(path: Path) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in path.read_text().splitlines())}


def as_vm(engine: Engine, argv: list[str]) -> int:
    """The exit status of a command run with exactly a VM's credentials."""
    status = status_of(engine.handle.pid)
    uid, groups = status["Uid"].split()[0], ",".join(status["Groups"].split())
    drop = [f"--reuid={uid}", f"--regid={uid}", f"--groups={groups}", "--bounding-set=-all", "--no-new-privs"]
    return subprocess.run(["setpriv", *drop, "--", *argv], capture_output=True, timeout=20).returncode


async def test_an_image_of_many_layers_is_joined_in_order(around: Surroundings, tmp_path: Path) -> None:
    """More than one PCI slot holds; each layer above overrides one file of those below."""
    layers = list(around.layers)
    for number in range(10):
        archive = tmp_path / f"{number}.tar"
        archive.write_bytes(files_tar({f"layer-{number}": b"%d\n" % number, "top": b"%d\n" % number}))
        image = oci.import_archive(around.store, archive, domain=images.domain_of("acme"))
        layers += images.take(around.store, spec_of(f"many-{number}", image_digest=image.digest)).layers
    rig = QemuRig(around, 262_000)
    plan = rig.plan("many", layers=tuple(layers))
    engine = await rig.driver.start(plan, Handles())
    try:
        main = await engine.spawn(command(("sh", "-c", "cat /layer-* /top; mount | grep -c erofs; ls /dev")), main=True)
        out, err, ended = await collect(main)
        words = out.decode().split()
        assert (words[:11], err, ended) == ([*map(str, range(10)), "9"], b"", Exit(0))
        assert not [word for word in words if word.startswith("pmem")]
    finally:
        await engine.detach()
        await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
    assert rig.left(plan) == []


# Sandboxes of real guests.


@pytest.fixture
def shared_memory() -> Iterator[None]:
    """No memory file is left."""
    before = set(Path("/dev/shm").iterdir())
    yield
    assert set(Path("/dev/shm").iterdir()) <= before


@pytest_asyncio.fixture
async def host(around: Surroundings, shared_memory: None) -> AsyncIterator[Host]:
    """Sandboxes with the QEMU driver, on the session's store."""
    state = around.root / f"state-{time.monotonic_ns()}"
    config = replace(config_of(state), run_dir=around.root / "run")
    driver = QemuDriver(around.kernel, "tcg", around.cgroups, boot_deadline_s=120.0)
    running = Host(config, around.store, driver, around.image_digest)
    await running.up()
    yield running
    for sandbox in running.sandboxes.all():
        running.want(sandbox, DesiredState.REMOVED)
    await until(lambda: running.sandboxes.all() == [], 60)
    await running.down()


async def test_a_killed_vmm_ends_its_sandbox_within_a_second_and_nothing_is_left(host: Host) -> None:
    uid = f"victim-{os.getpid()}"
    sandbox = host.assign(uid, "sleep", "1000")
    await until(lambda: sandbox.record.phase in (Phase.RUNNING, *ENDED), 120)
    handle = sandbox.record.handle
    assert handle is not None, sandbox.record
    assert left_of(uid, sandbox.folder, handle.vm_uid) != []
    os.kill(handle.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    await until(lambda: sandbox.record.phase in ENDED)
    assert time.monotonic() - killed_s < 1.0
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.FAILED, "VmmExited")
    assert "SIGKILL" in sandbox.record.message
    assert left_of(uid, sandbox.folder, handle.vm_uid) == []


async def test_a_sandbox_grows_to_its_ceiling_and_shrinks_again(host: Host) -> None:
    sandbox = host.assign(f"elastic-{os.getpid()}", process=ProcessSpec(argv=("cat",), stdin=True))
    await until(lambda: sandbox.live is not None or sandbox.record.phase in ENDED, 120)
    engine = sandbox.running().engine

    async def total_mib() -> int:
        """What the guest's kernel has, less what the balloon holds."""
        process = await engine.spawn(command(("grep", "-E", "MemTotal|Hugetlb", "/proc/meminfo")), main=False)
        out, _, _ = await collect(process)
        await process.release()
        return int(out.split()[1]) - int(out.split()[4]) >> 10

    async def resize(memory_mib: int) -> int:
        host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, memory_mib, 1000))
        await until(
            lambda: (r := sandbox.resize) is not None and r.desired_mib == memory_mib and r.state is ResizeState.DONE,
            60,
        )
        return await total_mib()

    small_mib = await total_mib()
    assert 768 - 2 <= await resize(1024) - small_mib <= 768  # all of it, to the ceiling
    assert await resize(300) - small_mib <= 48
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 300, 5000))
    await until(lambda: (r := sandbox.resize) is not None and r.state is ResizeState.INFEASIBLE)


async def test_a_command_is_stopped_in_time_and_its_last_words_are_kept(host: Host) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo hello; while :; do sleep 0.1; done"
    sandbox = host.assign(f"polite-{os.getpid()}", "sh", "-c", script)
    await until(lambda: bool(sandbox.log.kept()) or sandbox.record.phase in ENDED, 120)
    host.want(sandbox, DesiredState.STOPPED)
    await until(lambda: sandbox.record.phase in ENDED, 20)
    assert (sandbox.record.reason, sandbox.record.exit_code) == ("Stopped", 4)
    assert b"".join(entry.data for entry in sandbox.log.kept()) == b"hello\nbye\n"
