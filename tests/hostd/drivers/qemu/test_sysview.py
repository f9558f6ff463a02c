"""`sysview: tool` in a real guest: free, nproc, /proc see what is granted, through resizes and a restart of hostd."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.api.services import Answerer, ServicePolicy
from hostd.drivers.qemu.engine import QemuEngine
from hostd.journal import Handle
from hostd.spec import Resources
from tests.contract.driver_suite import command
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings
from tests.hostd.drivers.qemu.test_services import said

pytestmark = pytest.mark.guest

LOOK = """
free -k | awk '/Mem:/ {print $2}'
awk '/MemTotal/ {print $2}' /proc/meminfo
nproc
grep -c ^processor /proc/cpuinfo
grep -c '^cpu[0-9]' /proc/stat
cat /sys/devices/system/cpu/online
"""


async def seen(engine: QemuEngine) -> list[str]:
    """MiB as free (sysinfo) and /proc/meminfo say it, then CPUs by sched_getaffinity and the files."""
    free, meminfo, *cpus = (await said(engine, LOOK)).split()
    assert free == meminfo
    return [f"{int(free) / 1024:g}", *cpus]


async def test_a_sandbox_sees_its_allocation_of_the_moment(around: Surroundings) -> None:
    rig = QemuRig(around, 268_700)
    plan = rig.plan("view", Resources(160, 640, 256, 1000))
    plan = replace(plan, spec=replace(plan.spec, services=ServicePolicy(sysview=Answerer.TOOL)))
    made: list[Handle] = []
    engine = await rig.driver.start(plan, made.append)
    try:
        assert isinstance(engine, QemuEngine)
        await engine.spawn(command(("sleep", "100000")), main=True)
        assert await seen(engine) == ["256", "1", "1", "1", "0"]
        for memory_mib, cpu_milli, cpus in ((640, 2000, ["2", "2", "2", "0-1"]), (192, 500, ["1", "1", "1", "0"])):
            resized = await engine.resize(Resources(160, 640, memory_mib, cpu_milli), deadline_s=90)
            assert resized.cause is None, resized
            assert await seen(engine) == [f"{resized.actual_mib}", *cpus]
            assert resized.actual_mib == memory_mib
        held_by_the_kernel = await said(engine, "grep Huge /proc/meminfo; awk '/MemFree/ {print $2}' /proc/meminfo")
        assert "HugePages_Total:       0" in held_by_the_kernel
        assert int(held_by_the_kernel.split()[-1]) < 192 << 10
        await engine.detach()
        again = await rig.reborn().adopt(plan, made[-1], {})
        assert isinstance(again, QemuEngine)
        engine = again
        engine.resume()
        assert (await seen(engine))[0] == "192"
    finally:
        await engine.detach()
        await rig.driver.destroy(plan.spec.uid, plan.folder, made[-1])
    assert rig.left(plan) == []
