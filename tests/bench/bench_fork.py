"""Forks of a running sandbox that holds 512 MiB: what 20 of them take together, and how soon the first one runs.

    memory   guest memory of all forks in the host: the checkpoint's own pages, mapped or not, and each fork's copies
             against one copy (the checkpoint as it was taken) and what the forks wrote (their copies, from smaps)
    time     from the exec of QEMU until the fork's workload goes on as a sandbox of its own, against QEMU's ordinary
             restore of a guest with as much in use, from exec to its agent's answer (tests/bench/restores.py)

The forks run a program that wakes up ten times a second, and a shell in each writes 4 MiB. Restores take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from hostd.drivers.contract import Checkpointing, Engine, TakenCheckpoint
from hostd.drivers.qemu.driver import QemuDriver
from hostd.spec import Resources
from native import _dax
from tests.bench import guests
from tests.bench.guests import Bench, command
from tests.bench.report import CannotMeasure, Report, Runs, ratio, run
from tests.bench.restores import frozen_guest

FORKS, ROUNDS = 20, 5
IN_USE_MIB, WRITTEN_MIB = 512, 4
SIZE = Resources(memory_min_mib=768, memory_max_mib=1024, memory_mib=960, cpu_milli=1000)
DEADLINE_S = 120.0
HOLD = f"""
import os, time
piece = os.urandom(1 << 20)
held = [number.to_bytes(8, 'big') + piece[8:] for number in range({IN_USE_MIB})]
print('held', flush=True)
while True:
    time.sleep(0.1)
"""
WRITE = f"head -c {WRITTEN_MIB << 20} /dev/urandom > /dev/shm/own"
MEMORY, TIME = "fork 20: memory over one copy and what they wrote", "first fork: QEMU's ordinary restore against it"
MOST_MEMORY, PROMISED = 1.1, ((TIME, 3.33),)


@dataclass(frozen=True)
class Measured:
    """Guest memory of all forks, MiB. `copied` is what they wrote, `vmm` what their QEMUs have besides, alone."""

    taken: float
    held: float
    copied: float
    vmm: float

    @property
    def ratio(self) -> float:
        return (self.held + self.copied) / (self.taken + self.copied)


def measured(taken_bytes: int, memory: TakenCheckpoint, forks: Iterable[Engine]) -> Measured:
    """What the forks take now, from the host's page tables."""
    copied_kib = vmm_kib = 0
    for fork in forks:
        for mapping in _dax.smaps(fork.handle.pid):
            if mapping.path.startswith("/memfd:sandloom-checkpoint"):
                copied_kib += mapping.anonymous_kib
            elif not mapping.path.endswith("/blob"):
                vmm_kib += mapping.private_clean_kib + mapping.private_dirty_kib
    held_bytes = memory.memory.held_bytes()
    return Measured(taken_bytes / 2**20, held_bytes / 2**20, copied_kib / 1024, vmm_kib / 1024)


async def source(host: Bench, driver: QemuDriver) -> Engine:
    """A sandbox whose program holds IN_USE_MIB."""
    engine = await host.start(driver, SIZE)
    await engine.resize(SIZE)
    async with asyncio.timeout(DEADLINE_S):
        while (await engine.memory()).actual_mib < SIZE.memory_mib:  # noqa: ASYNC110 - the guest tells nobody
            await asyncio.sleep(0.05)
        main = await engine.spawn(command("python3", "-c", HOLD), main=True)
        said = b""
        async for piece in main.output():
            said += piece.data
            if b"held\n" in said:
                return engine
    raise CannotMeasure(f"the source said {said!r}")


@asynccontextmanager
async def fork(host: Bench, driver: QemuDriver, taken: TakenCheckpoint) -> AsyncIterator[tuple[Engine, float]]:
    """One fork, and the milliseconds until its workload went on. It ends with the block."""
    plan = host.plan(SIZE)
    begin_s = time.monotonic()
    engine = await _checkpointing(driver).restore(plan, taken.memory, taken.form, taken.offsets, lambda _: None)
    took_ms = (time.monotonic() - begin_s) * 1000
    try:
        yield engine, took_ms
    finally:
        await host.end(driver, plan, engine)


def _checkpointing(driver: QemuDriver) -> Checkpointing:
    assert driver.checkpointing is not None
    return driver.checkpointing


async def measure(report: Report) -> None:
    async with guests.bench() as host:
        driver = host.driver()
        async with frozen_guest(host, host.plan(SIZE), ram_mib=1024, in_use_mib=IN_USE_MIB) as peer:
            engine = await source(host, driver)
            taken = await _checkpointing(driver).checkpoint(engine, lambda: {1: 0, 2: 0})
            try:
                await _rounds(report, host, driver, taken, peer.ordinary)
            finally:
                taken.memory.close()


async def _rounds(
    report: Report,
    host: Bench,
    driver: QemuDriver,
    taken: TakenCheckpoint,
    ordinary: Callable[[], Awaitable[float]],
) -> None:
    taken_bytes = taken.memory.held_bytes()
    first: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        async with fork(host, driver, taken) as (_, took_ms):
            first.append(took_ms)
        theirs.append(await ordinary())
    async with AsyncExitStack() as stack:
        forks = [await stack.enter_async_context(fork(host, driver, taken)) for _ in range(FORKS)]
        for one, _ in forks:
            await guests.run(one, "sh", "-c", WRITE)
        found = await asyncio.to_thread(measured, taken_bytes, taken, [one for one, _ in forks])
    took = Runs(tuple(took_ms for _, took_ms in forks), "ms")
    _tell(report, found, Runs(tuple(first), "ms"), Runs(tuple(theirs), "ms"), took, taken.pause_s)


def _tell(report: Report, found: Measured, first: Runs, theirs: Runs, took: Runs, pause_s: float) -> None:
    report.row("the source stood still", Runs((pause_s * 1000,), "ms"))
    report.row("first fork runs", first)
    report.row("QEMU's ordinary restore", theirs)
    report.row(f"each of {FORKS} forks runs", took)
    report.row("the checkpoint as taken", Runs((found.taken,), "MiB"))
    report.row(f"the checkpoint under {FORKS} forks", Runs((found.held,), "MiB"))
    report.row(f"written by {FORKS} forks", Runs((found.copied,), "MiB"))
    report.row(f"{FORKS} QEMUs' own, beside guest memory", Runs((found.vmm,), "MiB"))
    report.row("as many whole copies would take", Runs((FORKS * found.taken,), "MiB"))
    report.bar(MEMORY, Runs((found.ratio,), "x"), at_most=MOST_MEMORY, peer="one copy and the pages written")
    report.bar(TIME, ratio(theirs, first), at_least=PROMISED[0][1], peer="QEMU's ordinary restore")
    report.note("A page that held zeros and is touched costs two: a fork's copy, and one in the checkpoint for all.")


def body(report: Report) -> None:
    asyncio.run(measure(report))


if __name__ == "__main__":
    raise SystemExit(run("fork", body, PROMISED))
