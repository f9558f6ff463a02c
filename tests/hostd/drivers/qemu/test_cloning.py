"""Clones of real guests: from both kinds of templates, from a broken one, across a hostd's death; nothing is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Engine, Exit, StartPlan
from hostd.drivers.qemu.template import Origin
from hostd.drivers.qemu.templates import Templates
from hostd.regions import regions_of
from hostd.spec import Resources
from sharedcache.objects import ObjectKind
from tests.bench.clones import CloneKit, clone_kit
from tests.contract.driver_suite import Handles, collect, command
from tests.hostd.busybox import busybox, rootfs_tar
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings, left_of, processes
from tests.hostd.drivers.qemu.test_restart import folder as folder  # the fixture
from tests.hostd.fakecontrolplane import assignment
from tests.hostd.hostkit import until
from tests.hostd.hostprocess import host_process
from tests.hostd.test_server import import_image

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]
FIRST_UID = 264_000
TEMPLATE_MAPPING = "/memfd:sandloom-template"


class CloneRig(QemuRig):
    """Starts clones from templates that were made once, and ends them."""

    def __init__(self, around: Surroundings, kit: CloneKit) -> None:
        self.kit = kit
        super().__init__(around, FIRST_UID)

    async def start(self, uid: str, origin: Origin, **changes: int) -> tuple[StartPlan, Engine]:
        resources = Resources(**{**vars_of(self.plan("unused")), **changes})
        plan = self.plan(uid, resources)
        return plan, await self.kit.driver(origin).start(plan, Handles())

    async def end(self, plan: StartPlan, engine: Engine) -> None:
        await engine.detach()
        await self.kit.driver(Origin.COLD).destroy(plan.spec.uid, plan.folder, engine.handle)
        assert self.left(plan) == []


def vars_of(plan: StartPlan) -> dict[str, int]:
    resources = plan.spec.resources
    return {name: getattr(resources, name) for name in ("memory_min_mib", "memory_max_mib", "memory_mib", "cpu_milli")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(around: Surroundings) -> AsyncIterator[CloneRig]:
    async with clone_kit(around.store, around.kernel, "tcg", around.cgroups) as kit:
        rig = CloneRig(around, kit)
        await kit.make(rig.plan("makes-templates"))
        yield rig
        assert [line for _, line in processes() if str(kit.run_dir) in line] == []


async def say(engine: Engine, *argv: str) -> str:
    process = await engine.spawn(command(argv), main=False)
    out, err, ended = await collect(process)
    await process.release()
    assert ended == Exit(0), err
    return out.decode()


@pytest.mark.parametrize("origin", [Origin.IMAGE, Origin.GENERIC])
async def test_a_clone_is_a_sandbox_as_a_cold_boot_is(rig: CloneRig, origin: Origin) -> None:
    plan, engine = await rig.start("like", origin, memory_mib=384)
    try:
        assert engine.origin.startswith(origin.value)
        assert [name for name, _ in engine.start_phases] == ["vmm", "restore", "answer", "agent"]
        assert await say(engine, "hostname") == "like\n"
        assert await say(engine, "cat", "/etc/hostname") == "like\n"
        assert re.fullmatch("[0-9a-f]{32}\n", await say(engine, "cat", "/etc/machine-id"))
        assert "127.0.0.1" in await say(engine, "cat", "/etc/hosts")
        sizes_mib = [await size_mib(engine, point) for point in ("/", "/dev/shm")]
        assert sizes_mib == [384, 193]  # of its own ceiling, not what its template was prepared with
        stamp = int(await say(engine, "sh", "-c", "echo > /now; stat -c %Y /now"))
        assert abs(stamp - time.time()) < 10  # not the time of its template
        await until_memory(engine, 384)
    finally:
        await rig.end(plan, engine)


async def size_mib(engine: Engine, point: str) -> int:
    """How much a mount can hold."""
    return int((await say(engine, "sh", "-c", f"df -m {point} | tail -1")).split()[1])


async def until_memory(engine: Engine, memory_mib: int) -> None:
    give_up_s = asyncio.get_running_loop().time() + 30
    while abs((now := await engine.memory()).actual_mib - memory_mib) >= 2:
        assert asyncio.get_running_loop().time() < give_up_s, now
        await asyncio.sleep(0.02)


async def test_clones_map_the_templates_memory_and_layers_but_write_their_own(rig: CloneRig) -> None:
    started = [await rig.start(f"map{number}", Origin.IMAGE) for number in range(2)]
    try:
        for number, (_, engine) in enumerate(started):
            await say(engine, "sh", "-c", f"echo {number} > /mine")
        assert [await say(engine, "cat", "/mine") for _, engine in started] == ["0\n", "1\n"]
        inodes = {memory_inode(engine.handle.pid) for _, engine in started}
        assert len(inodes) == 1
        ram = [region for region in regions_of(started[0][1].handle.pid) if region.kind == "ram"]
        assert sum(region.resident_kib for region in ram) > 0
    finally:
        for plan, engine in started:
            await rig.end(plan, engine)


def memory_inode(pid: int) -> int:
    """Of the template's memory file that a clone maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if TEMPLATE_MAPPING in line}.pop()


async def test_a_state_that_qemu_refuses_means_a_cold_boot_that_says_why(rig: CloneRig) -> None:
    templates, told = rig.kit.templates, len(rig.kit.told)
    key = rig.kit.cloner(Origin.IMAGE).fitting(rig.plan("fits")).candidates.image_key
    assert key in templates.drop_idle(pressed=True)
    [stored] = [each for each in rig.around.store.objects() if getattr(each.meta, "name", "") == key]
    assert stored.kind is ObjectKind.TEMPLATE
    spoil_state(Path(stored.path))
    plan, engine = await rig.start("spoilt", Origin.IMAGE)
    try:
        assert engine.origin.startswith("cold boot: cloning failed: "), engine.origin
        assert await say(engine, "echo", "well") == "well\n"
        assert key not in templates.ready()
        assert len(rig.kit.told) == told
    finally:
        await rig.end(plan, engine)


def spoil_state(blob: Path) -> None:
    """Damages what QEMU reads first, and leaves the trailer whole."""
    with blob.open("r+b") as file:
        file.seek(-24 + 8, os.SEEK_END)
        ram_bytes = int.from_bytes(file.read(8), "little")
        file.seek(ram_bytes)
        file.write(b"no state at all")


async def test_the_next_hostd_takes_the_templates_memory_over_from_a_clone(rig: CloneRig) -> None:
    plan, engine = await rig.start("outlives", Origin.GENERIC)
    await engine.detach()
    pid = engine.handle.pid
    async with Templates(rig.around.store, lambda *_: None) as templates:
        reborn = CloneKit(rig.kit.kernel, "tcg", rig.kit.cgroups, templates, rig.kit.identity, rig.kit.run_dir)
        adopted = await reborn.driver(Origin.GENERIC).adopt(plan, engine.handle, {})
        assert adopted is not None
        assert await say(adopted, "echo", "still here") == "still here\n"
        with await templates.take(engine.handle.template) as memory:
            assert os.fstat(memory.ram_fd).st_ino == memory_inode(pid)
        templates.give(engine.handle.template)
        assert templates.drop_idle(pressed=True) == []  # the clone lives
        await rig.end(plan, adopted)


async def test_a_start_that_is_given_up_leaves_nothing(rig: CloneRig) -> None:
    plan = rig.plan("given-up")
    started = asyncio.Event()
    starting = asyncio.create_task(rig.kit.driver(Origin.GENERIC).start(plan, lambda _: started.set()))
    await asyncio.wait_for(started.wait(), 30)
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled()
    await asyncio.to_thread(lambda: None)
    assert rig.left(plan) == []


@pytest.mark.asyncio(loop_scope="function")
async def test_a_hostd_killed_while_it_makes_a_template_leaves_nothing_to_the_next(folder: Path) -> None:
    program = busybox()
    assert program is not None
    uid = f"waits-{os.getpid()}"
    async with host_process(folder, "qemu") as host:
        await host.start()
        digest = await import_image(host, rootfs_tar(program))
        host.plane.put(assignment(uid, digest, "sleep", "1000"))
        await until(lambda: bool(template_guests(folder)), 60)
        made = template_guests(folder)
        assert await host.end(signal.SIGKILL) == -signal.SIGKILL
        assert template_guests(folder) == made  # nobody ends it with hostd
        host.plane.sandboxes.clear()
        await host.start()
        await until(lambda: not made & template_guests(folder), 20)
        assert await host.end() == 0
    await until(lambda: not template_guests(folder), 20)
    assert list((folder / "run").glob("template-*")) == []
    assert [name for name in Hierarchy.probe().names("template-") if (folder / "run" / name).exists()] == []
    assert left_of(uid, folder / "run" / uid, -2) == []


def template_guests(folder: Path) -> set[int]:
    """QEMUs that make a template for the hostd of `folder`."""
    return {pid for pid, line in processes() if f"{folder}/run/template-" in line and "qemu" in line.split()[0]}
