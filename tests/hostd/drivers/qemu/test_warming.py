"""QEMU keeps the contract of warm guests, with real clones."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hostd.drivers.qemu.accel import cpu_identity, qemu_version
from hostd.drivers.qemu.cloning import Cloner
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.template import GuestIdentity
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Vmms
from tests.contract.driver_suite import Rig
from tests.contract.warming_suite import WarmingSuite
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings

pytestmark = pytest.mark.guest
FIRST_UID = 262_000
BOOT_DEADLINE_S = 120.0


class WarmQemuRig(QemuRig):
    """With templates to clone from."""

    def __init__(self, around: Surroundings, templates: Templates) -> None:
        self._templates = templates
        super().__init__(around, FIRST_UID)

    def new_driver(self) -> QemuDriver:
        kernel, cgroups = self.around.kernel, self.around.cgroups
        identity = GuestIdentity(kernel.digest, kernel.initrd_digest, qemu_version(), cpu_identity("tcg"))
        vmms = Vmms(cgroups, BOOT_DEADLINE_S)
        cloner = Cloner(self._templates, kernel, identity, "tcg", vmms, self.around.root / "run")
        return QemuDriver(kernel, "tcg", cgroups, boot_deadline_s=BOOT_DEADLINE_S, cloner=cloner)


class TestQemuWarming(WarmingSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, around: Surroundings) -> AsyncIterator[Rig]:
        told: list[tuple[str, str]] = []
        async with Templates(around.store, lambda reason, message: told.append((reason, message))) as templates:
            yield WarmQemuRig(around, templates)
            assert [reason for reason, _ in told if reason != "TemplateReady"] == []
