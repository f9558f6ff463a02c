"""A driver whose sandboxes exist in memory only: for tests, and for simulating hundreds of hosts on one machine.

Promise: it keeps hostd.drivers.contract as the real drivers do (one contract suite runs over all of them), with
programs that are coroutines (hostd/drivers/fakeprograms.py) and memory that is a number. Machines belong to the
driver, not to an engine: what one hostd lets go of another that is given the same driver adopts. A process that ends
takes its machines with it, as a host does that loses power.

Faults come on demand: `faults` for what a driver may refuse, `crash` and `lose_agent` for what happens to a machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from controlplane.api.services import ServicePolicy
from controlplane.api.vcpus import vcpu_ceiling
from hostd.drivers.contract import Driver, Engine, Exit, Loss, ProcessLink, Region, StartPlan
from hostd.drivers.fakecheckpointing import FakeCheckpointing
from hostd.drivers.fakemachine import MAIN, SIGKILL, FakeLink, FakeProcess, Machine, acknowledge, run
from hostd.drivers.fakeprograms import PROGRAMS, Program, Terminal
from hostd.drivers.fakewarming import FakeWarming
from hostd.drivers.seat import seat_of
from hostd.errors import AgentLost, CommandFailed, ControlLost, HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.memory.events import MemoryEvents
from hostd.memory.values import Mechanism, MemoryEvent, MemoryNow, Moved, Resized, ShortfallCause
from hostd.services.account import ServiceUsage
from hostd.spec import Command, MemoryShape, Resources, memory_shape

FIRST_PID = 1 << 22
"""Above every pid that Linux gives (PID_MAX_LIMIT), so that nothing real is ever meant."""

FAKE_BASE_USE_MIB = 48


@dataclass
class Faults:
    """What goes wrong, until it is set back. Seconds are the running loop's."""

    boot_s: float = 0.0
    start: HostdError | None = None  # raised instead of starting
    adopt: HostdError | None = None
    spawn: HostdError | None = None
    control: HostdError | None = None  # resize and memory fail with it
    destroy: HostdError | None = None
    follow_s: float = 0.0  # how long a guest takes to follow a resize
    most_mib: int | None = None  # what a guest plugs at most, whatever is asked
    least_mib: int | None = None  # what a guest keeps at least
    checkpoint: HostdError | None = None  # raised instead of taking one
    restore: HostdError | None = None
    claim: HostdError | None = None
    claim_s: float = 0.0


class FakeDriver:
    """Implements hostd.drivers.contract.Driver."""

    def __init__(self, programs: Mapping[str, Program] = PROGRAMS, *, accel: str = "fake") -> None:
        self.programs, self.accel = programs, accel
        self.faults = Faults()
        self.machines: dict[str, Machine] = {}
        self.starts = 0
        self._pids = itertools.count(FIRST_PID)
        self.warming: FakeWarming | None = FakeWarming(self)
        self.checkpointing: FakeCheckpointing | None = FakeCheckpointing(self)

    async def start(self, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Driver.start."""
        machine = await self.boot(plan, made)
        return self.attach(machine, (("vmm", 0.0), ("kernel", self.faults.boot_s), ("agent", 0.0)))

    def attach(self, machine: Machine, start_phases: tuple[tuple[str, float], ...]) -> FakeEngine:
        """A link to a machine that runs."""
        return FakeEngine(self, machine, start_phases)

    async def boot(
        self, plan: StartPlan, made: Callable[[Handle], None], *, member: str = "", checkpoint: str = ""
    ) -> Machine:
        """A machine that runs; on any error nothing of it is left."""
        shape = memory_shape(plan.spec.resources, sum(layer.size_bytes for layer in plan.layers))
        resources = plan.spec.resources
        self.starts += 1
        try:
            handle = Handle(
                next(self._pids),
                self.starts,
                plan.vm_uid,
                self.accel,
                shape.base_mib,
                shape.elastic_mib,
                resources.vcpus,
                member=member,
                checkpoint=checkpoint,
                max_vcpus=vcpu_ceiling(resources.vcpus),
            )
            machine = Machine(
                plan.spec.uid,
                handle,
                resources,
                asyncio.get_running_loop().create_future(),
                services=plan.spec.services,
            )
            machine.actual_mib = shape.base_mib + shape.requested_mib(resources.memory_mib)
            self.machines[plan.spec.uid] = machine
            made(handle)
            await asyncio.sleep(self.faults.boot_s)
            if self.faults.start is not None:
                raise self.faults.start
            if machine.lost.done():
                raise HostdError(machine.lost.result().message, reason=machine.lost.result().reason)
        except BaseException:
            await self._end(plan.spec.uid, "the start was given up")
            raise
        return machine

    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None:
        """See Driver.adopt."""
        machine = self.machines.get(seat_of(plan.spec.uid, plan.folder, handle).name)
        if machine is None or machine.handle != handle or machine.lost.done():
            return None
        if self.faults.adopt is not None:
            raise self.faults.adopt
        main = machine.processes.get(MAIN)
        if main is not None:
            acknowledge(main.terminal, offsets)
        return FakeEngine(self, machine)

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        """See Driver.destroy."""
        if self.faults.destroy is not None:
            raise self.faults.destroy
        seat = seat_of(uid, folder, handle)
        await self._end(seat.name, "it was destroyed")
        with contextlib.suppress(OSError):  # a pool member has one, always empty: rmdir(2) takes nothing else
            await asyncio.to_thread(seat.folder.rmdir)

    async def _end(self, uid: str, why: str) -> None:
        machine = self.machines.pop(uid, None)
        if machine is None:
            return
        machine.lose(Loss("VmmExited", why))
        running = [process.task for process in machine.processes.values() if process.task is not None]
        if running:
            await asyncio.wait(running)

    # What befalls a machine.

    def tell_memory(self, uid: str, event: MemoryEvent) -> None:
        """The guest tells something of its memory."""
        self.machines[uid].memory_events.tell(event)

    def crash(self, uid: str, why: str = "signal SIGKILL ended it") -> None:
        """The engine's process dies."""
        self.machines[uid].lose(Loss("VmmExited", f"the fake VMM is gone: {why}"))

    def lose_agent(self, uid: str, why: str = "agent broke the protocol") -> None:
        """The agent breaks its contract."""
        self.machines[uid].lose(Loss("AgentLost", f"the agent is lost: {why}"))


class FakeEngine:
    """Implements hostd.drivers.contract.Engine."""

    def __init__(self, driver: FakeDriver, machine: Machine, start_phases: tuple[tuple[str, float], ...] = ()) -> None:
        self._driver, self._machine = driver, machine
        self.handle, self.start_phases, self.origin = machine.handle, start_phases, ""
        self._shape = MemoryShape(self.handle.base_mib, self.handle.elastic_mib)
        self._links: list[FakeLink] = []
        self._events = machine.memory_events

    async def wait_gone(self) -> Loss:
        """See Engine.wait_gone."""
        return await asyncio.shield(self._machine.lost)

    async def spawn(self, command: Command, *, main: bool) -> ProcessLink:
        """See Engine.spawn."""
        self._require_alive()
        if self._driver.faults.spawn is not None:
            raise self._driver.faults.spawn
        if not command.workdir.startswith("/") or any("\0" in word for word in command.argv):
            raise InvalidSpec(f"{command.argv[0]}: workdir {command.workdir!r} is not absolute, or argv has a NUL byte")
        name = command.argv[0]
        program = self._driver.programs.get(name.rsplit("/", 1)[-1])
        if program is None:
            code, problem = (126, "permission denied") if name.startswith("/") else (127, "command not found")
            raise CommandFailed(f"{name}: {problem}", code)
        machine = self._machine
        number = MAIN if main else next(machine.numbers)
        process = FakeProcess(number, Terminal(command, self._use), asyncio.get_running_loop().create_future())
        machine.processes[number] = process
        process.task = asyncio.create_task(run(machine, process, program), name=f"fake {machine.uid} {name}")
        return self._link(process)

    def _use(self, mib: int) -> None:
        self._machine.used_mib += mib

    def _link(self, process: FakeProcess) -> FakeLink:
        link = FakeLink(self._machine, process)
        self._links.append(link)
        return link

    def resume(self) -> ProcessLink | None:
        """See Engine.resume."""
        for process in [*self._machine.processes.values()]:
            if process.number != MAIN:
                process.end(Exit(128 + SIGKILL, SIGKILL))
                del self._machine.processes[process.number]
        main = self._machine.processes.get(MAIN)
        return None if main is None else self._link(main)

    async def resize(self, resources: Resources, *, deadline_s: float = 0.0) -> Resized:
        """See Engine.resize."""
        self._require_control()
        machine, faults, loop = self._machine, self._driver.faults, asyncio.get_running_loop()
        before_mib = self._follow()
        if resources != machine.resources:
            machine.resources, machine.asked_at_s = resources, loop.time()
        if not self._follows():
            await asyncio.sleep(min(deadline_s, machine.asked_at_s + faults.follow_s - loop.time()))
            self._require_control()
        wanted_mib = self._shape.base_mib + self._shape.requested_mib(resources.memory_mib)
        actual_mib = self._follow()
        cause = None
        if actual_mib != wanted_mib:
            late = ShortfallCause.UNCOOPERATIVE if deadline_s else ShortfallCause.FOLLOWING
            held = ShortfallCause.IN_USE if actual_mib > wanted_mib else ShortfallCause.HOST_FULL
            cause = held if self._follows() else late
        moved_mib = actual_mib - before_mib
        moved = (Moved(Mechanism.VIRTIO_MEM, moved_mib, loop.time() - machine.asked_at_s),) if moved_mib else ()
        vcpus = min(self.handle.ceiling_vcpus, resources.vcpus)
        return Resized(actual_mib, abs(wanted_mib - actual_mib), cause, moved, vcpus, cause.value if cause else "")

    def serve_as(self, policy: ServicePolicy) -> None:
        """See Engine.serve_as."""
        self._machine.services = policy

    def service_usage(self) -> ServiceUsage | None:
        """See Engine.service_usage. Nothing flows in a fake."""
        return ServiceUsage() if self._machine.services.answered else None

    def memory_events(self) -> AsyncIterator[MemoryEvent]:
        """See Engine.memory_events. Tests tell them by FakeDriver.tell_memory."""
        self._machine.memory_events.close()  # an engine's before this one, perhaps
        self._events = self._machine.memory_events = MemoryEvents()
        if self._machine.lost.done():
            self._events.close()
        return self._events()

    def _follows(self) -> bool:
        return asyncio.get_running_loop().time() - self._machine.asked_at_s >= self._driver.faults.follow_s

    def _follow(self) -> int:
        """What the guest has by now, MiB."""
        machine, faults = self._machine, self._driver.faults
        if self._follows():
            wanted = self._shape.base_mib + self._shape.requested_mib(machine.resources.memory_mib)
            most = wanted if faults.most_mib is None else min(wanted, faults.most_mib)
            machine.actual_mib = most if faults.least_mib is None else max(most, faults.least_mib)
        return machine.actual_mib

    async def memory(self) -> MemoryNow:
        """See Engine.memory."""
        self._require_control()
        actual_mib = self._follow()
        used_mib = min(actual_mib, FAKE_BASE_USE_MIB + self._machine.used_mib)
        plugged_mib = actual_mib - self._shape.base_mib
        return MemoryNow(actual_mib, actual_mib - used_mib, plugged_mib, signals=self._machine.signals)

    async def regions(self) -> list[Region]:
        """See Engine.regions. No page of the host belongs to it."""
        return []

    async def detach(self) -> None:
        """See Engine.detach."""
        for link in self._links:
            link.cut()
        self._links.clear()
        self._events.close()

    def _require_alive(self) -> None:
        if self._machine.lost.done():
            raise AgentLost(self._machine.lost.result().message)

    def _require_control(self) -> None:
        if self._driver.faults.control is not None:
            raise self._driver.faults.control
        if self._machine.lost.done():
            raise ControlLost(self._machine.lost.result().message)


_: type[Driver] = FakeDriver  # the contract, checked by the type checker
