"""Clones for benchmarks and tests: a driver that boots cold, or clones from the template that it is told to."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostd.cgroups import Hierarchy
from hostd.drivers.contract import StartPlan
from hostd.drivers.qemu.accel import cpu_identity, qemu_version
from hostd.drivers.qemu.cloning import Cloner, Fitting
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.plan import GuestKernel
from hostd.drivers.qemu.template import HOT_STARTS, Candidates, Choice, GuestIdentity, Origin, choose
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Vmms
from sharedcache.store import Store

BOOT_DEADLINE_S = 180.0


class WantedCloner(Cloner):
    """Clones from the kind of template that `wanted` says, whatever else would fit; has none made."""

    wanted: Origin = Origin.COLD

    def choose(self, plan: StartPlan) -> tuple[Fitting, Choice]:
        fitting = self.fitting(plan)
        image = fitting.candidates.image_key if self.wanted is Origin.IMAGE else ""
        only = Candidates(image, fitting.candidates.generic_key)
        return fitting, choose(only, self.templates.ready(), cold=self.wanted is Origin.COLD)


@dataclass
class CloneKit:
    """Templates of one store, and drivers that clone from them."""

    kernel: GuestKernel
    accel: str
    cgroups: Hierarchy
    templates: Templates
    identity: GuestIdentity
    run_dir: Path
    told: list[tuple[str, str]] = field(default_factory=list)
    _drivers: dict[Origin, QemuDriver] = field(default_factory=dict)

    def cloner(self, wanted: Origin) -> WantedCloner:
        vmms = Vmms(self.cgroups, BOOT_DEADLINE_S)
        made = WantedCloner(self.templates, self.kernel, self.identity, self.accel, vmms, self.run_dir)
        made.wanted = wanted
        return made

    def driver(self, wanted: Origin) -> QemuDriver:
        """The driver whose guests come up as `wanted`."""
        if wanted not in self._drivers:
            self._drivers[wanted] = QemuDriver(
                self.kernel, self.accel, self.cgroups, boot_deadline_s=BOOT_DEADLINE_S, cloner=self.cloner(wanted)
            )
        return self._drivers[wanted]

    async def make(self, plan: StartPlan) -> None:
        """Has both templates of `plan` made, and waits for them. RuntimeError when one fails."""
        vmms = Vmms(self.cgroups, BOOT_DEADLINE_S)
        cloner = Cloner(self.templates, self.kernel, self.identity, self.accel, vmms, self.run_dir)
        for _ in range(HOT_STARTS):
            cloner.choose(plan)
        await self.templates.settle()
        failures = [message for reason, message in self.told if reason != "TemplateReady"]
        if failures:
            raise RuntimeError(failures[0])


@asynccontextmanager
async def clone_kit(store: Store, kernel: GuestKernel, accel: str, cgroups: Hierarchy) -> AsyncIterator[CloneKit]:
    """Templates of this process's own: their guests' names are no other run's."""
    told: list[tuple[str, str]] = []
    identity = GuestIdentity(kernel.digest, kernel.initrd_digest, qemu_version(), cpu_identity(accel))
    with tempfile.TemporaryDirectory(prefix="sl-clones-", dir="/var/tmp") as folder:
        await asyncio.to_thread(Path(folder).chmod, 0o711)
        async with Templates(store, lambda reason, message: told.append((reason, message))) as templates:
            yield CloneKit(kernel, accel, cgroups, templates, identity, Path(folder), told)
