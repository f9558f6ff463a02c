"""A cold start by phase, beside the same guest on virtio-blk and a bare boot of the same kernel.

    vmm        exec of QEMU to the greeting of its control socket
    kernel     to the agent's first answer
    agent      CONFIGURE: layers, overlay, identity, namespaces
    workload   START to the command's first byte

The floor is QEMU with the same kernel and machine, no layers, no devices but a console, and an initramfs that holds
one busybox, which prints a line: what of a start is not ours to win. Every round runs all three, turn about.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

from hostd.drivers.qemu.command import KERNEL_COMMAND_LINE
from hostd.drivers.qemu.driver import QemuDriver
from hostd.spec import MIN_BASE_RAM_MIB, Resources
from tests.bench import guests
from tests.bench.guests import BOOT_DEADLINE_S, Bench
from tests.bench.report import CannotMeasure, Report, Runs, ratio, run

ROUNDS = 5
SMALL = Resources(memory_min_mib=256, memory_max_mib=512, memory_mib=256, cpu_milli=1000)
OURS, PEER, FLOOR = "layers on pmem", "layers on virtio-blk", "bare boot"
PHASES = ("vmm", "kernel", "agent", "workload")
SAID = b"FLOOR-REACHED"
PROMISED = (("start: virtio-blk against pmem", 0.9), ("start: against a bare boot", 2.5))


async def started(host: Bench, driver: QemuDriver) -> dict[str, float]:
    """Milliseconds of each phase of one start."""
    first_s = [0.0]
    engine = await host.start(driver, SMALL)
    ready_s = time.monotonic()
    await guests.run(engine, "echo", "here", main=True, first=lambda: first_s.append(time.monotonic()))
    await host.end_all()
    return {name: s * 1000 for name, s in engine.start_phases} | {"workload": (first_s[-1] - ready_s) * 1000}


def floor_initrd(folder: Path) -> Path:
    """An initramfs of one busybox, whose shell prints a line."""
    busybox, cpio = shutil.which("busybox"), shutil.which("cpio")
    if busybox is None or cpio is None:
        raise CannotMeasure("needs busybox and cpio (Debian: busybox-static, cpio) for the bare boot")
    root, made = folder / "floor", folder / "floor.cpio"
    root.mkdir()
    shutil.copy(busybox, root / "busybox")
    (root / "init").write_bytes(b"#!/busybox sh\necho " + SAID + b"\n/busybox sleep 1000\n")
    (root / "init").chmod(0o755)
    with made.open("wb") as out:
        names = b"busybox\ninit\n"
        subprocess.run([cpio, "-o", "-H", "newc", "--quiet"], cwd=root, input=names, stdout=out, check=True)
    return made


def bare_boot(host: Bench, initrd: Path) -> float:
    """Milliseconds from exec to the first line of the initramfs's only program."""
    accel = "kvm" if host.accel == "kvm" else "tcg,tb-size=32"
    argv = [
        "qemu-system-x86_64", "-M", "q35,sata=off,usb=off,smbus=off,vmport=off,hpet=off", "-accel", accel,
        "-cpu", "host" if host.accel == "kvm" else "max", "-smp", "1", "-m", f"{MIN_BASE_RAM_MIB}M", "-nodefaults",
        "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(host.kernel.vmlinuz),
        "-initrd", str(initrd), "-append", KERNEL_COMMAND_LINE,
    ]  # fmt: skip
    begin_s = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        try:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                if SAID in line:
                    return (time.monotonic() - begin_s) * 1000
                if time.monotonic() - begin_s > BOOT_DEADLINE_S:
                    break
        finally:
            qemu.kill()
    raise CannotMeasure("the bare boot said nothing")


async def measure(report: Report) -> None:
    async with guests.bench() as host:
        initrd = await asyncio.to_thread(floor_initrd, host.folder)
        drivers = {OURS: host.driver("pmem"), PEER: host.driver("blk")}
        taken: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in drivers}
        floor: list[float] = []
        await asyncio.to_thread(bare_boot, host, initrd)  # the first one reads QEMU and kernel from disk
        for turn in range(ROUNDS):
            for name in (OURS, PEER, FLOOR) if turn % 2 == 0 else (FLOOR, PEER, OURS):
                if name == FLOOR:
                    floor.append(await asyncio.to_thread(bare_boot, host, initrd))
                else:
                    for phase, taken_ms in (await started(host, drivers[name])).items():
                        taken[name][phase].append(taken_ms)
    tell(report, taken, Runs(tuple(floor), "ms"))


def tell(report: Report, taken: dict[str, dict[str, list[float]]], floor: Runs) -> None:
    """The table with shares, and the bars."""
    wholes = {name: whole(phases) for name, phases in taken.items()}
    for name, phases in taken.items():
        for phase in PHASES:
            runs = Runs(tuple(phases[phase]), "ms")
            report.row(f"{name}: {phase} ({runs.median / wholes[name].median:.0%})", runs)
        report.row(f"{name}: exec to first byte", wholes[name])
    report.row("bare boot: exec to first line", floor)
    (peer, least), (bare, most) = PROMISED
    report.bar(peer, ratio(wholes[PEER], wholes[OURS]), at_least=least, peer="the same guest, layers on virtio-blk")
    report.bar(bare, ratio(wholes[OURS], floor), at_most=most, peer="the same kernel with one busybox")


def whole(phases: dict[str, list[float]]) -> Runs:
    """All phases of a round together."""
    return Runs(tuple(sum(values) for values in zip(*phases.values(), strict=True)), "ms")


def body(report: Report) -> None:
    asyncio.run(measure(report))


if __name__ == "__main__":
    raise SystemExit(run("start", body, PROMISED))
