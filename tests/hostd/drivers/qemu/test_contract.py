"""QEMU keeps the drivers' contract, with a real guest."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.contract.driver_suite import DriverSuite, Rig
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings

pytestmark = pytest.mark.guest


class TestQemu(DriverSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, around: Surroundings) -> AsyncIterator[Rig]:
        yield QemuRig(around)
