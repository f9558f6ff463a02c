"""Host memory of guests that have all read their whole /usr: layers on virtio-pmem with DAX, against virtio-blk.

Host memory is the distinct physical pages of all VMMs outside of layers (guest RAM, QEMU itself; native._dax), plus
what the page cache holds of the layers' blobs. It is measured with one guest less than all and with all, so that the
cost of one more is known as well. The layers are dropped from the page cache before each set of guests.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

from hostd.drivers.contract import Engine, LayerFile
from hostd.drivers.qemu.driver import QemuDriver
from hostd.ledger import layer_cache_bytes, measure
from hostd.spec import Resources
from tests.bench import guests
from tests.bench.guests import Bench
from tests.bench.report import Report, Runs, ratio, run

ROUNDS = 3
GUESTS = 4
RESOURCES = Resources(memory_min_mib=512, memory_max_mib=768, memory_mib=640, cpu_milli=1000)
OURS, PEER = "pmem", "blk"
MIB = 1 << 20
READ = """
import os
def cached():
    return next(int(line.split()[1]) for line in open('/proc/meminfo') if line.startswith('Cached:'))
def read(top):
    count = 0
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, 'rb') as file:
                    while data := file.read(1 << 20):
                        count += len(data)
    return count
before = cached(); count = read('/usr'); print(before, cached(), count)
"""
PROMISED = ((f"memory of {GUESTS} guests", 2.0), ("memory of one more guest", 2.0))


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
    said = await guests.run(engine, "python3", "-c", READ)
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


async def one_round(host: Bench, driver: QemuDriver) -> Round:
    """Starts the guests one after the other, each reads everything, and looks."""
    await asyncio.to_thread(forget_layers, host.layers)
    engines: list[Engine] = []
    readings: list[Reading] = []
    fewer_bytes = 0
    for number in range(GUESTS):
        if number == GUESTS - 1:
            fewer_bytes, _ = await host_bytes(host, engines)
        engines.append(await host.start(driver, RESOURCES))
        readings.append(await read_all(engines[-1]))
    all_bytes, cache_bytes = await host_bytes(host, engines)
    await host.end_all()
    return Round(fewer_bytes, all_bytes, cache_bytes, tuple(readings))


async def rounds(host: Bench) -> dict[str, list[Round]]:
    drivers = {name: host.driver(name) for name in (OURS, PEER)}
    taken: dict[str, list[Round]] = {name: [] for name in drivers}
    for turn in range(ROUNDS):
        for name in (OURS, PEER) if turn % 2 == 0 else (PEER, OURS):
            taken[name].append(await one_round(host, drivers[name]))
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
    (all_of_them, least), (one_more, least_more) = PROMISED
    report.bar(all_of_them, ratio(whole[PEER], whole[OURS]), at_least=least, peer="virtio-blk")
    report.bar(one_more, ratio(more[PEER], more[OURS]), at_least=least_more, peer="virtio-blk")


async def bench(report: Report) -> None:
    async with guests.bench() as host:
        tell(report, await rounds(host))


def body(report: Report) -> None:
    asyncio.run(bench(report))


if __name__ == "__main__":
    raise SystemExit(run("sharing", body, PROMISED))
