"""The driver of the classes user-kernel (runsc) and host-kernel (crun): one OCI runtime and one monitor a sandbox.

    RUN/<uid>/            0700, root's; made here, removed by destroy()
        rootfs            overlayfs over the image's layers (hostd/drivers/oci/mounts.py); upper: a tmpfs
        config.json       the bundle (hostd/drivers/oci/bundle.py)
        agent.sock        where the sandbox's monitor listens (hostd/drivers/oci/src)
        state             the runtime's own state
        monitor.log, runtime.log
    and, when a tool answers some of its calls, what hostd/drivers/oci/supervisor.py makes;
    beside them, for a sandbox with a link to its host, what hostd/drivers/oci/network.py makes

The monitor and all that the runtime starts are in the sandbox's cgroup: what is in it is the sandbox, also when hostd
knows no pid of it any more. Needs root: mounts, cgroups, namespaces; there is no rootless mode.

A start is cut into phases that add up: vmm (monitor, mounts), kernel (none: the host's runs already, the user-space
kernel comes with the workload), agent (to the monitor's greeting). The container itself is made by the first spawn(),
the owner's phase workload.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path

from guestagent.messages import MAIN_PROC
from guestagent.protocol import ProcCarry, SessionCarry
from hostd.agentlink import AgentLink
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Checkpointing, Engine, StartPlan, Warming
from hostd.drivers.oci import identity
from hostd.drivers.oci.checkpointing import Beginning, OciCheckpointing, go_on
from hostd.drivers.oci.engine import OciEngine
from hostd.drivers.oci.monitor import MONITOR
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.oci.network import Links
from hostd.drivers.oci.place import Place
from hostd.drivers.oci.plan import limits_for, upper_mib
from hostd.drivers.oci.runtime import Runtime
from hostd.drivers.oci.supervisor import listen, require_able, supervised
from hostd.drivers.oci.warming import OciWarming
from hostd.drivers.seat import seat_of
from hostd.errors import AgentLost, ConfigError, HostdError, StartFailed
from hostd.journal import Handle
from hostd.process import WatchedProcess, is_zombie, open_same, reap, start_ticks
from hostd.removal import remove_folder
from hostd.services.sockets import needed
from hostd.tasks import to_its_end

GREET_DEADLINE_S = 10.0
KILL_DEADLINE_S = 5.0
LOG_TAIL_BYTES = 400
COVERED = "/proc/sys/net"
"""runsc takes a network namespace in which rmem_default is here for the host's and refuses to use it; since Linux 6.13
every one has it."""


def require_root() -> None:
    """ConfigError, with the reason, when hostd does not run as root."""
    if os.geteuid() != 0:
        raise ConfigError(
            "the classes user-kernel and host-kernel need root: hostd mounts EROFS and overlayfs for them and puts them"
            " into cgroups, which no rootless runtime can do on the host's behalf: run hostd as root",
            reason="RootlessRefused",
        )


class OciDriver:
    """Implements hostd.drivers.contract.Driver."""

    def __init__(
        self,
        runtime: Runtime,
        layers: Layers,
        cgroups: Hierarchy,
        *,
        links: Links | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_root()
        if runtime.name == "crun":
            state = layers.root / "crun-state"
            state.mkdir(exist_ok=True, mode=0o700)
            runtime = replace(runtime, state=state)
        self.runtime, self.layers, self.cgroups, self.links = runtime, layers, cgroups, links or Links()
        self._clock = clock
        self.warming: Warming | None = OciWarming(self, clock=clock) if runtime.init else None
        self.checkpointing: Checkpointing | None = None
        if runtime.checkpoints:
            self.checkpointing = OciCheckpointing(self, runtime.version, clock=clock)

    async def start(self, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Driver.start."""
        begin_s = self._clock()
        handle = await self.launch(plan, Beginning(), made)
        vmm_s = self._clock()
        try:
            async with AsyncExitStack() as stack:
                link, process = await self.reach(plan, handle, stack)
                place = self.place(plan, handle)
                supervisor = await supervised(plan.spec.services, place.folder, process, plan.tell, stack)
                phases = (("vmm", vmm_s - begin_s), ("kernel", 0.0), ("agent", self._clock() - vmm_s))
                stack.pop_all()
                return OciEngine(place, handle, process, link, phases, supervisor)
        except BaseException:
            await to_its_end(self.destroy(plan.spec.uid, plan.folder, handle))
            raise

    async def launch(self, plan: StartPlan, beginning: Beginning, made: Callable[[Handle], None]) -> Handle:
        """A monitor in its cgroup beside a mounted root; nothing runs in it. On any error nothing of it is left."""
        launch = asyncio.ensure_future(asyncio.to_thread(self._launch, plan, beginning))
        try:
            handle = await asyncio.shield(launch)
            made(handle)
        except BaseException:
            await to_its_end(self._undo(plan, launch))
            raise
        return handle

    async def _undo(self, plan: StartPlan, launch: asyncio.Future[Handle]) -> None:
        """After a failed or cancelled start. A thread that is mounting cannot be cancelled: it takes milliseconds."""
        await asyncio.wait({launch})
        failed = launch.exception() is not None
        await self.destroy(plan.spec.uid, plan.folder, None if failed else launch.result())

    def place(self, plan: StartPlan, handle: Handle) -> Place:
        """Where a sandbox is. Pure."""
        spec, runtime, netns = plan.spec, self.runtime, None
        seat = seat_of(spec.uid, plan.folder, handle)
        if spec.network.veth:
            runtime, netns = replace(runtime, network="sandbox"), self.links.namespace(spec.uid)
        elif needed(spec.services):
            netns = Path(f"/proc/{handle.pid}/ns/net")  # the monitor's own: its supervisor is in it
        return Place(
            seat.name, spec.hostname, seat.folder, runtime, self.cgroups, netns, spec.services, bool(handle.member)
        )

    def _launch(self, plan: StartPlan, beginning: Beginning) -> Handle:
        """Makes directory and cgroup, starts the monitor and mounts while that joins its cgroup, which the kernel takes
        milliseconds for. Blocks as long."""
        spec = plan.spec
        require_able(spec.services, self.runtime, veth=spec.network.veth)
        plan.folder.mkdir(parents=True, mode=0o700)
        procs = self.cgroups.create(spec.uid, limits_for(spec.resources, self.runtime))
        cover = COVERED if spec.network.veth and self.runtime.name == "runsc" else ""
        pid = self._start_monitor(plan.folder, procs, beginning.offsets, cover, supervise=needed(spec.services))
        ticks = start_ticks(pid)
        fill = beginning.fill
        address = ""
        try:
            if spec.network.veth:
                address = self.links.make(spec.uid, spec.network).address
            if fill is None:
                self.layers.mount_rootfs(plan.folder, plan.layers, upper_mib(spec.resources))
                identity.write(plan.folder / "rootfs", spec.uid, spec.hostname, identity.resolver_of(spec.services))
            else:
                self.layers.mount_rootfs(
                    plan.folder, plan.layers, upper_mib(spec.resources), lambda upper: fill(upper, procs)
                )
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        if ticks is None:
            reap(pid)
            raise StartFailed(f"the monitor ended at once: {_said(plan.folder)}", reason="VmmExited")
        ceiling_mib = spec.resources.memory_max_mib
        handle = Handle(pid, ticks, plan.vm_uid, self.runtime.accel, 0, ceiling_mib, os.cpu_count() or 1)
        return replace(handle, checkpoint=spec.checkpoint, address=address)

    def _start_monitor(
        self, folder: Path, procs: list[Path], begin: tuple[int, int], cover: str, *, supervise: bool
    ) -> int:
        """Its socket listens before it runs, so that nobody has to wait for it."""
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            log = stack.enter_context((folder / "monitor.log").open("wb"))
            listener.bind(str(folder / "agent.sock"))
            listener.listen(4)
            argv = [str(MONITOR), str(folder), str(listener.fileno()), *(["--init"] if self.runtime.init else [])]
            argv += ["--hide", self.runtime.hide] if self.runtime.hide else []
            argv += ["--cover", cover] if cover else []
            argv += ["--begin", *map(str, begin)] if any(begin) else []
            served = listen(folder, stack) if supervise else []
            argv += served
            argv += ["--", *map(str, procs)]
            try:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env={},
                    start_new_session=True,
                    pass_fds=(listener.fileno(), *map(int, served[2:])),
                )
            except OSError as error:
                raise StartFailed(f"{MONITOR}: {error.strerror}: build it with `make setup`") from error
        child.returncode = 0  # the pidfd watcher reaps it, not Popen's own bookkeeping
        return child.pid

    async def reach(
        self, plan: StartPlan, handle: Handle, stack: AsyncExitStack, carry: SessionCarry | None = None
    ) -> tuple[AgentLink, WatchedProcess]:
        """The monitor, greeted; `stack` closes both. StartFailed when it is gone or silent."""
        descriptor = open_same(handle.pid, handle.start_ticks)
        if descriptor is None:
            raise StartFailed(f"the monitor ended: {_said(plan.folder)}", reason="VmmExited")
        process = WatchedProcess(handle.pid, descriptor)
        stack.callback(process.close)
        seat = seat_of(plan.spec.uid, plan.folder, handle)
        try:
            link = await AgentLink.connect(
                seat.folder / "agent.sock", deadline_s=GREET_DEADLINE_S, gone=process.gone, carry=carry
            )
        except (StartFailed, AgentLost) as error:
            raise StartFailed(f"{error}; the monitor said: {_said(seat.folder)}", reason=error.reason) from error
        stack.push_async_callback(link.close)
        return link, process

    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None:
        """See Driver.adopt. None when the monitor is gone; StartFailed when it does not answer."""
        descriptor = open_same(handle.pid, handle.start_ticks)
        if descriptor is None:
            return None
        os.close(descriptor)
        main = ProcCarry(MAIN_PROC, offsets.get(1, 0), offsets.get(2, 0), stdin_open=plan.spec.process.stdin)
        async with AsyncExitStack() as stack:
            link, process = await self.reach(plan, handle, stack, SessionCarry(procs=(main,)))
            place = self.place(plan, handle)
            supervisor = await supervised(plan.spec.services, place.folder, process, plan.tell, stack)
            engine = OciEngine(place, handle, process, link, supervisor=supervisor)
            if self.checkpointing is not None:  # a former hostd may have died while it took a checkpoint
                await go_on(engine)
            stack.pop_all()
            return engine

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        """See Driver.destroy."""
        seat = seat_of(uid, folder, handle)
        uid, folder = seat.name, seat.folder
        await asyncio.to_thread(self.cgroups.remove, uid)  # kills whatever is in it, the monitor too
        if handle is not None:
            await self._reap(handle)
        await asyncio.to_thread(self.layers.unmount_rootfs, folder)
        if handle is None or handle.address:
            await asyncio.to_thread(self.links.remove, uid)
        if self.runtime.state is not None:
            await asyncio.to_thread(remove_folder, self.runtime.state / uid)
        await asyncio.to_thread(remove_folder, folder)

    async def _reap(self, handle: Handle) -> None:
        """The monitor may have been moved out of its cgroup by somebody; and as our child it has to be reaped."""
        descriptor = open_same(handle.pid, handle.start_ticks)
        if descriptor is None:
            if is_zombie(handle.pid, handle.start_ticks):
                reap(handle.pid)
            return
        process = WatchedProcess(handle.pid, descriptor)
        try:
            process.kill()
            await asyncio.wait({process.gone}, timeout=KILL_DEADLINE_S)
            if not process.gone.done():
                raise HostdError(
                    f"the monitor, pid {handle.pid}, does not end within {KILL_DEADLINE_S:.0f} s of SIGKILL"
                )
        finally:
            process.close()


def _said(folder: Path) -> str:
    try:
        return (folder / "monitor.log").read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "nothing"
    except OSError:
        return "nothing"
