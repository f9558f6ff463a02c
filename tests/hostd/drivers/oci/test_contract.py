"""crun and runsc keep the drivers' contract, with real containers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.contract.driver_suite import DriverSuite, Rig
from tests.hostd.drivers.oci.rig import OciRig, Surroundings


class TestCrun(DriverSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, around: Surroundings) -> AsyncIterator[Rig]:
        yield OciRig(around, "crun")


class TestRunsc(DriverSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, around: Surroundings) -> AsyncIterator[Rig]:
        yield OciRig(around, "runsc")
