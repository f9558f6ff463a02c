"""A claim of a warm pool's member against a clone of the same image's template: to the first byte of a command.

A round does each REPEATS times, turn about, and counts the median: both take so little time that a busy neighbour
shows. A clone is counted from the exec of QEMU, a claim from the moment it is asked for; both end at the first byte
that the command prints. The member was made before, which is what a pool is for.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from hostd.drivers.contract import Engine, StartPlan
from hostd.drivers.qemu.accel import cpu_identity, qemu_version
from hostd.drivers.qemu.cloning import Cloner
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.template import GuestIdentity
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Vmms
from hostd.spec import Resources
from tests.bench import guests
from tests.bench.guests import BOOT_DEADLINE_S, Bench
from tests.bench.report import CannotMeasure, Report, Runs, ratio, run

ROUNDS = 5
REPEATS = 3
SMALL = Resources(memory_min_mib=256, memory_max_mib=512, memory_mib=256, cpu_milli=1000)
FIRST_UID = 291_000
PROMISED = (("first byte: clone against warm claim", 5.0),)


@dataclass
class Pool:
    """A host, a driver with the image's template made, and what was measured: milliseconds by way and phase."""

    host: Bench
    driver: QemuDriver
    taken: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _number: int = 0

    def plan(self, kind: str) -> StartPlan:
        self._number += 1
        name = f"bench-{os.getpid()}-{kind}{self._number}"
        spec = self.host.spec(name, SMALL)
        return StartPlan(spec, self.host.layers, FIRST_UID + self._number, self.host.folder / "run" / name)

    async def once(self, way: str, plan: StartPlan, start: Callable[[], Awaitable[Engine]]) -> None:
        """One start up to a command's first byte."""
        begin_s, first_s = time.monotonic(), [0.0]
        engine = await start()
        ready_s = time.monotonic()
        await guests.run(engine, "echo", "here", main=True, first=lambda: first_s.append(time.monotonic()))
        phases = self.taken.setdefault(way, {})
        for name, seconds in (*engine.start_phases, ("command", first_s[-1] - ready_s)):
            phases.setdefault(name, []).append(seconds * 1000)
        phases.setdefault("to first byte", []).append((first_s[-1] - begin_s) * 1000)
        await engine.detach()
        await self.driver.destroy(plan.spec.uid, plan.folder, engine.handle)

    async def clone(self) -> None:
        """A clone of the image's template."""
        plan = self.plan("clone")
        await self.once("clone", plan, lambda: self.driver.start(plan, lambda _: None))

    async def claim(self) -> None:
        """A member that was made before, claimed."""
        assert self.driver.warming is not None
        guest = await self.driver.warming.prewarm(self.plan("member"), lambda _: None)
        plan, warming = self.plan("claim"), self.driver.warming
        await self.once("warm claim", plan, lambda: warming.claim(guest, plan, lambda _: None))


def by_round(values: list[float]) -> tuple[float, ...]:
    """The median of each round."""
    return tuple(statistics.median(values[at : at + REPEATS]) for at in range(0, len(values), REPEATS))


async def measure(report: Report) -> None:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(guests.bench())
        templates = await stack.enter_async_context(
            Templates(host.store, lambda reason, message: report.note(f"{reason}: {message}"))
        )
        kernel = host.kernel
        identity = GuestIdentity(kernel.digest, kernel.initrd_digest, qemu_version(), cpu_identity(host.accel))
        vmms = Vmms(host.cgroups, BOOT_DEADLINE_S)
        cloner = Cloner(templates, kernel, identity, host.accel, vmms, host.folder / "run")
        pool = Pool(
            host,
            QemuDriver(kernel, host.accel, host.cgroups, boot_deadline_s=BOOT_DEADLINE_S, cloner=cloner),
        )
        await pool.claim()  # makes the template
        await templates.settle()
        pool.taken.clear()
        for turn in range(ROUNDS):
            for way in ((pool.clone, pool.claim) if turn % 2 == 0 else (pool.claim, pool.clone)) * REPEATS:
                await way()
        for name, phases in pool.taken.items():
            for phase, values in phases.items():
                report.row(f"{name}: {phase}", Runs(tuple(values), "ms"))
        cold, warm = (Runs(by_round(pool.taken[way]["to first byte"]), "ms") for way in ("clone", "warm claim"))
        name, least = PROMISED[0]
        report.bar(name, ratio(cold, warm), at_least=least, peer="clone of the image's template, same guest")


def body(report: Report) -> None:
    if os.geteuid() != 0:
        raise CannotMeasure("needs root: each guest gets a uid and a cgroup of its own")
    asyncio.run(measure(report))


if __name__ == "__main__":
    raise SystemExit(run("pool", body, PROMISED))
