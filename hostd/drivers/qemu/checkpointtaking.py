"""Takes a checkpoint of a running guest, which goes on as if nothing had been.

The workload freezes → QEMU stops → its state goes to a memfd, and with it what of its RAM is mapped privately; RAM that
is mapped shared is copied from its own memfd meanwhile → QEMU and workload go on → the stream is parted
(checkpointstream.py), pages of zeros are dropped, all is sealed. What comes after "go on" costs the guest nothing.

Whatever fails, and whoever cancels: the guest goes on (unless it is to stay, and all went well). A hostd that dies
meanwhile leaves it stopped, and the next one, adopting it, lets it go on (let_run, driver.py).
"""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostd.drivers.qemu import checkpointstream, snapshot
from hostd.drivers.qemu.checkpointblob import CheckpointMemory, DraftMemory, copy_data, punch_zeros
from hostd.drivers.qemu.checkpointform import GuestForm
from hostd.drivers.qemu.control import Control
from hostd.drivers.qemu.engine import QemuEngine
from hostd.errors import CheckpointFailed, ControlLost, HostdError, NotRunning
from hostd.memory.elasticfile import ELASTIC_NAME
from hostd.services.serving import keep_clock
from hostd.tasks import to_its_end

FREEZE_DEADLINE_S = 5.0
RAM_BLOCK, ELASTIC_BLOCK = "ram0", "0000:00:03.0/vm0"
"""As the stream names them: a device's memory by its place, which command.py gives it."""

ELASTIC_DEVICE = "vmem0"
_HOST_ADDRESS = re.compile(r" is (0x[0-9a-f]+)")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...(.) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)")

Offsets = Callable[[], dict[int, int]]
"""How much of each stream of main this host has recorded, asked while the guest stands still."""


@dataclass(frozen=True)
class TakenGuest:
    """A guest's sealed memory (the caller's to close), what it is restored as, how long its workload stood still."""

    memory: CheckpointMemory
    form: GuestForm
    offsets: dict[int, int]
    pause_s: float


@dataclass(frozen=True)
class Block:
    """A RAM block of a running QEMU: the file behind it, and whether the guest's writes go into that."""

    inode: tuple[int, int]  # of which device
    shared: bool


@dataclass(frozen=True)
class _Blocks:
    ram: Block
    elastic: Block | None


async def take(engine: QemuEngine, form: GuestForm, offsets: Offsets, *, stay: bool = False) -> TakenGuest:
    """See the module. With `stay` the guest stands still afterwards, for let_go_on() or its end. CheckpointFailed, or
    NotRunning when a process of the workload does not stand still."""
    async with engine.turnstile.alone():
        blocks = await _find_blocks(engine, form)
        memory = form.memory
        stream_fd = os.memfd_create("sandloom-state", os.MFD_CLOEXEC)
        try:
            with DraftMemory(memory.base_mib << 20, memory.region_mib << 20) as draft:
                async with _standing_still(engine, stay=stay) as still:
                    recorded = await _copy(engine, blocks, draft, stream_fd, offsets)
                    pause_s = await still.go_on_unless_staying()
                    state = await to_its_end(_in_thread(_part, draft, blocks, stream_fd))
                    return TakenGuest(draft.seal(state), form, recorded, pause_s)
        except OSError as error:
            raise CheckpointFailed(f"the guest's memory could not be copied: {error}") from error
        finally:
            os.close(stream_fd)


async def _copy(
    engine: QemuEngine, blocks: _Blocks, draft: DraftMemory, stream_fd: int, offsets: Offsets
) -> dict[int, int]:
    """Everything of the guest, which stands still afterwards."""
    try:
        await engine.link.freeze(FREEZE_DEADLINE_S)
        await engine.control.execute("stop")
        copying = asyncio.create_task(_in_thread(_copy_shared, engine.handle.pid, blocks, draft))
        try:
            await snapshot.save_stream(engine.control, stream_fd)
        finally:
            await to_its_end(_ended(copying))  # it writes to descriptors that are ours to close
        copying.result()
        return offsets()
    except (NotRunning, CheckpointFailed):
        raise
    except HostdError as error:
        raise CheckpointFailed(f"the guest could not be saved: {error}", reason=error.reason) from error


async def _in_thread(work: Callable[..., Any], *arguments: object) -> Any:
    return await asyncio.to_thread(work, *arguments)


async def _ended(task: asyncio.Task[Any]) -> None:
    await asyncio.wait({task})


class _Still:
    """A guest that stands still, or is about to."""

    def __init__(self, engine: QemuEngine, stay: bool) -> None:
        self._engine, self._stay, self._begin_s = engine, stay, time.monotonic()

    async def go_on_unless_staying(self) -> float:
        """How long its workload has stood still by now."""
        if not self._stay:
            await to_its_end(let_go_on(self._engine))
        return time.monotonic() - self._begin_s


@asynccontextmanager
async def _standing_still(engine: QemuEngine, *, stay: bool) -> AsyncIterator[_Still]:
    """Whatever fails in the block, the guest goes on."""
    try:
        yield _Still(engine, stay)
    except BaseException:
        await to_its_end(let_go_on(engine))
        raise


async def let_go_on(engine: QemuEngine) -> None:
    """A guest that stands still goes on, its workload too. Idempotent. ControlLost, AgentLost."""
    await let_run(engine.control)
    await engine.link.thaw()
    if engine.tool is not None:
        await keep_clock(engine.tool.policy, engine.link)


async def let_run(control: Control) -> None:
    """A guest that a checkpoint stopped, or may have, runs afterwards; its workload is frozen still. ControlLost."""
    give_up_s = time.monotonic() + snapshot.STATE_DEADLINE_S
    while not (status := await control.execute("query-status"))["running"]:
        if status["status"] in ("paused", "postmigrate"):
            await control.execute("cont")
        elif status["status"] != "finish-migrate" or time.monotonic() > give_up_s:
            raise ControlLost(f"the guest is stopped and cannot go on: {status['status']}")
        else:
            await asyncio.sleep(0.02)


# Where the guest's memory is.


async def _find_blocks(engine: QemuEngine, form: GuestForm) -> _Blocks:
    control, pid = engine.control, engine.handle.pid
    ram = await _block_at(control, pid, 0)
    if not form.device_mib:
        return _Blocks(ram, None)
    for device in await control.execute("query-memory-devices"):
        if device["data"].get("id") == ELASTIC_DEVICE:
            return _Blocks(ram, await _block_at(control, pid, int(device["data"]["memaddr"])))
    raise CheckpointFailed(f"QEMU has no device {ELASTIC_DEVICE}")


async def _block_at(control: Control, pid: int, guest_address: int) -> Block:
    """What is mapped in QEMU behind a guest-physical address. There is no other way in QEMU 7.2 than its monitor."""
    words = await control.execute("human-monitor-command", **{"command-line": f"gpa2hva {guest_address:#x}"})
    found = _HOST_ADDRESS.search(str(words))
    if found is None:
        raise CheckpointFailed(f"QEMU does not tell where guest address {guest_address:#x} is: {str(words).strip()}")
    address = int(found[1], 16)
    for line in (await asyncio.to_thread(Path(f"/proc/{pid}/maps").read_text)).splitlines():
        mapping = _MAPPING.match(line)
        if mapping is not None and int(mapping[1], 16) <= address < int(mapping[2], 16):
            device = os.makedev(int(mapping[4], 16), int(mapping[5], 16))
            return Block((device, int(mapping[6])), mapping[3] == "s")
    raise CheckpointFailed(f"{address:#x} is not mapped in QEMU, pid {pid}")


def _copy_shared(pid: int, blocks: _Blocks, draft: DraftMemory) -> None:
    """The blocks whose files hold what the guest wrote. Blocks for about 0.7 ms a MiB used."""
    for block, target, size_bytes in _parts(blocks, draft):
        if block.shared:
            descriptor = _open_inode(pid, block.inode)
            try:
                copy_data(descriptor, target, size_bytes)
            finally:
                os.close(descriptor)


def _parts(blocks: _Blocks, draft: DraftMemory) -> list[tuple[Block, int, int]]:
    parts = [(blocks.ram, draft.ram_fd, draft.ram_bytes)]
    if blocks.elastic is not None:
        parts.append((blocks.elastic, draft.elastic_fd, draft.elastic_bytes))
    return parts


def _open_inode(pid: int, inode: tuple[int, int]) -> int:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        of_memory = str(entry.readlink()).startswith(("/memfd:", f"/{ELASTIC_NAME} "))
        if of_memory and ((about := entry.stat()).st_dev, about.st_ino) == inode:
            return os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    raise CheckpointFailed(f"QEMU, pid {pid}, has closed the file of its guest's memory")


def _part(draft: DraftMemory, blocks: _Blocks, stream_fd: int) -> bytes:
    """The device state, once all pages are where they belong. Blocks."""
    targets = {RAM_BLOCK: draft.ram_fd}
    if blocks.elastic is not None:
        targets[ELASTIC_BLOCK] = draft.elastic_fd
    stream = mmap.mmap(stream_fd, os.fstat(stream_fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
    split = checkpointstream.split(memoryview(stream), targets)  # unmapped with the last view of it
    sizes = {RAM_BLOCK: draft.ram_bytes, ELASTIC_BLOCK: draft.elastic_bytes}
    for name in targets:
        if split.blocks.get(name) != sizes[name]:
            raise CheckpointFailed(f"QEMU saved {name} with {split.blocks.get(name)} bytes, not {sizes[name]}")
    if not blocks.ram.shared and not split.taken.get(RAM_BLOCK):
        raise CheckpointFailed("QEMU saved nothing of the guest's memory")
    for block, descriptor, block_bytes in _parts(blocks, draft):
        if block.shared:
            punch_zeros(descriptor, block_bytes)
    return split.rest
