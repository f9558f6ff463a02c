"""Elastic memory of real guests: ours against QEMU's virtio-balloon and against virtio-mem alone, in the same QEMU.

    ours             the engine's resize: the hugetlb balloon first, virtio-mem for the rest (hostd/memory/policy.py)
    virtio-mem       the same guest, the same region, unplugged and plugged without us
    virtio-balloon   a guest of as much memory, all of it base RAM, with QEMU's own balloon: it takes base RAM only,
                     which no guest of ours gives away

    reclaim     640 MiB that are touched, from the request until the host's count (st_blocks) has fallen by them
    give back   the same memory, from the request until the guest's kernel counts it as free
    grow        512 MiB with an empty balloon, until the guest counts them as free; and 64 MiB that the balloon holds,
                until its agent answers, which it does when the kernel has them

Touched: before each reclaim the host allocates every page of the guest's memory (fallocate) and QEMU reads all of it
(pmemsave), so that it is allocated and mapped as after a program that used it; a guest under TCG would need 16 s for
that. The bars are about guests that do not clear pages (init_on_alloc=0); guests that do, Debian's default, are beside.
The host half alone comes from bench_balloon_host.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from unittest import mock

from hostd.drivers.qemu import command as qemu_command
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.engine import QemuEngine
from hostd.drivers.qemu.plan import shape_for
from hostd.initramfs import WANTED
from hostd.memory import elasticfile
from hostd.memory.elasticfile import find_elastic, held_bytes
from hostd.spec import MemoryShape, Resources
from tests.bench import bench_balloon_host, guests
from tests.bench.guests import Bench
from tests.bench.report import CannotMeasure, Report, Runs, ratio, run

MIB = 1 << 20
ROUNDS, ROUNDS_BESIDE = 7, 3
TAKEN_MIB, GROWN_MIB, SMALL_MIB, SLACK_MIB = 640, 512, 64, 8
LEFT_MIB = 32
"""Of what virtio-balloon gives back the guest keeps some MiB to itself the first time."""

BIG = Resources(memory_min_mib=256, memory_max_mib=1024, memory_mib=1024, cpu_milli=2000)
PEER_MIB = 1024
DEADLINE_S, POLL_S = 120.0, 0.001
OURS, PLUG, BALLOON = "ours", "virtio-mem", "virtio-balloon"
RECLAIM_BALLOON = f"reclaim {TAKEN_MIB} MiB: virtio-balloon against us"
RECLAIM_PLUG = f"reclaim {TAKEN_MIB} MiB: virtio-mem against us"
GIVE_BACK = f"give back {TAKEN_MIB} MiB: virtio-balloon against us"
GROW = f"grow {GROWN_MIB} MiB: us over virtio-mem alone"
GROW_SMALL = f"grow {SMALL_MIB} MiB: virtio-mem against our balloon"
MOST_GROW = 1.5
PROMISED = ((RECLAIM_BALLOON, 30.0), (RECLAIM_PLUG, 4.0), (GIVE_BACK, 20.0), (GROW_SMALL, 5.0))


@dataclass
class Guest:
    """A guest under measure: `descriptor` is the file of the memory that is taken, `address` where it begins there."""

    engine: QemuEngine
    descriptor: int
    address: int
    size_mib: int

    def held_mib(self) -> int:
        return held_bytes(self.descriptor) // MIB

    async def free_mib(self) -> int:
        return (await self.engine.link.stats()).mem_free_kib >> 10

    async def touch(self) -> None:
        """See the module."""
        await asyncio.to_thread(os.posix_fallocate, self.descriptor, 0, self.size_mib * MIB)
        await self.engine.control.execute("pmemsave", val=self.address, size=self.size_mib * MIB, filename="/dev/null")

    async def until_held(self, most_mib: int) -> None:
        await _until(lambda: _done(self.held_mib() <= most_mib), f"the host to hold {most_mib} MiB")

    async def until_free(self, least_mib: int) -> None:
        async def freed() -> bool:
            return await self.free_mib() >= least_mib

        await _until(freed, f"the guest to have {least_mib} MiB free")


async def _done(whether: bool) -> bool:
    return whether


async def _until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    give_up_s = time.monotonic() + DEADLINE_S
    while not await condition():
        if time.monotonic() > give_up_s:
            raise CannotMeasure(f"waited {DEADLINE_S:.0f} s in vain for {what}")
        await asyncio.sleep(POLL_S)


Ask = Callable[[int], Awaitable[object]]
"""Asks for so many MiB of the guest's memory to be its own, of all that it can have."""


async def timed(asked: Awaitable[object], seen: Awaitable[None]) -> float:
    """Milliseconds from the request until its effect is seen."""

    async def seeing() -> float:
        await seen
        return time.monotonic()

    begin_s = time.monotonic()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_asked(asked))
            at = tasks.create_task(seeing())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return (at.result() - begin_s) * 1000


async def _asked(asked: Awaitable[object]) -> None:
    await asked


async def take_and_give(guest: Guest, ask: Ask) -> tuple[float, float]:
    """One round: the milliseconds of reclaim and of giving back."""
    await guest.touch()
    full_mib, free_mib = guest.held_mib(), await guest.free_mib()
    reclaim_ms = await timed(ask(-TAKEN_MIB), guest.until_held(full_mib - TAKEN_MIB + SLACK_MIB))
    give_ms = await timed(ask(0), guest.until_free(free_mib - LEFT_MIB))
    return reclaim_ms, give_ms


async def grow(guest: Guest, shrink: Ask, ask: Ask, mib: int, *, answered: bool) -> float:
    """The milliseconds of growing by `mib`, after `shrink` took them. `answered`: who is asked answers when the guest's
    kernel has them, which is looked at afterwards; else it is asked until it counts them."""
    full_mib = await guest.free_mib()
    await shrink(-mib)
    await _until(lambda: _shrunk(guest, full_mib - mib * 3 // 4), "the guest to shrink")
    begin_s = time.monotonic()
    await ask(0)
    if not answered:
        await guest.until_free(full_mib - SLACK_MIB)
    took_ms = (time.monotonic() - begin_s) * 1000
    if await guest.free_mib() < full_mib - SLACK_MIB:
        raise CannotMeasure(f"the guest has not got the {mib} MiB that it was said to have")
    return took_ms


async def _shrunk(guest: Guest, most_mib: int) -> bool:
    return await guest.free_mib() <= most_mib


def asks_of(ours: Guest, peer: Guest | None) -> dict[str, tuple[Guest, Ask]]:
    """Each party's way to ask, by name."""
    engine, plugged_mib = ours.engine, ours.size_mib

    async def resize(by_mib: int) -> None:
        resized = await engine.resize(replace(BIG, memory_mib=BIG.memory_mib + by_mib), deadline_s=DEADLINE_S)
        if resized.cause is not None:
            raise CannotMeasure(f"our own resize fell short: {resized.message}")

    async def plug(by_mib: int) -> None:
        await engine.control.request_elastic_mib(plugged_mib + by_mib)
        await _until(lambda: _plugged(ours, plugged_mib + by_mib), "virtio-mem")

    async def balloon(by_mib: int) -> None:
        assert peer is not None
        await peer.engine.control.execute("balloon", value=(PEER_MIB + by_mib) * MIB)

    parties: dict[str, tuple[Guest, Ask]] = {OURS: (ours, resize), PLUG: (ours, plug)}
    if peer is not None:
        parties[BALLOON] = (peer, balloon)
    return parties


async def _plugged(guest: Guest, mib: int) -> bool:
    return await guest.engine.control.elastic_mib() == mib


@asynccontextmanager
async def guest_pair(host: Bench, *, init_on_alloc: bool) -> AsyncIterator[tuple[Guest, Guest]]:
    """Ours with all its memory plugged, and virtio-balloon's."""
    kernel = replace(host.kernel, init_on_alloc=init_on_alloc)
    driver = QemuDriver(kernel, host.accel, host.cgroups, boot_deadline_s=guests.BOOT_DEADLINE_S)
    engine = await host.start(driver, BIG)
    assert isinstance(engine, QemuEngine)
    resized = await engine.resize(BIG, deadline_s=DEADLINE_S)
    if resized.cause is not None:
        raise CannotMeasure(f"the guest does not come to its size: {resized.message}")
    elastic_mib = BIG.memory_mib - engine.handle.base_mib
    region = MemoryShape(0, engine.handle.device_mib).region_mib
    ours = Guest(engine, _file_of(engine, region), await _address(engine), elastic_mib)
    with (
        mock.patch("hostd.drivers.qemu.driver.shape_for", _all_base_ram),
        mock.patch("hostd.drivers.qemu.vmm.qemu_argv", _with_balloon),
    ):
        other = await host.start(driver, BIG)
    assert isinstance(other, QemuEngine)
    peer = Guest(other, _file_of(other, PEER_MIB), 0, PEER_MIB)
    try:
        await ours.until_free(TAKEN_MIB + 150)
        yield ours, peer
    finally:
        os.close(ours.descriptor)
        os.close(peer.descriptor)


def _all_base_ram(plan: object, *rest: object) -> qemu_command.GuestShape:
    return replace(shape_for(plan, *rest), memory=MemoryShape(PEER_MIB, 0))  # type: ignore[arg-type]


def _with_balloon(shape: qemu_command.GuestShape) -> list[str]:
    return [*qemu_command.qemu_argv(shape), "-device", "virtio-balloon-pci,id=balloon0,addr=0x1d"]


def _file_of(engine: QemuEngine, size_mib: int) -> int:
    descriptor = find_elastic(engine.handle.pid, size_mib * MIB)
    if descriptor is None:
        raise CannotMeasure("QEMU's memory file cannot be found")
    return descriptor


async def _address(engine: QemuEngine) -> int:
    for device in await engine.control.execute("query-memory-devices"):
        if device["data"].get("id") == "vmem0":
            return int(device["data"]["memaddr"])
    raise CannotMeasure("QEMU does not tell where elastic memory is")


Taken = dict[str, list[float]]


async def rounds_of(ours: Guest, peer: Guest, rounds: int) -> tuple[Taken, Taken]:
    """Reclaim and give-back of every party, turn about; a first round that does not count warms all of them up."""
    parties = asks_of(ours, peer)
    reclaim: Taken = {name: [] for name in parties}
    give: Taken = {name: [] for name in parties}
    for turn in range(-1, rounds):
        for name in list(parties)[:: 1 if turn % 2 == 0 else -1]:
            took = await take_and_give(*parties[name])
            if turn >= 0:
                reclaim[name].append(took[0])
                give[name].append(took[1])
    return reclaim, give


async def growths(ours: Guest, mib: int, *, from_balloon: bool) -> Taken:
    """What growing by `mib` takes us and virtio-mem: after a shrink by virtio-mem (so that the balloon is empty), or
    ours after a shrink by the balloon."""
    parties = asks_of(ours, None)
    plug, resize = parties[PLUG][1], parties[OURS][1]
    taken: Taken = {OURS: [], PLUG: []}
    for turn in range(-1, ROUNDS):
        for name in (OURS, PLUG) if turn % 2 == 0 else (PLUG, OURS):
            ask = resize if name == OURS else plug
            balloon = from_balloon and name == OURS
            took = await grow(ours, resize if balloon else plug, ask, mib, answered=balloon)
            if turn >= 0:
                taken[name].append(took)
    return taken


def _rows(report: Report, what: str, taken: Taken, suffix: str = "") -> dict[str, Runs]:
    runs = {name: Runs(tuple(values), "ms") for name, values in taken.items()}
    for name, values in runs.items():
        report.row(f"{what}: {name}{suffix}", values)
    return runs


async def measure(report: Report) -> None:
    with (
        mock.patch("hostd.initramfs.WANTED", (*WANTED, "virtio_balloon")),
        mock.patch("hostd.kernel.WANTED", (*WANTED, "virtio_balloon")),
        mock.patch("hostd.guestkernel.WANTED", (*WANTED, "virtio_balloon")),
    ):
        async with guests.bench() as host:
            async with guest_pair(host, init_on_alloc=False) as (ours, peer):
                reclaim, give = await rounds_of(ours, peer, ROUNDS)
                large = await growths(ours, GROWN_MIB, from_balloon=False)
                small = await growths(ours, SMALL_MIB, from_balloon=True)
            await host.end_all()
            async with guest_pair(host, init_on_alloc=True) as (ours, peer):
                beside, beside_give = await rounds_of(ours, peer, ROUNDS_BESIDE)
    _tell(report, reclaim, give, large, small)
    _rows(report, f"reclaim {TAKEN_MIB} MiB", beside, ", clearing")
    _rows(report, f"give back {TAKEN_MIB} MiB", beside_give, ", clearing")


def _tell(report: Report, reclaim: Taken, give: Taken, large: Taken, small: Taken) -> None:
    report.note(f"elastic memory is on {elasticfile.probe()}; virtio-balloon's guest on a memfd, as QEMU makes it")
    took = _rows(report, f"reclaim {TAKEN_MIB} MiB", reclaim)
    gave = _rows(report, f"give back {TAKEN_MIB} MiB", give)
    grown = _rows(report, f"grow {GROWN_MIB} MiB", large)
    grown_small = _rows(report, f"grow {SMALL_MIB} MiB", small)
    bars: Sequence[tuple[str, Runs, str]] = (
        (RECLAIM_BALLOON, ratio(took[BALLOON], took[OURS]), "QEMU's virtio-balloon"),
        (RECLAIM_PLUG, ratio(took[PLUG], took[OURS]), "virtio-mem"),
        (GIVE_BACK, ratio(gave[BALLOON], gave[OURS]), "QEMU's virtio-balloon"),
        (GROW_SMALL, ratio(grown_small[PLUG], grown_small[OURS]), "virtio-mem"),
    )
    for (name, values, peer), (_, least) in zip(bars, PROMISED, strict=True):
        report.bar(name, values, at_least=least, peer=peer)
    report.bar(GROW, ratio(grown[OURS], grown[PLUG]), at_most=MOST_GROW, peer="virtio-mem alone")


def body(report: Report) -> None:
    asyncio.run(measure(report))
    bench_balloon_host.body(report)


if __name__ == "__main__":
    raise SystemExit(run("elastic", body, promised=(*PROMISED, *bench_balloon_host.BARS)))
