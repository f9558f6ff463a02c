"""Warm host-kernel sandboxes: a container with its image mounted that is nobody's yet, and runs our init and a pause.

A claim gives it names, limits and size, and starts the sandbox's command in it as exec does, which is most of what a
start costs less: no namespaces, no mounts, no monitor. Until then no program of the image has run. Init stays the
container's process 1 and reaps what the command leaves; the sandbox ends with its command, as any does.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from guestagent.errors import GuestRefused
from guestagent.messages import StartProcess
from hostd.agentlink import AgentLink
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Engine, Loss, Region, StartPlan, WarmGuest
from hostd.drivers.oci import identity
from hostd.drivers.oci.bundle import config_json
from hostd.drivers.oci.checkpointing import Beginning
from hostd.drivers.oci.engine import RUNTIME_ENV, OciEngine
from hostd.drivers.oci.mounts import resize_upper
from hostd.drivers.oci.place import Place, bundle_shape
from hostd.drivers.oci.plan import limits_for, upper_mib
from hostd.drivers.oci.regions import regions_of
from hostd.drivers.oci.users import ROOT
from hostd.errors import StartFailed
from hostd.journal import Handle
from hostd.process import WatchedProcess
from hostd.spec import Command
from hostd.tasks import to_its_end

ORIGIN = "warm claim"
PAUSE = ("/proc/self/exe", "pause")  # init is the monitor's program, and so is this
CLONE_NEWUTS = 0x04000000  # linux/sched.h

_libc = ctypes.CDLL(None, use_errno=True)


class Starting(Protocol):
    """What is needed of the driver (hostd/drivers/oci/driver.py)."""

    cgroups: Hierarchy

    def place(self, plan: StartPlan, handle: Handle) -> Place: ...
    async def launch(self, plan: StartPlan, beginning: Beginning, made: Callable[[Handle], None]) -> Handle: ...
    async def reach(
        self, plan: StartPlan, handle: Handle, stack: AsyncExitStack
    ) -> tuple[AgentLink, WatchedProcess]: ...
    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None: ...


@dataclass
class OciWarmGuest:
    """Implements hostd.drivers.contract.WarmGuest. `init_pid` is the container's process 1; `open` closes the rest."""

    handle: Handle
    place: Place
    link: AgentLink
    process: WatchedProcess
    init_pid: int
    open: AsyncExitStack
    unrehearsed: str = ""  # on the host's own kernel nothing gets quicker by having been run

    async def wait_gone(self) -> Loss:
        """See WarmGuest.wait_gone."""
        await asyncio.wait({self.process.gone, self.link.lost}, return_when=asyncio.FIRST_COMPLETED)
        return Loss("VmmExited", "the container's monitor is gone")

    async def regions(self) -> list[Region]:
        """See WarmGuest.regions."""
        return await asyncio.to_thread(lambda: regions_of(sorted(self.place.cgroups.pids(self.place.uid))))

    def current(self) -> bool:
        """See WarmGuest.current. It was made of nothing but its image."""
        return True

    async def detach(self) -> None:
        """See WarmGuest.detach."""
        await self.open.aclose()


class OciWarming:
    """Implements hostd.drivers.contract.Warming for crun. Stateless."""

    def __init__(self, driver: Starting, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._driver, self._clock = driver, clock

    async def prewarm(self, plan: StartPlan, made: Callable[[Handle], None]) -> OciWarmGuest:
        """See Warming.prewarm."""
        uid = plan.spec.uid
        handle = await self._driver.launch(plan, Beginning(), lambda handle: made(replace(handle, member=uid)))
        handle = replace(handle, member=uid)
        try:
            async with AsyncExitStack() as stack:
                link, process = await self._driver.reach(plan, handle, stack)
                place = self._driver.place(plan, handle)
                init_pid = await self._pause(place, link)
                return OciWarmGuest(handle, place, link, process, init_pid, stack.pop_all())
        except BaseException:
            await to_its_end(self._driver.destroy(uid, plan.folder, handle))
            raise

    async def _pause(self, place: Place, link: AgentLink) -> int:
        command = Command(PAUSE, (), "/", "", False, False, 24, 80)
        config = config_json(command, ROOT, bundle_shape(place))
        await asyncio.to_thread((place.folder / "config.json").write_text, json.dumps(config))
        proc = link.new_proc()
        argv = place.runtime.run_argv(place.folder, place.uid, proc, tty=False)
        start = StartProcess(
            proc=proc, argv=tuple(map(os.fsencode, argv)), env=RUNTIME_ENV, cwd=b"/", tty=False, rows=24, cols=80,
            stdin=False,
        )  # fmt: skip
        try:
            pid = await link.request(lambda session: session.start(start))
        except GuestRefused as error:
            raise StartFailed(f"{place.runtime.name} made no container: {error}", reason="RuntimeFailed") from error
        assert isinstance(pid, int)
        return pid

    async def claim(self, guest: WarmGuest, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Warming.claim."""
        assert isinstance(guest, OciWarmGuest)
        begin_s = self._clock()
        handle = replace(guest.handle, elastic_mib=plan.spec.resources.memory_max_mib)
        try:
            made(handle)
            if guest.process.gone.done() or guest.link.lost.done():
                raise StartFailed("the member is gone", reason="VmmExited")
            place = self._driver.place(plan, handle)
            await asyncio.to_thread(_become, place, plan, guest.init_pid)
        except BaseException:
            await to_its_end(self._end(guest))
            raise
        guest.open.pop_all()  # the engine's now
        phases = (("resume", self._clock() - begin_s), ("agent", 0.0))
        engine = OciEngine(place, handle, guest.process, guest.link, phases)
        engine.origin = ORIGIN
        return engine

    async def _end(self, guest: OciWarmGuest) -> None:
        await guest.detach()
        await self._driver.destroy(guest.place.uid, guest.place.folder, guest.handle)


def _become(place: Place, plan: StartPlan, init_pid: int) -> None:
    spec = plan.spec
    place.cgroups.set_limits(place.uid, limits_for(spec.resources, place.runtime))
    resize_upper(place.folder, upper_mib(spec.resources))
    identity.write(place.rootfs, spec.uid, spec.hostname)
    set_hostname(init_pid, spec.hostname)


def set_hostname(pid: int, hostname: str) -> None:
    """Names the host that process `pid` sees. StartFailed. By a thread of its own: a thread's UTS namespace (setns(2))
    is the thread's alone, and goes with it."""
    problem: list[str] = []

    def enter() -> None:
        name = hostname.encode()
        try:
            with Path(f"/proc/{pid}/ns/uts").open("rb") as namespace:
                if _libc.setns(namespace.fileno(), CLONE_NEWUTS) != 0 or _libc.sethostname(name, len(name)) != 0:
                    problem.append(os.strerror(ctypes.get_errno()))
        except OSError as error:
            problem.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if problem:
        raise StartFailed(f"the sandbox cannot be named {hostname}: {problem[0]}", reason="ConfigureFailed")
