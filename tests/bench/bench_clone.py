"""What a clone costs, in time and in memory, beside a cold boot and QEMU's ordinary restore.

Every round runs each of them, turn about; clones take so little time that a busy neighbour shows, so that a round has
REPEATS of them and counts the median. "answer" is from the exec of QEMU to the agent's first answer, "first
byte" up to the first byte that a command prints. Memory is of guests that are configured and idle, several of a kind at
once: what a guest shares is counted by its share. The ordinary restore is of one guest with 1 GiB in use
(tests/bench/restores.py), restored by QEMU from its whole stream, and by us from the same guest's memory.

Beside them, in each round, bare `crun run` and `runsc run` of the same command in the same image, with the same limits
(tests/bench/bare.py): no bar, a reader sees where a clone stands. Eight together and a hundred at once: crowd.py.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from hostd.drivers.contract import Engine
from hostd.drivers.qemu.template import Origin
from hostd.spec import Resources
from tests.bench import account, crowd, guests
from tests.bench.bare import RUNTIMES, Bare, bare
from tests.bench.clones import CloneKit, clone_kit
from tests.bench.guests import Bench
from tests.bench.report import CannotMeasure, Report, Runs, ratio, run
from tests.bench.restores import IN_USE_MIB, Restores, frozen_guest

ROUNDS = 5
REPEATS = 3
IDLE_GUESTS = 4
HERD = 50
SMALL = Resources(memory_min_mib=256, memory_max_mib=512, memory_mib=256, cpu_milli=1000)
LARGE = Resources(memory_min_mib=256, memory_max_mib=4096, memory_mib=256, cpu_milli=1000)
COLD, GENERIC, IMAGE, BIG = "cold boot", "generic clone", "image clone", "image clone, ceiling 4 GiB"
WHOLE, MAPPED = f"ordinary restore, {IN_USE_MIB} MiB in use", f"clone of the same guest, {IN_USE_MIB} MiB in use"
KINDS = {
    COLD: (Origin.COLD, SMALL),
    GENERIC: (Origin.GENERIC, SMALL),
    IMAGE: (Origin.IMAGE, SMALL),
    BIG: (Origin.IMAGE, LARGE),
}
PROMISED = (
    ("answer: cold boot against clone", 20.0),
    ("answer: ordinary restore against clone", 5.0),
    ("answer: ceiling 4 GiB against 512 MiB", 1.2),
    ("idle memory: clone against cold boot", 0.25),
    ("idle memory: guest RAM of a clone", 8.0),
    ("herd: a clone of 50 against its share of the CPUs", 2.0),
    *crowd.PROMISED,
)


@dataclass
class Taken:
    """Milliseconds by what was started and by phase, a value a round."""

    phases: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, kind: str, **values: float) -> None:
        for phase, value in values.items():
            self.phases.setdefault(kind, {}).setdefault(phase, []).append(value)

    def runs(self, kind: str, phase: str) -> Runs:
        return Runs(tuple(self.phases[kind][phase]), "ms")


@dataclass
class Clones:
    """A host with templates of SMALL and LARGE guests."""

    host: Bench
    kit: CloneKit
    taken: Taken = field(default_factory=Taken)

    async def start(self, kind: str) -> Engine:
        """A guest; RuntimeError when it came up otherwise than it was meant to."""
        origin, resources = KINDS[kind]
        engine = await self.host.start(self.kit.driver(origin), resources)
        if not engine.origin.startswith(origin.value):
            raise RuntimeError(f"{kind}: {engine.origin}")
        return engine

    async def several(self, kinds: Sequence[str], times: int) -> None:
        """`times` starts of each, turn about; the medians count."""
        seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(times):
            for kind in kinds:
                seen[kind].append(await self.once(kind))
        for kind, starts in seen.items():
            self.taken.add(kind, **{phase: statistics.median(each[phase] for each in starts) for phase in starts[0]})

    async def once(self, kind: str) -> dict[str, float]:
        """Milliseconds of each phase of one start up to a command's first byte."""
        begin_s, first_s = time.monotonic(), [0.0]
        engine = await self.start(kind)
        ready_s = time.monotonic()
        await guests.run(engine, "echo", "here", main=True, first=lambda: first_s.append(time.monotonic()))
        phases = dict(engine.start_phases)
        answer_s = sum(seconds for name, seconds in phases.items() if name != "agent")
        times = {name: seconds * 1000 for name, seconds in phases.items()}
        times |= {"start": (first_s[-1] - ready_s) * 1000, "to answer": answer_s * 1000}
        times |= {"to first byte": (first_s[-1] - begin_s) * 1000}
        await self.host.end_all()
        return times

    async def herd(self) -> Runs:
        """HERD clones at once: milliseconds to the answer of each."""
        async with asyncio.TaskGroup() as group:
            starting = [group.create_task(self.start(IMAGE)) for _ in range(HERD)]
        engines = [each.result() for each in starting]
        answers = [sum(seconds for name, seconds in each.start_phases if name != "agent") * 1000 for each in engines]
        await self.host.end_all()
        return Runs(tuple(answers), "ms")

    async def idle(self, kind: str) -> list[dict[str, account.Held]]:
        """The accounts of IDLE_GUESTS guests of a kind."""
        engines = [await self.start(kind) for _ in range(IDLE_GUESTS)]
        accounts = [account.account_of(engine.handle.pid) for engine in engines]
        await self.host.end_all()
        return accounts


async def rounds(clones: Clones, restores: Restores, runtimes: Bare | None) -> None:
    """Each way, every second round backwards."""

    async def whole() -> None:
        clones.taken.add(WHOLE, **{"to answer": await restores.ordinary()})

    async def mapped() -> None:
        values = [await restores.mapped() for _ in range(REPEATS)]
        clones.taken.add(MAPPED, **{"to answer": statistics.median(values)})

    async def cold() -> None:
        await clones.several([COLD], 1)

    async def cloned() -> None:
        await clones.several([GENERIC, IMAGE, BIG], REPEATS)

    async def contained() -> None:
        if runtimes is None:
            return
        for name in RUNTIMES:
            values = [await runtimes.run(name) for _ in range(REPEATS)]
            clones.taken.add(f"bare {name} run", **{"to first byte": statistics.median(values)})

    ways = [cold, cloned, whole, mapped, contained]
    for turn in range(ROUNDS):
        for way in ways if turn % 2 == 0 else ways[::-1]:
            await way()


def tell_times(report: Report, taken: Taken) -> None:
    """Each phase of each way, and the bars of time."""
    for kind, phases in taken.phases.items():
        for phase in phases:
            report.row(f"{kind}: {phase}", taken.runs(kind, phase))
    answer = {kind: taken.runs(kind, "to answer") for kind, phases in taken.phases.items() if "to answer" in phases}
    (cold, least), (restore, much), (ceiling, most) = PROMISED[:3]
    report.bar(cold, ratio(answer[COLD], answer[IMAGE]), at_least=least, peer="cold boot of the same guest")
    report.bar(restore, ratio(answer[WHOLE], answer[MAPPED]), at_least=much, peer="-incoming, RAM in the stream")
    report.bar(ceiling, ratio(answer[BIG], answer[IMAGE]), at_most=most, peer="clone with a ceiling of 512 MiB")


def tell_memory(report: Report, idle: dict[str, list[dict[str, account.Held]]]) -> None:
    """The account of each MiB, and the bars of memory."""
    for name, accounts in idle.items():
        for kind in account.KINDS:
            values = tuple(each[kind].pss_kib / 1024 for each in accounts)
            if max(values) >= 0.05:
                report.row(f"{name}, idle: {kind}", Runs(values, "MiB"))
        totals = [account.total(each) for each in accounts]
        report.row(f"{name}, idle: all (PSS)", Runs(tuple(held.pss_kib / 1024 for held in totals), "MiB"))
        report.row(f"{name}, idle: nobody else's", Runs(tuple(held.private_kib / 1024 for held in totals), "MiB"))
    mine, peer = (
        Runs(tuple(account.total(each).pss_kib / 1024 for each in idle[kind]), "MiB") for kind in (IMAGE, COLD)
    )
    own_ram = tuple((each[account.COPIED] + each[account.SHARED_RAM]).pss_kib / 1024 for each in idle[IMAGE])
    (whole, share), (ram, most_mib) = PROMISED[3:5]
    report.bar(whole, ratio(mine, peer), at_most=share, peer="cold-booted guest, as idle")
    report.bar(ram, Runs(own_ram, "MiB"), at_most=most_mib)


def tell_herd(report: Report, herd: Runs, alone: Runs) -> None:
    fair_ms = alone.median * HERD / len(os.sched_getaffinity(0))
    report.row(f"{HERD} clones at once: to answer", herd)
    name, most = PROMISED[5]
    median = statistics.median(herd.values)
    report.bar(name, Runs((median / fair_ms,), "x"), at_most=most, peer=f"a lone clone's time x {HERD} / CPUs")


async def bare_or_none(report: Report, stack: AsyncExitStack, host: Bench) -> Bare | None:
    """The bare runtimes; where there are none the report says why, and goes on: no bar hangs on them."""
    try:
        return await stack.enter_async_context(bare(host.layers, SMALL))
    except CannotMeasure as lack:
        report.note(f"bare crun run and runsc run were not measured: {lack}")
        return None


async def measure(report: Report) -> None:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(guests.bench())
        kit = await stack.enter_async_context(clone_kit(host.store, host.kernel, host.accel, host.cgroups))
        for resources in (SMALL, LARGE):
            await kit.make(host.plan(resources))
        for _, message in kit.told:
            report.note(message)
        clones = Clones(host, kit)
        async with frozen_guest(host, host.plan(SMALL)) as restores, AsyncExitStack() as beside:
            await rounds(clones, restores, await bare_or_none(report, beside, host))
        tell_times(report, clones.taken)
        tell_memory(report, {kind: await clones.idle(kind) for kind in (COLD, GENERIC, IMAGE)})
        tell_herd(report, await clones.herd(), clones.taken.runs(IMAGE, "to answer"))
        await crowd.measure(report, partial(clones.start, IMAGE), host.end_all)
    report.note(f"idle: configured, no process, {SMALL.memory_min_mib} MiB plugged; {IDLE_GUESTS} of a kind at once.")


def body(report: Report) -> None:
    if os.geteuid() != 0:
        raise CannotMeasure("needs root: each guest gets a uid and a cgroup of its own")
    asyncio.run(measure(report))


if __name__ == "__main__":
    raise SystemExit(run("clone", body, PROMISED))
