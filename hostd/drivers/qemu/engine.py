"""A running QEMU with its agent: implements hostd.drivers.contract.Engine.

Owns, while attached: the QMP session, the agent's link and the watch on the process. detach() lets go of all three
and leaves the guest running; the driver's destroy() ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.api.services import ServicePolicy
from guestagent.errors import BadRequest
from guestagent.messages import MAIN_PROC, GuestEvent, StartProcess
from hostd.agentlink import AgentLink
from hostd.agentprocess import AgentProcess
from hostd.cgroups import Hierarchy, Limits
from hostd.drivers.contract import Loss, Region
from hostd.drivers.qemu.control import Control
from hostd.drivers.qemu.elastic import GuestMemory
from hostd.drivers.qemu.plan import limits_for
from hostd.drivers.qemu.resizing import Resizing
from hostd.drivers.qemu.vmm import first_loss
from hostd.errors import ControlLost, HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.memory.events import MemoryEvents
from hostd.memory.values import MemoryEvent, MemoryNow, Resized
from hostd.process import WatchedProcess
from hostd.regions import regions_of
from hostd.services.account import ServiceUsage
from hostd.services.sockets import SocketsTool
from hostd.spec import Command, Resources
from hostd.turnstile import Turnstile

SERVICES_LAG_S = 4.0


@dataclass(frozen=True)
class Parts:
    """What an attached engine holds."""

    process: WatchedProcess
    control: Control
    link: AgentLink
    tool: SocketsTool | None = None


class QemuEngine:
    """See the module."""

    def __init__(
        self,
        uid: str,
        handle: Handle,
        parts: Parts,
        cgroups: Hierarchy,
        start_phases: tuple[tuple[str, float], ...] = (),
        resumed: AgentProcess | None = None,
    ) -> None:
        self.handle, self.start_phases = handle, start_phases
        self.origin = ""
        self.turnstile = Turnstile()
        """Starts of processes go through it; a checkpoint is taken alone."""
        self._resumed = resumed
        self._uid, self._parts, self._cgroups = uid, parts, cgroups
        self._limits: Limits | None = None  # as this engine set them
        self._memory_events = MemoryEvents()
        self._memory = GuestMemory(uid, handle, parts.control, parts.link, cgroups)
        self._resizing = Resizing(handle, parts.control, parts.link, self._memory, self.turnstile)
        parts.link.on_event = self._heard

    @property
    def link(self) -> AgentLink:
        """The agent's link, for tests and for adoption."""
        return self._parts.link

    @property
    def tool(self) -> SocketsTool | None:
        """What serves its services port, if anything does."""
        return self._parts.tool

    @property
    def control(self) -> Control:
        """QEMU's control session, for checkpoints."""
        return self._parts.control

    async def wait_gone(self) -> Loss:
        """See Engine.wait_gone."""
        parts = self._parts
        if parts.tool is None:
            return await first_loss(parts.process.gone, parts.link.lost)
        first = asyncio.create_task(first_loss(parts.process.gone, parts.link.lost))
        try:
            either: set[asyncio.Future[Any]] = {first, parts.tool.lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():  # as with the agent's port: it closes a moment before its QEMU is seen to end
                await asyncio.wait({first}, timeout=SERVICES_LAG_S)
            return first.result() if first.done() else Loss("ServicesLost", parts.tool.lost.result())
        finally:
            first.cancel()

    async def spawn(self, command: Command, *, main: bool) -> AgentProcess:
        """See Engine.spawn."""
        link = self._parts.link
        try:
            start = start_of(command, MAIN_PROC if main else link.new_proc())
        except BadRequest as error:
            raise InvalidSpec(f"{command.argv[0] if command.argv else 'command'}: {error}") from error
        async with self.turnstile.through():
            return await link.spawn(start)

    def resume(self) -> AgentProcess | None:
        """See Engine.resume."""
        link = self._parts.link
        main, self._resumed = self._resumed, None
        if main is not None:
            return main
        for state in link.guest.procs:
            process = link.follow(state.proc)
            if state.proc == MAIN_PROC:
                main = process
            else:
                link.abandon(process)
        return main

    async def resize(self, resources: Resources, *, deadline_s: float = 0.0) -> Resized:
        """See Engine.resize. Also what comes first is through when this returns: limits, and one mechanism's move."""
        limits = limits_for(resources, restored=bool(self.handle.checkpoint))
        if limits != self._limits:
            try:
                await asyncio.to_thread(self._cgroups.set_limits, self._uid, limits)
            except HostdError as error:
                raise ControlLost(str(error)) from error
            self._limits = limits
        return await self._resizing.to(resources, deadline_s)

    def serve_as(self, policy: ServicePolicy) -> None:
        """See Engine.serve_as."""
        if self.tool is not None:
            self.tool.change(policy)

    def service_usage(self) -> ServiceUsage | None:
        """See Engine.service_usage."""
        return self.tool.usage() if self.tool is not None else None

    def memory_events(self) -> AsyncIterator[MemoryEvent]:
        """See Engine.memory_events."""
        return self._memory_events()

    def _heard(self, event: GuestEvent) -> None:
        told = self._memory.heard(event)
        if told is not None:
            self._memory_events.tell(told)

    async def memory(self) -> MemoryNow:
        """See Engine.memory."""
        return (await self._memory.look())[0]

    async def regions(self) -> list[Region]:
        """See Engine.regions."""
        return await asyncio.to_thread(regions_of, self.handle.pid)

    async def console_tail(self) -> str:
        """The guest kernel's last words."""
        return await self._parts.control.console_tail()

    async def take_pieces(self, tables: Sequence[Path]) -> None:
        """Has QEMU map a layer's files where its blob is mapped now (src/onecopy.c). Idempotent. ControlLost."""
        control = self._parts.control
        with contextlib.suppress(ControlLost):  # of a hostd that died in between
            await control.execute("object-del", id="pieces")
        for table in tables:
            backend = {"mem-path": str(table), "size": table.stat().st_size, "share": True, "readonly": True}
            async with self.turnstile.through():  # a checkpoint sees no backend that comes and goes
                await control.execute("object-add", **{"qom-type": "memory-backend-file", "id": "pieces", **backend})
                await control.execute("object-del", id="pieces")

    async def detach(self) -> None:
        """See Engine.detach. Idempotent."""
        self._memory_events.close()
        await self._resizing.aclose()
        self._memory.close()
        if self._parts.tool is not None:
            await self._parts.tool.aclose()
        await self._parts.link.close()
        await self._parts.control.close()
        self._parts.process.close()


def start_of(command: Command, proc: int) -> StartProcess:
    """A command as the agent takes it. BadRequest says what is wrong with it."""
    return StartProcess(
        proc=proc,
        argv=tuple(word.encode(errors="surrogateescape") for word in command.argv),
        env=tuple(f"{key}={value}".encode(errors="surrogateescape") for key, value in command.env),
        cwd=command.workdir.encode(errors="surrogateescape"),
        user=command.user.encode(errors="surrogateescape"),
        tty=command.tty,
        rows=command.rows,
        cols=command.cols,
        stdin=command.stdin,
    )
