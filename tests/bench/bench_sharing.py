"""Host memory of guests that have all read their whole /usr: as hostd starts them, against the same on virtio-blk.

Ours are clones with their layers on virtio-pmem and DAX; the peer boots, with its layers on virtio-blk. Between them
stands what DAX does alone: guests that boot, with their layers on virtio-pmem.

Host memory is the distinct physical pages of all VMMs outside of layers (guest RAM, QEMU itself; native._dax), plus
what the page cache holds of the layers' blobs, plus the whole memory of the clones' template. It is measured with one
guest less than all and with all, so that the cost of one more is known as well. The layers are dropped from the page
cache before each set of guests. No round begins after BUDGET_S.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hostd.drivers.contract import Engine, LayerFile
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.template import Origin
from hostd.ledger import layer_cache_bytes, measure
from hostd.spec import Resources
from tests.bench import guests
from tests.bench.clones import CloneKit, clone_kit
from tests.bench.guests import Bench
from tests.bench.report import Report, Runs, ratio, run

ROUNDS = 3
BUDGET_S = 200.0
GUESTS = 4
RESOURCES = Resources(memory_min_mib=384, memory_max_mib=512, memory_mib=448, cpu_milli=1000)
OURS, ALONE, PEER = "clones on pmem", "boots on pmem", "boots on virtio-blk"
MIB = 1 << 20
READ = """
cached() { sed -n 's/^Cached: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
cached
find /usr -xdev -type f -exec cat {} + > /dev/null
cached
find /usr -xdev -type f -printf '%s\\n' | awk '{ bytes += $1 } END { printf "%d\\n", bytes }'
"""
PROMISED = (
    (f"memory of {GUESTS} guests", 2.0),
    ("memory of one more guest", 2.0),
    (f"memory of {GUESTS} guests, DAX alone", 1.5),
    ("memory of one more guest, DAX alone", 1.7),
)


@dataclass(frozen=True)
class Reading:
    """What one guest said of itself: its page cache before and after, and how much it read."""

    before_kib: int
    after_kib: int
    read_bytes: int


@dataclass(frozen=True)
class Round:
    """Host memory with all guests but one and with all of them, and what the guests said."""

    fewer_bytes: int
    all_bytes: int
    cache_bytes: int
    readings: tuple[Reading, ...]


def forget_layers(layers: Sequence[LayerFile]) -> None:
    """Nothing of the blobs stays in the host's page cache."""
    for layer in layers:
        descriptor = os.open(layer.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


async def read_all(engine: Engine) -> Reading:
    said = await guests.run(engine, "sh", "-c", READ)
    return Reading(*map(int, said.split()))


async def host_bytes(host: Bench, engines: Sequence[Engine]) -> tuple[int, int]:
    """What the guests take of the host, and of that the layers' page cache."""
    regions = {
        str(number): [region for region in await engine.regions() if region.kind != "layer"]
        for number, engine in enumerate(engines)
    }
    ledger = await asyncio.to_thread(measure, regions)
    cache_bytes = await asyncio.to_thread(layer_cache_bytes, host.store)
    return ledger.distinct_bytes + cache_bytes, cache_bytes


async def one_round(host: Bench, driver: QemuDriver, template_bytes: int) -> Round:
    """All guests but one, then the last one; each reads everything."""
    await asyncio.to_thread(forget_layers, host.layers)

    async def reader() -> tuple[Engine, Reading]:
        engine = await host.start(driver, RESOURCES)
        return engine, await read_all(engine)

    async with asyncio.TaskGroup() as group:
        reading = [group.create_task(reader()) for _ in range(GUESTS - 1)]
    started = [each.result() for each in reading]
    fewer_bytes, _ = await host_bytes(host, [engine for engine, _ in started])
    started.append(await reader())
    all_bytes, cache_bytes = await host_bytes(host, [engine for engine, _ in started])
    await host.end_all()
    fewer_bytes, all_bytes = fewer_bytes + template_bytes, all_bytes + template_bytes
    return Round(fewer_bytes, all_bytes, cache_bytes, tuple(reading for _, reading in started))


async def rounds(host: Bench, kit: CloneKit) -> dict[str, list[Round]]:
    """All three a round, every second round backwards."""
    plan, cloner = host.plan(RESOURCES), kit.cloner(Origin.IMAGE)
    await kit.make(plan)
    kit.templates.drop_idle(pressed=True)  # so that it is held as it is in the store, and not as it was frozen
    with await kit.templates.take(cloner.fitting(plan).candidates.image_key) as memory:
        held_bytes = memory.held_bytes()
    ways = {OURS: kit.driver(Origin.IMAGE), ALONE: host.driver("pmem"), PEER: host.driver("blk")}
    taken: dict[str, list[Round]] = {name: [] for name in ways}
    give_up_s = time.monotonic() + BUDGET_S
    for turn in range(ROUNDS):
        if turn and time.monotonic() > give_up_s:
            break
        for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            taken[name].append(await one_round(host, ways[name], held_bytes if name == OURS else 0))
    return taken


def mib(values: Sequence[float]) -> Runs:
    return Runs(tuple(value / MIB for value in values), "MiB")


def tell(report: Report, taken: dict[str, list[Round]]) -> None:
    """The table and the bars."""
    whole = {name: mib([each.all_bytes for each in made]) for name, made in taken.items()}
    more = {name: mib([each.all_bytes - each.fewer_bytes for each in made]) for name, made in taken.items()}
    for name, made in taken.items():
        readings = [reading for each in made for reading in each.readings]
        report.row(f"{name}: host memory of {GUESTS} guests", whole[name])
        report.row(f"{name}: of that the layers' page cache", mib([each.cache_bytes for each in made]))
        report.row(f"{name}: one more guest", more[name])
        report.row(f"{name}: the guest's own Cached, before", mib([each.before_kib * 1024 for each in readings]))
        report.row(f"{name}: the guest's own Cached, after", mib([each.after_kib * 1024 for each in readings]))
        report.row(f"{name}: bytes that each guest read", mib([each.read_bytes for each in readings]))
    sets = ((whole, OURS), (more, OURS), (whole, ALONE), (more, ALONE))
    for (what, least), (values, name) in zip(PROMISED, sets, strict=True):
        report.bar(what, ratio(values[PEER], values[name]), at_least=least, peer=PEER)


async def bench(report: Report) -> None:
    async with guests.bench() as host, clone_kit(host.store, host.kernel, host.accel, host.cgroups) as kit:
        tell(report, await rounds(host, kit))


def body(report: Report) -> None:
    asyncio.run(bench(report))


if __name__ == "__main__":
    raise SystemExit(run("sharing", body, PROMISED))
