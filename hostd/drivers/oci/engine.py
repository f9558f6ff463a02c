"""A running OCI sandbox: implements hostd.drivers.contract.Engine over its monitor.

The monitor (hostd/drivers/oci/src) holds what must outlive hostd and speaks the agent protocol, so that its link is the
same as a guest's. Owns, while attached: that link, the watch on the monitor, the task that follows a resize. detach()
lets go of them and leaves the sandbox running; the driver's destroy() ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

from controlplane.api.services import ServicePolicy
from guestagent.errors import GuestRefused
from guestagent.messages import MAIN_PROC, StartProcess
from hostd.agentlink import AgentLink
from hostd.agentprocess import AgentProcess
from hostd.cgroups import Limits
from hostd.drivers.contract import Exit, Loss, OutputPiece, ProcessLink, Region
from hostd.drivers.oci.bundle import config_json, process_json
from hostd.drivers.oci.memory import SandboxMemory
from hostd.drivers.oci.mounts import resize_upper
from hostd.drivers.oci.place import Place, asked_of, bundle_shape, open_files
from hostd.drivers.oci.plan import limits_for, overhead_bytes, upper_mib
from hostd.drivers.oci.regions import regions_of
from hostd.drivers.oci.runtime import exit_code_of, last_words
from hostd.drivers.oci.supervisor import Supervisor
from hostd.drivers.oci.users import ROOT, ROOT_NAMES, Identity, identity_of
from hostd.errors import (
    AgentLost,
    CommandFailed,
    ControlLost,
    HostdError,
    InvalidSpec,
    SandboxGone,
    ShortOfResources,
    StartFailed,
)
from hostd.journal import Handle
from hostd.memory.events import MemoryEvents
from hostd.memory.values import Mechanism, MemoryEvent, MemoryEventKind, MemoryNow, Resized
from hostd.memory.waiting import wait_for_target
from hostd.process import WatchedProcess
from hostd.services.account import ServiceUsage
from hostd.services.sockets import SocketsTool
from hostd.spec import Command, Resources
from hostd.tasks import OwnedTasks

EXIT_LAG_S = 0.5
PAUSE_PROC = 2
"""The first number that a link gives: of what holds a warm container open (warming.py)."""

LAST_SIGNAL, LOST_STATUS = 64, 128
KILL_DEADLINE_S = 15.0
LOG_TAIL_CHARS = 8192
FIRST_RETRY_S, LAST_RETRY_S = 0.02, 1.0
OOM_POLL_S = 1.0
RUNTIME_ENV = (b"PATH=/usr/sbin:/usr/bin:/sbin:/bin",)


def told_by_runsc(exit_: Exit, *, main_ended: bool) -> Exit:
    """runsc ends with 128+signal when a signal ended the process; a program that ends with such a status by itself is
    not told apart. It ends with 128 when the kernel goes beneath it: the end of main kills all others. Pure."""
    if exit_.code == LOST_STATUS and main_ended:
        return Exit(128 + signal.SIGKILL, signal.SIGKILL)
    return Exit(exit_.code, exit_.code - 128) if 128 < exit_.code <= 128 + LAST_SIGNAL else exit_


class KernelProcess:
    """A process below the user-space kernel: the host knows only the `runsc` that waits for it. Signals go through the
    kernel; an end by a signal of the host's is the kernel's end. Implements hostd.drivers.contract.ProcessLink."""

    def __init__(self, engine: OciEngine, process: AgentProcess) -> None:
        self._engine, self._process, self.proc = engine, process, process.proc

    def output(self) -> AsyncIterator[OutputPiece]:
        """See ProcessLink.output."""
        return self._process.output()

    async def wait(self) -> Exit:
        """See ProcessLink.wait."""
        exit_ = await self._process.wait()
        if not exit_.signal:
            return told_by_runsc(exit_, main_ended=self._engine.main_ended)
        if self.proc == MAIN_PROC:
            self._engine.kernel_ended(f"signal {signal.Signals(exit_.signal).name} ended it")
        raise SandboxGone("its user-space kernel ended before it")

    async def write(self, data: bytes) -> None:
        """See ProcessLink.write."""
        await self._process.write(data)

    async def close_stdin(self) -> None:
        """See ProcessLink.close_stdin."""
        await self._process.close_stdin()

    async def signal(self, signo: int) -> None:
        """See ProcessLink.signal."""
        if not 1 <= signo <= LAST_SIGNAL:
            raise InvalidSpec(f"signal {signo} is outside 1..{LAST_SIGNAL}")
        await self._engine.kill(self.proc, signo)

    async def resize_tty(self, rows: int, cols: int) -> None:
        """See ProcessLink.resize_tty. The kernel reads the size off the terminal, but must be told to look."""
        await self._process.resize_tty(rows, cols)
        await self._engine.kill(self.proc, signal.SIGWINCH)

    async def release(self) -> None:
        """See ProcessLink.release."""
        await self._process.release()
        (self._engine.place.folder / f"{self.proc}.inside").unlink(missing_ok=True)


class OciEngine:
    """See the module."""

    def __init__(
        self,
        place: Place,
        handle: Handle,
        process: WatchedProcess,
        link: AgentLink,
        start_phases: tuple[tuple[str, float], ...] = (),
        supervisor: Supervisor | None = None,
    ) -> None:
        self.supervisor = supervisor
        self.place, self.handle, self.start_phases, self.origin = place, handle, start_phases, ""
        self._process, self.link = process, link
        self.memory_group = SandboxMemory(place.cgroups, place.uid)
        self._kernel: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks = OwnedTasks()
        self._memory_events = MemoryEvents()
        self._oom_watch: asyncio.Task[None] | None = None
        self.main_ended = False
        self._follow: asyncio.Task[None] | None = None
        self._others: dict[int, AgentProcess] = {}

    def kernel_ended(self, why: str) -> None:
        """The user-space kernel is gone, and with it the sandbox."""
        if not self._kernel.done():
            self._kernel.set_result(why)

    async def wait_gone(self) -> Loss:
        """See Engine.wait_gone."""
        gone, lost, supervisor = self._process.gone, self.link.lost, self.supervisor
        services = {supervisor.tool.lost, supervisor.link.lost} if supervisor else set()
        await asyncio.wait({gone, lost, self._kernel, *services}, return_when=asyncio.FIRST_COMPLETED)
        if self._kernel.done():
            return Loss("VmmExited", f"the user-space kernel is gone: {self._kernel.result()}")
        if not gone.done():  # its socket closes a moment before the monitor is seen to end
            await asyncio.wait({gone}, timeout=EXIT_LAG_S)
        if supervisor and (why := supervisor.why_lost(self.place.folder)):
            return Loss("ServicesLost", why)
        if gone.done():
            return Loss("VmmExited", f"the sandbox's monitor is gone: {gone.result()}")
        return Loss("AgentLost", f"the sandbox's monitor is lost: {lost.result()}")

    # Processes.

    async def spawn(self, command: Command, *, main: bool) -> ProcessLink:
        """See Engine.spawn."""
        proc = MAIN_PROC if main else self.link.new_proc()
        identity = ROOT if command.user in ROOT_NAMES else await self._identity(command.user)
        start = self._start_of(command, identity, proc)
        try:
            process = await self.link.spawn(start)
        except CommandFailed as error:
            raise self._translated(command, error) from error
        except BaseException:
            if not self.place.runtime.init:  # the link kills what waits for the process; the kernel has it still
                self._tasks.spawn(self.kill(proc, signal.SIGKILL), name=f"put away process {proc}")
            raise
        finally:
            (self.place.folder / f"{proc}.json").unlink(missing_ok=True)
        return self._linked(process)

    async def _identity(self, user: str) -> Identity:
        return await asyncio.to_thread(identity_of, user, self.place.rootfs)

    def _linked(self, process: AgentProcess) -> ProcessLink:
        if process.proc == MAIN_PROC:
            self._tasks.spawn(self._note_end(process), name=f"end of {self.place.uid}")
        else:
            self._others = {proc: one for proc, one in self._others.items() if not one.ended}
            self._others[process.proc] = process
        return process if self.place.runtime.init else KernelProcess(self, process)

    def others(self) -> int:
        """How many processes beside main run in it that were started through this engine."""
        return sum(1 for process in self._others.values() if not process.ended)

    async def _note_end(self, main: AgentProcess) -> None:
        with contextlib.suppress(HostdError):
            await main.wait()
            self.main_ended = True

    def _start_of(self, command: Command, identity: Identity, proc: int) -> StartProcess:
        """Writes what the runtime reads; the runtime's own command line."""
        place, runtime = self.place, self.place.runtime
        asked = asked_of(command, proc)
        if proc == MAIN_PROC and not place.warm:
            document, name = config_json(command, identity, bundle_shape(place)), "config.json"
            argv = runtime.run_argv(place.folder, place.uid, proc, tty=command.tty)
        else:
            document, name = process_json(command, identity, open_files=open_files()), f"{proc}.json"
            argv = runtime.exec_argv(place.folder, place.uid, proc, tty=command.tty)
        try:
            (place.folder / name).write_text(json.dumps(document))
        except OSError as error:
            raise SandboxGone(f"sandbox {place.uid} has no folder any more: {error.strerror}") from error
        return replace(asked, argv=tuple(map(os.fsencode, argv)), env=RUNTIME_ENV, cwd=b"/")

    def _translated(self, command: Command, error: CommandFailed) -> HostdError:
        """A refusal sorted: by the monitor or its init (an errno of their own), or in the runtime's words (EIO)."""
        refusal = error.__cause__
        if not isinstance(refusal, GuestRefused):
            return error
        words = refusal.message or os.strerror(refusal.errno)
        if refusal.errno == errno.EAGAIN:
            return ShortOfResources(f"{command.argv[0]}: {words}; end one of them")
        if refusal.errno != errno.EIO:
            return CommandFailed(f"{command.argv[0]}: {words}", error.exit_code)
        with contextlib.suppress(OSError):
            log = (self.place.folder / "runtime.log").read_text(errors="replace")[-LOG_TAIL_CHARS:]
            words = last_words(log) or words
        code = exit_code_of(words)
        if code is not None:
            return CommandFailed(f"{command.argv[0]}: {words}", code)
        return StartFailed(
            f"{self.place.runtime.name} could not start {command.argv[0]}: {words}", reason="RuntimeFailed"
        )

    def resume(self) -> ProcessLink | None:
        """See Engine.resume."""
        main: ProcessLink | None = None
        for state in self.link.guest.procs:
            if self.place.warm and state.proc == PAUSE_PROC:
                continue  # the container itself
            process = self.link.follow(state.proc)
            if state.proc == MAIN_PROC:
                main = self._linked(process)
            else:
                self._tasks.spawn(self._end_orphan(self._linked(process)), name=f"end orphan {state.proc}")
        return main

    async def _end_orphan(self, process: ProcessLink) -> None:
        """Ends a process whose client went with the former hostd, and frees what the monitor keeps for it."""
        with contextlib.suppress(HostdError):  # the engine's owner learns of it by wait_gone
            await process.signal(signal.SIGKILL)
            async for _ in process.output():
                pass
            await process.release()

    async def kill(self, proc: int, signo: int) -> None:
        """A signal through the user-space kernel. Nothing happens when the process has ended."""
        place, inside = self.place, None
        if proc != MAIN_PROC:
            try:
                inside = int((place.folder / f"{proc}.inside").read_text())
            except (OSError, ValueError):
                return  # released
        argv = place.runtime.kill_argv(place.folder, place.uid, signo, inside)
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(KILL_DEADLINE_S):
                await process.wait()  # not 0: it has ended, which wait() tells
        except TimeoutError:
            raise AgentLost(f"the user-space kernel took no signal within {KILL_DEADLINE_S:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    # Resources.

    async def resize(self, resources: Resources, *, deadline_s: float = 0.0) -> Resized:
        """See Engine.resize. Growing is done when this returns; shrinking goes on until the memory is there."""
        await self._stop_following()
        before_mib = (await self.memory()).actual_mib
        target = limits_for(resources, self.place.runtime)
        reached = await asyncio.to_thread(self.memory_group.step, target.memory_bytes)
        if not reached:
            self._follow = self._tasks.spawn(self._shrink(target.memory_bytes), name=f"shrink {self.place.uid}")
        await asyncio.to_thread(self._set_rest, target, upper_mib(resources))
        return await wait_for_target(
            self.memory, resources.memory_mib, before_mib, deadline_s, resources.vcpus, Mechanism.CGROUP
        )

    @property
    def tool(self) -> SocketsTool | None:
        """What serves its services, if anything does."""
        return self.supervisor.tool if self.supervisor is not None else None

    def serve_as(self, policy: ServicePolicy) -> None:
        """See Engine.serve_as."""
        if self.tool is not None:
            self.tool.change(policy)

    def service_usage(self) -> ServiceUsage | None:
        """See Engine.service_usage."""
        return self.tool.usage() if self.tool is not None else None

    def memory_events(self) -> AsyncIterator[MemoryEvent]:
        """See Engine.memory_events. A cgroup's counter of kills is looked at while somebody listens."""
        if self._oom_watch is None:
            self._oom_watch = self._tasks.spawn(self._watch_oom(), name=f"OOM kills of {self.place.uid}")
        return self._memory_events()

    async def _watch_oom(self) -> None:
        told = 0
        with contextlib.suppress(HostdError):  # the sandbox is ending
            while True:
                kills = await asyncio.to_thread(self.memory_group.oom_kills)
                if kills > told:
                    now, told = await self.memory(), kills
                    event = MemoryEvent(MemoryEventKind.OOM_KILL, now.available_mib, now.actual_mib, oom_kills=kills)
                    self._memory_events.tell(event)
                await asyncio.sleep(OOM_POLL_S)

    def _set_rest(self, target: Limits, writable_mib: int) -> None:
        now = replace(target, memory_bytes=self.memory_group.limit_bytes())
        try:
            self.place.cgroups.set_limits(self.place.uid, now)
            resize_upper(self.place.folder, writable_mib)
        except HostdError as error:
            raise ControlLost(str(error)) from error

    async def _shrink(self, target_bytes: int) -> None:
        wait_s = FIRST_RETRY_S
        with contextlib.suppress(HostdError):  # the sandbox is ending
            while not await asyncio.to_thread(self.memory_group.step, target_bytes):
                await asyncio.sleep(wait_s)
                wait_s = min(LAST_RETRY_S, wait_s * 2)

    async def _stop_following(self) -> None:
        if self._follow is not None:
            self._follow.cancel()
            await asyncio.wait({self._follow})
            self._follow = None

    async def memory(self) -> MemoryNow:
        """See Engine.memory."""
        group = self.memory_group
        limit, usage, signals = await asyncio.to_thread(lambda: (group.limit_bytes(), group.usage(), group.signals()))
        overhead = overhead_bytes(self.place.runtime)
        needed = max(0, usage.used_bytes - usage.file_bytes - overhead)
        actual = max(0, limit - overhead)
        return MemoryNow(actual >> 20, max(0, actual - needed) >> 20, signals=signals)

    async def regions(self) -> list[Region]:
        """See Engine.regions: of every process of the sandbox."""
        return await asyncio.to_thread(lambda: regions_of(sorted(self.place.cgroups.pids(self.place.uid))))

    async def detach(self) -> None:
        """See Engine.detach. Idempotent."""
        self._memory_events.close()
        await self._tasks.aclose()
        if self.supervisor is not None:
            await self.supervisor.aclose()
        await self.link.close()
        self._process.close()
