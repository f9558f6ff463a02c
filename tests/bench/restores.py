"""One guest with much memory in use, frozen once and restored two ways: QEMU's ordinary one, and as our clones are.

The guest has all its memory as base RAM, and its layers on virtio-blk: the ordinary stream would hold virtio-pmem's as
well, and QEMU cannot load it into layers that are read-only. Its frozen state is held twice, in
memory files: RAM as it is with the devices' state beside it (x-ignore-shared), and QEMU's whole stream with RAM in it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from hostd.cgroups import Limits
from hostd.drivers.contract import StartPlan
from hostd.drivers.qemu import snapshot, templateblob
from hostd.drivers.qemu.command import GuestShape, RamFile
from hostd.drivers.qemu.engine import Parts, QemuEngine
from hostd.drivers.qemu.plan import configure_for, shape_for
from hostd.drivers.qemu.vmm import Launch, Vmm, Vmms, said
from hostd.journal import Handle
from hostd.spec import MemoryShape
from tests.bench.guests import BOOT_DEADLINE_S, Bench, run

RAM_MIB = 1792
IN_USE_MIB = 1024
FILL = """
import os, sys
piece = os.urandom(1 << 20)
with open('/dev/shm/used', 'wb', buffering=0) as used:
    for number in range(int(sys.argv[1])):
        used.write(number.to_bytes(8, 'big') + piece[8:])
"""


@dataclass
class Restores:
    """The frozen guest, and the two ways to have it again."""

    host: Bench
    vmms: Vmms
    plan: StartPlan
    shape: GuestShape
    ram_fd: int
    in_use_mib: int = IN_USE_MIB
    state_fd: int = -1
    stream_fd: int = -1

    async def ordinary(self) -> float:
        """Milliseconds from exec to the agent's answer when QEMU reads the whole stream."""
        return await self._timed(None, self.stream_fd)

    async def mapped(self) -> float:
        """The same with RAM mapped privately and only the devices' state read."""
        return await self._timed(RamFile(self.ram_fd, private=True), self.state_fd)

    async def _timed(self, ram: RamFile | None, source_fd: int) -> float:
        async with AsyncExitStack() as stack:
            begin_s = time.monotonic()
            vmm, shape = await self._restore(stack, ram, source_fd)
            await vmm.control.execute("cont")
            await self.vmms.reach_agent(shape, vmm, stack, at_boundary=True)
            return (time.monotonic() - begin_s) * 1000

    async def _restore(self, stack: AsyncExitStack, ram: RamFile | None, source_fd: int) -> tuple[Vmm, GuestShape]:
        """A restored guest that stands still."""
        shape = replace(self.shape, ram=ram, restored=True)
        read_fd = os.open(f"/proc/self/fd/{source_fd}", os.O_RDONLY | os.O_CLOEXEC)  # with a position of its own
        stack.callback(os.close, read_fd)
        inherit = (read_fd,) if ram is None else (ram.descriptor, read_fd)
        _, vmm = await self._launch(shape, stack, inherit)
        if ram is None:
            await _ordinary(vmm)
            status = await vmm.control.migration("migrate-incoming", f"fd:{read_fd}", deadline_s=BOOT_DEADLINE_S)
            assert status == "completed", f"{status}: {said(shape.folder)}"
        else:
            await snapshot.load_state(vmm.control, read_fd, gone=vmm.process.gone)
        return vmm, shape

    async def _launch(self, shape: GuestShape, stack: AsyncExitStack, inherit: tuple[int, ...]) -> tuple[Handle, Vmm]:
        gids = tuple({self.host.kernel.gid, *(layer.gid for layer in shape.layers)})
        limits = Limits((shape.memory.base_mib * 2 + 512) << 20, 1000, 256)
        handle = self.vmms.fork(Launch(shape, self.plan.vm_uid, gids, limits, inherit))
        stack.push_async_callback(self.vmms.destroy, shape.uid, shape.folder, handle)
        return handle, await self.vmms.reach(shape, handle, stack)

    async def freeze(self) -> None:
        """Boots the guest, has it use its memory, and keeps it both ways."""
        async with AsyncExitStack() as stack:
            shape = replace(self.shape, ram=RamFile(self.ram_fd, private=False))
            handle, vmm = await self._launch(shape, stack, (self.ram_fd,))
            link = await self.vmms.reach_agent(shape, vmm, stack)
            uuids = tuple(layer.volume_uuid for layer in shape.layers)
            identity = configure_for(self.plan.spec, uuids, entropy=secrets.token_bytes(64), now_ns=time.time_ns())
            await link.configure(replace(identity, upper_mib=2 * (self.in_use_mib + 64)))
            engine = QemuEngine(shape.uid, handle, Parts(vmm.process, vmm.control, link), self.host.cgroups)
            await run(engine, "python3", "-c", FILL, str(self.in_use_mib))
            await link.close()
            self.state_fd = templateblob.sealed_state(await snapshot.save_state(vmm.control))
        templateblob.seal(self.ram_fd)
        async with AsyncExitStack() as stack:  # QEMU saves once; so a restored one gives the whole stream
            vmm, _ = await self._restore(stack, RamFile(self.ram_fd, private=True), self.state_fd)
            self.stream_fd = os.memfd_create("bench-stream", os.MFD_CLOEXEC)
            await _ordinary(vmm)
            await vmm.control.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 36})
            await vmm.control.give_descriptor("whole", self.stream_fd)
            status = await vmm.control.migration("migrate", "fd:whole", deadline_s=BOOT_DEADLINE_S)
            assert status == "completed", status


async def _ordinary(vmm: Vmm) -> None:
    """All RAM belongs to the stream, as QEMU has it unless told otherwise."""
    wanted = [{"capability": "events", "state": True}, {"capability": "x-ignore-shared", "state": False}]
    await vmm.control.execute("migrate-set-capabilities", capabilities=wanted)


@asynccontextmanager
async def frozen_guest(
    host: Bench, plan: StartPlan, *, ram_mib: int = RAM_MIB, in_use_mib: int = IN_USE_MIB
) -> AsyncIterator[Restores]:
    """A guest of `plan`'s image with `in_use_mib` of its memory in use, frozen."""
    shape = replace(shape_for(plan, host.kernel, host.accel, "blk"), memory=MemoryShape(ram_mib, 0))
    ram_fd = templateblob.new_ram(ram_mib << 20)
    restores = Restores(host, Vmms(host.cgroups, BOOT_DEADLINE_S), plan, shape, ram_fd, in_use_mib)
    try:
        await restores.freeze()
        yield restores
    finally:
        for descriptor in (restores.ram_fd, restores.state_fd, restores.stream_fd):
            if descriptor >= 0:
                os.close(descriptor)
