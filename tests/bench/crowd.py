"""Many clones: eight together against eight one after another, and a hundred at once held against /proc/meminfo.

Together. A start is done when the driver hands the clone over: its agent answered and it is configured. Both ways start
EIGHT clones and leave them alive until the last is there; what is compared is starts a second, turn about. One
after another keeps more than one CPU busy already (1.25 of 2, measured), so that twice as fast is out of reach: what
would be reached were all CPUs busy all the time, for the same work, is a row.

The crowd's memory. Two figures of the same moment, that know nothing of each other:

- the ledger's: every distinct physical page that the clones' page tables hold (hostd.ledger.measure: what is private,
  and what is shared once), and the page tables themselves (VmPTE of /proc/PID/status), which no page table lists;
- the machine's: how far MemAvailable of /proc/meminfo fell. It counts what can be had back without anybody's loss as
  there still, so that the clean pages of files (layers, libraries), in the page cache with or without clones, are out.

Both are growth from one clone to that one and CROWD more: what is there once for all of them (the template's pages, a
sealed memfd that hostd holds anyway; QEMU's code) is there from the first on and cancels out. Each moment is taken once
MemAvailable is at rest: what ended guests held comes back over tens of seconds (measured: 400 MiB late). Not in the
ledger, and so the difference that is left: the kernel's own part of a process (stacks, slab, its cgroup), the hostd
that holds the clones (here the benchmark), and what anybody else on the machine takes or gives back meanwhile. Rows
tell these apart.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hostd import ledger
from hostd.drivers.contract import Engine, Region
from tests.bench import guests
from tests.bench.report import CannotMeasure, Report, Runs, ratio

EIGHT, TURNS = 8, 11
CROWD, CROWDS = 100, 3
NEEDED_MIB = CROWD * 64
"""A clone holds some 30 MiB; a machine that runs short reclaims, and then nothing agrees with anything."""

ANSWERS_A_CPU = 4
REST_POLL_S, REST_READINGS, REST_WITHIN_KIB, REST_DEADLINE_S = 0.5, 10, 4096, 120.0
MIB_KIB = 1024
TOGETHER, ANSWERED = "throughput: 8 clones together", f"crowd: of {CROWD} clones, those that answer"
AGREED = "crowd: ledger and /proc/meminfo apart"
PROMISED = ((TOGETHER, 1.5), (ANSWERED, float(CROWD)), (AGREED, 3.0))

Start = Callable[[], Awaitable[Engine]]
EndAll = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Machine:
    """KiB, from /proc/meminfo; `available` is what is left, the others what is taken."""

    available: int
    anonymous: int
    shmem: int
    page_tables: int
    kernel_stacks: int
    slab: int
    percpu: int


_NAMES = ("MemAvailable", "AnonPages", "Shmem", "PageTables", "KernelStack", "SUnreclaim", "Percpu")


def parse_meminfo(text: str) -> Machine:
    """Pure. ValueError names the line that is not there."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    if missing := [name for name in _NAMES if name not in lines]:
        raise ValueError(f"/proc/meminfo has no line {missing[0]}: this kernel is too old for the comparison")
    return Machine(*(int(lines[name]) for name in _NAMES))


@dataclass(frozen=True)
class Moment:
    """What the ledger, the page tables' sizes and the machine said together. KiB."""

    pages: int
    private: int
    tables: int
    own: int  # anonymous memory of this process, which stands for hostd
    machine: Machine

    @property
    def ledger(self) -> int:
        return self.pages + self.tables


@dataclass(frozen=True)
class Grown:
    """MiB between two moments."""

    ledger: float
    private: float
    tables: float
    own: float
    taken: float
    kinds: Mapping[str, float]  # of /proc/meminfo

    @property
    def apart_percent(self) -> float:
        """How far the ledger is from the machine, of what the machine says."""
        return 100 * abs(self.ledger - self.taken) / self.taken


def grown(before: Moment, after: Moment) -> Grown:
    """Pure. ValueError when the machine has more memory left than before: somebody else gave back a crowd's worth."""
    taken = (before.machine.available - after.machine.available) / MIB_KIB
    if taken <= 0:
        raise ValueError(f"MemAvailable grew by {-taken:.0f} MiB while clones were started: keep the machine quiet")
    kinds = {
        each.name: (getattr(after.machine, each.name) - getattr(before.machine, each.name)) / MIB_KIB
        for each in fields(Machine)
        if each.name != "available"
    }
    mine = {name: (getattr(after, name) - getattr(before, name)) / MIB_KIB for name in ("private", "tables", "own")}
    return Grown(ledger=(after.ledger - before.ledger) / MIB_KIB, **mine, taken=taken, kinds=kinds)


def between(one: Machine, other: Machine) -> Machine:
    """The mean of what was read before the ledger's walk and after it. Pure."""
    return Machine(*((getattr(one, each.name) + getattr(other, each.name)) // 2 for each in fields(Machine)))


def _status_kib(pid: int | str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else 0


def _machine() -> Machine:
    return parse_meminfo(Path("/proc/meminfo").read_text(encoding="utf-8"))


def at_rest(readings: Sequence[int]) -> bool:
    """Whether the last REST_READINGS, KiB each, lie close together. Pure."""
    last = readings[-REST_READINGS:]
    return len(last) == REST_READINGS and max(last) - min(last) <= REST_WITHIN_KIB


async def rest() -> None:
    """Waits until MemAvailable is at rest. CannotMeasure when it does not come to that."""
    readings: list[int] = []
    end_s = time.monotonic() + REST_DEADLINE_S
    while not at_rest(readings):
        if time.monotonic() > end_s:
            raise CannotMeasure(f"MemAvailable is not at rest after {REST_DEADLINE_S:.0f} s: keep the machine quiet")
        await asyncio.sleep(REST_POLL_S)
        readings.append(_machine().available)


def _look(regions: Mapping[str, Sequence[Region]], pids: Sequence[int]) -> Moment:
    """Blocks."""
    first = _machine()
    told = ledger.measure(regions)
    tables = sum(_status_kib(pid, "VmPTE") for pid in pids)
    private = sum(row.private_bytes for row in told.rows) // 1024
    own = _status_kib("self", "RssAnon")
    return Moment(told.distinct_bytes // 1024, private, tables, own, between(first, _machine()))


async def look(engines: Sequence[Engine]) -> Moment:
    """The moment, of these clones, once the machine is at rest."""
    await rest()
    regions = {str(number): await engine.regions() for number, engine in enumerate(engines)}
    return await asyncio.to_thread(_look, regions, [engine.handle.pid for engine in engines])


async def together(start: Start, count: int) -> list[Engine]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_awaited(start)) for _ in range(count)]
    return [task.result() for task in tasks]


async def _awaited(start: Start) -> Engine:
    return await start()


def busy_s(stat: str) -> float:
    """CPU seconds that this machine spent since it booted, from /proc/stat (proc(5)). Pure."""
    user, nice, system, _, _, irq, softirq = (int(ticks) for ticks in stat.split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _busy_s() -> float:
    return busy_s(Path("/proc/stat").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Way:
    """A way to start EIGHT: a turn each the seconds until the last was there, and the machine's CPU seconds."""

    wall: Runs
    busy: Runs


async def pairs(start: Start, end_all: EndAll) -> tuple[Way, Way]:
    """(one after another, together): TURNS times EIGHT starts each way, every second turn backwards."""

    async def in_turn() -> None:
        for _ in range(EIGHT):
            await start()

    async def at_once() -> None:
        await together(start, EIGHT)

    ways = (in_turn, at_once)
    taken: tuple[list[tuple[float, float]], ...] = ([], [])
    for turn in range(TURNS):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            begin_s, begin_busy_s = time.monotonic(), _busy_s()
            await ways[index]()
            taken[index].append((time.monotonic() - begin_s, _busy_s() - begin_busy_s))
            await end_all()
    one, all_ = (Way(*(Runs(values, "s") for values in zip(*each, strict=True))) for each in taken)
    return one, all_


def ceiling(one: Way, cpus: int) -> Runs:
    """How much faster than one after another the same work would be done by `cpus` CPUs without a pause. Pure."""
    return Runs(tuple(cpus * wall / busy for wall, busy in zip(one.wall.values, one.busy.values, strict=True)), "x")


def tell_pairs(report: Report, one: Way, all_: Way) -> None:
    cpus = len(os.sched_getaffinity(0))
    for name, way in ((f"{EIGHT} clones one after another", one), (f"{EIGHT} clones together", all_)):
        report.row(name, way.wall)
        report.row(f"{name}: CPU time", way.busy)
    report.row(f"the same work on {cpus} CPUs that never pause", ceiling(one, cpus))
    report.bar(TOGETHER, ratio(one.wall, all_.wall), at_least=PROMISED[0][1], peer="one after another")


async def answers(engines: Sequence[Engine]) -> int:
    """How many say what they are asked to."""
    turns = asyncio.Semaphore(ANSWERS_A_CPU * len(os.sched_getaffinity(0)))

    async def asked(engine: Engine, word: str) -> bool:
        async with turns:
            return await guests.run(engine, "echo", word) == f"{word}\n".encode()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(asked(engine, f"here{number}")) for number, engine in enumerate(engines)]
    return sum(task.result() for task in tasks)


async def crowd(start: Start, end_all: EndAll) -> tuple[int, Grown]:
    """One clone, then CROWD more, alive at once: how many of those answered, and what they took."""
    try:
        first = await start()
        await answers([first])
        before = await look([first])
        more = await together(start, CROWD)
        answered = await answers(more)
        return answered, grown(before, await look([first, *more]))
    finally:
        await end_all()


async def crowds(start: Start, end_all: EndAll) -> list[tuple[int, Grown]]:
    """CannotMeasure where a crowd does not fit."""
    left_mib = _machine().available // MIB_KIB
    if left_mib < NEEDED_MIB:
        raise CannotMeasure(f"{CROWD} clones want {NEEDED_MIB} MiB of memory; {left_mib} MiB are left")
    return [await crowd(start, end_all) for _ in range(CROWDS)]


def tell_crowds(report: Report, seen: Sequence[tuple[int, Grown]]) -> None:
    sizes = [size for _, size in seen]

    def row(what: str, values: Sequence[float]) -> None:
        report.row(f"{CROWD} clones more: {what}", Runs(tuple(values), "MiB"))

    row("the ledger, and page tables", [size.ledger for size in sizes])
    row("of it nobody else's", [size.private for size in sizes])
    row("of it page tables", [size.tables for size in sizes])
    row("MemAvailable fell by", [size.taken for size in sizes])
    for kind in sizes[0].kinds:
        row(f"/proc/meminfo, {kind.replace('_', ' ')}", [size.kinds[kind] for size in sizes])
    row("this process itself", [size.own for size in sizes])
    report.bar(ANSWERED, Runs(tuple(float(count) for count, _ in seen), ""), at_least=PROMISED[1][1])
    apart = Runs(tuple(size.apart_percent for size in sizes), "%")
    report.bar(AGREED, apart, at_most=PROMISED[2][1], peer="fall of MemAvailable")


async def measure(report: Report, start: Start, end_all: EndAll) -> None:
    """All of this module. `start` starts a clone, `end_all` ends all that are there."""
    tell_pairs(report, *await pairs(start, end_all))
    try:
        tell_crowds(report, await crowds(start, end_all))
    except CannotMeasure as lack:
        report.unmeasured(ANSWERED, str(lack), at_least=PROMISED[1][1])
        report.unmeasured(AGREED, str(lack), at_most=PROMISED[2][1])
