"""The fake driver's warm guests: machines that nobody has yet. Each has a directory, by which a restart finds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hostd.drivers.contract import Engine, Loss, Region, StartPlan, WarmGuest
from hostd.drivers.fakemachine import Machine
from hostd.errors import HostdError, StartFailed
from hostd.journal import Handle


class Faulty(Protocol):
    """The faults of the fake driver that matter here."""

    claim: HostdError | None
    claim_s: float


class Machines(Protocol):
    """What is needed of the fake driver."""

    @property
    def faults(self) -> Faulty: ...
    async def boot(self, plan: StartPlan, made: Callable[[Handle], None], *, member: str = "") -> Machine: ...
    def attach(self, machine: Machine, start_phases: tuple[tuple[str, float], ...]) -> Engine: ...
    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None: ...


class FakeWarmGuest:
    """Implements hostd.drivers.contract.WarmGuest. `outdated` is for tests to set."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        self.handle = machine.handle
        self.outdated = False
        self.unrehearsed = ""

    async def wait_gone(self) -> Loss:
        """See WarmGuest.wait_gone."""
        return await asyncio.shield(self.machine.lost)

    async def regions(self) -> list[Region]:
        """See WarmGuest.regions. No page of the host belongs to it."""
        return []

    def current(self) -> bool:
        """See WarmGuest.current."""
        return not self.outdated

    async def detach(self) -> None:
        """See WarmGuest.detach."""


class FakeWarming:
    """Implements hostd.drivers.contract.Warming."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self.claims = 0
        self.unrehearsed = ""  # what the guests to come say of themselves

    async def prewarm(self, plan: StartPlan, made: Callable[[Handle], None]) -> FakeWarmGuest:
        """See Warming.prewarm."""
        await asyncio.to_thread(plan.folder.mkdir, parents=True)
        try:
            machine = await self._machines.boot(plan, made, member=plan.spec.uid)
        except BaseException:
            plan.folder.rmdir()
            raise
        guest = FakeWarmGuest(machine, plan.folder)
        guest.unrehearsed = self.unrehearsed
        return guest

    async def claim(self, guest: WarmGuest, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Warming.claim."""
        assert isinstance(guest, FakeWarmGuest)
        self.claims += 1
        machine, faults = guest.machine, self._machines.faults
        try:
            made(guest.handle)
            await asyncio.sleep(faults.claim_s)
            if machine.lost.done():
                raise StartFailed(machine.lost.result().message, reason=machine.lost.result().reason)
            if faults.claim is not None:
                raise faults.claim
        except BaseException:
            await self._machines.destroy(plan.spec.uid, guest.folder, guest.handle)
            raise
        machine.resources = plan.spec.resources
        engine = self._machines.attach(machine, (("resume", faults.claim_s), ("agent", 0.0)))
        engine.origin = "warm claim"
        return engine
