"""One QEMU process: its directory, uid, cgroup and control socket; made, reached, and ended with all it left.

RUN/<uid>/            owned by the VM's uid, 0700; made by fork(), removed by destroy()
    qmp.sock          QEMU's control socket (QEMU listens)
    agent.sock        the host's end of the agent's virtio-serial port (QEMU listens)
    services.sock     the host's end of the services port (QEMU listens)
    vmm.log           what QEMU itself printed
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from guestagent.protocol import SessionCarry
from hostd.agentlink import AgentLink
from hostd.cgroups import Hierarchy, Limits
from hostd.drivers.contract import Loss
from hostd.drivers.qemu.command import GuestShape, RamFile, launcher_argv, qemu_argv
from hostd.drivers.qemu.control import Control
from hostd.errors import AgentLost, ControlLost, HostdError, StartFailed
from hostd.journal import Handle
from hostd.memory.elasticfile import open_elastic, probe
from hostd.process import WatchedProcess, is_zombie, open_same, reap, start_ticks
from hostd.removal import remove_folder

QMP_DEADLINE_S = 20.0
KILL_DEADLINE_S, REAP_DEADLINE_S = 5.0, 1.0
EXIT_LAG_S = 2.0
LOG_TAIL_BYTES = 400
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "MALLOC_ARENA_MAX": "1"}
"""One arena for QEMU's few threads: 0.4 MiB less a guest."""

ONE_COPY = Path(__file__).parent / "_build" / "sandloom-onecopy.so"
"""Lets a QEMU map layers in pieces (hostd/drivers/onecopy.py)."""

NO_PUNCH = Path(__file__).parent / "_build" / "sandloom-nopunch"
"""Starts a QEMU whose elastic memory is a checkpoint's (hostd/drivers/qemu/src)."""


@dataclass(frozen=True)
class Launch:
    """A QEMU to be started: what it looks like, who it is, what bounds it, which descriptors it inherits."""

    shape: GuestShape
    vm_uid: int
    gids: tuple[int, ...]
    limits: Limits
    inherit: tuple[int, ...] = ()

    @property
    def folder(self) -> Path:
        """Its directory."""
        return self.shape.folder


@dataclass(frozen=True)
class Vmm:
    """A QEMU that answers."""

    process: WatchedProcess
    control: Control


class Vmms:
    """Starts and ends QEMUs on this host. Stateless: what runs is known by its Handle."""

    def __init__(self, cgroups: Hierarchy, boot_deadline_s: float, *, huge: bool | None = None) -> None:
        """`huge`: whether elastic memory is on huge pages; None: where this host can."""
        self.cgroups, self._boot_deadline_s = cgroups, boot_deadline_s
        self.huge = probe().huge if huge is None else huge

    def fork(self, launch: Launch) -> Handle:
        """Makes directory and cgroup and starts QEMU in them. Blocks for milliseconds. StartFailed."""
        shape = launch.shape
        try:
            with self._elastic(launch) as whole:
                pid = self._fork(whole)
        except OSError as error:
            raise StartFailed(f"QEMU cannot be started: {error}", reason="HostError") from error
        ticks = start_ticks(pid)
        if ticks is None:
            reap(pid)
            raise StartFailed(f"QEMU ended at once: {said(launch.folder)}", reason="VmmExited")
        memory = shape.memory
        return Handle(
            pid,
            ticks,
            launch.vm_uid,
            shape.accel,
            memory.base_mib,
            memory.elastic_mib,
            shape.vcpus,
            device_mib=memory.elastic_mib,
            plugged=shape.hotplug_ports > 0,
            max_vcpus=shape.max_vcpus,
            init_on_alloc=shape.init_on_alloc,
        )

    @contextmanager
    def _elastic(self, launch: Launch) -> Iterator[Launch]:
        """The launch with a new file for elastic memory, unless it has one or needs none. QEMU keeps it open."""
        shape = launch.shape
        if shape.elastic is not None or not shape.memory.region_mib:
            yield launch
            return
        descriptor = open_elastic(shape.memory.region_mib << 20, huge=self.huge)
        try:
            os.fchown(descriptor, launch.vm_uid, launch.vm_uid)
            elastic = RamFile(descriptor, private=False, huge=self.huge)
            yield replace(launch, shape=replace(shape, elastic=elastic), inherit=(*launch.inherit, descriptor))
        finally:
            os.close(descriptor)

    def _fork(self, launch: Launch) -> int:
        launch.folder.mkdir(parents=True, mode=0o700)
        os.chown(launch.folder, launch.vm_uid, launch.vm_uid)
        procs = self.cgroups.create(launch.shape.uid, launch.limits)
        gids = sorted(launch.gids)
        if launch.shape.accel == "kvm":
            gids.append(Path("/dev/kvm").stat().st_gid)
        elastic = launch.shape.elastic
        through = (str(NO_PUNCH),) if elastic is not None and elastic.private else ()
        argv = launcher_argv(qemu_argv(launch.shape), uid=launch.vm_uid, gids=gids, cgroup_procs=procs, through=through)
        with (launch.folder / "vmm.log").open("wb") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                env=ENVIRONMENT | ({"LD_PRELOAD": str(ONE_COPY)} if ONE_COPY.exists() else {}),
                pass_fds=launch.inherit,
            )
        child.returncode = 0  # the pidfd watcher reaps it, not Popen's own bookkeeping
        return child.pid

    async def reach(self, shape: GuestShape, handle: Handle, stack: AsyncExitStack) -> Vmm:
        """The running QEMU's process and control, closed by `stack`. StartFailed with QEMU's own words."""
        descriptor = open_same(handle.pid, handle.start_ticks)
        if descriptor is None:
            raise StartFailed(f"QEMU ended at once: {said(shape.folder)}", reason="VmmExited")
        process = WatchedProcess(handle.pid, descriptor)
        stack.callback(process.close)
        try:
            control = await Control.connect(shape.qmp_path, deadline_s=QMP_DEADLINE_S, alive=process.gone)
        except ControlLost as error:
            words = f"QEMU did not start: {error}; it said: {said(shape.folder)}"
            raise StartFailed(words, reason="VmmExited") from error
        stack.push_async_callback(control.close)
        return Vmm(process, control)

    async def reach_agent(
        self,
        shape: GuestShape,
        vmm: Vmm,
        stack: AsyncExitStack,
        carry: SessionCarry | None = None,
        *,
        at_boundary: bool = False,
    ) -> AgentLink:
        """The booted guest's agent, closed by `stack`. StartFailed with the last words of QEMU or the guest.
        `at_boundary`: see AgentSession.open."""
        deadline_s, gone = self._boot_deadline_s, vmm.process.gone
        try:
            link = await AgentLink.connect(
                shape.agent_path, deadline_s=deadline_s, gone=gone, carry=carry, at_boundary=at_boundary
            )
        except StartFailed as error:
            raise StartFailed(f"{error}; QEMU said: {said(shape.folder)}", reason=error.reason) from error
        except AgentLost as error:
            console = (await vmm.control.console_tail())[-LOG_TAIL_BYTES:]
            raise StartFailed(f"{error}; the guest's console ends: {console!r}", reason=error.reason) from error
        stack.push_async_callback(link.close)
        return link

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        """Ends whatever runs as `uid` and removes cgroup and directory. Idempotent. HostdError when it stays."""
        if handle is not None:
            await _kill(handle)
        for pid in await asyncio.to_thread(self.cgroups.remove, uid):
            reap(pid)
        await asyncio.to_thread(remove_folder, folder)

    async def undo(self, shape: GuestShape, forked: asyncio.Future[Handle]) -> None:
        """After a failed or cancelled start. A thread that is forking cannot be cancelled: it takes milliseconds."""
        await asyncio.wait({forked})
        failed = forked.exception() is not None
        await self.destroy(shape.uid, shape.folder, None if failed else forked.result())


async def _kill(handle: Handle) -> None:
    descriptor = open_same(handle.pid, handle.start_ticks)
    if descriptor is None:
        await _take_leave(handle)
        return
    process = WatchedProcess(handle.pid, descriptor)
    try:
        process.kill()
        await asyncio.wait({process.gone}, timeout=KILL_DEADLINE_S)
        if not process.gone.done():
            raise HostdError(f"QEMU, pid {handle.pid}, does not end within {KILL_DEADLINE_S:.0f} s of SIGKILL")
    finally:
        process.close()


async def _take_leave(handle: Handle) -> None:
    """Reaps it if it has ended and is our child. A zombie whose threads are ending still cannot be reaped yet."""
    give_up_s = asyncio.get_running_loop().time() + REAP_DEADLINE_S
    while is_zombie(handle.pid, handle.start_ticks) and asyncio.get_running_loop().time() < give_up_s:
        reap(handle.pid)
        if is_zombie(handle.pid, handle.start_ticks):
            await asyncio.sleep(0.002)


def said(folder: Path) -> str:
    """The last words that a QEMU printed."""
    try:
        words = (folder / "vmm.log").read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        words = ""
    return words or "nothing"


async def first_loss(gone: asyncio.Future[str], lost: asyncio.Future[str]) -> Loss:
    """Why a guest is lost, as soon as that is certain: its port closes a moment before its QEMU is seen to end."""
    await asyncio.wait({gone, lost}, return_when=asyncio.FIRST_COMPLETED)
    if not gone.done():
        await asyncio.wait({gone}, timeout=EXIT_LAG_S)
    if gone.done():
        return Loss("VmmExited", f"QEMU is gone: {gone.result()}")
    return Loss("AgentLost", f"the agent is lost: {lost.result()}")
