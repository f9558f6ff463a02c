"""Parking and unparking: asked of the sandbox's host, which alone decides; the record follows its report."""

from __future__ import annotations

import asyncio

from controlplane import lifecycle
from controlplane.api.v1 import sandboxes_pb2
from controlplane.model import Phase, Sandbox
from controlplane.relay import HostLinks, answer
from controlplane.streams import Locator
from controlplane.view import View

PARK_DEADLINE_S = 600.0
"""A large guest's memory goes to the host's disk; the caller's own deadline counts when it is shorter."""

UNPARK_DEADLINE_S = 180.0
REPORT_LAG_S = 5.0


class Parking:
    """See the module."""

    def __init__(self, locator: Locator, view: View, links: HostLinks) -> None:
        self._locator, self._view, self._links = locator, view, links

    async def park(self, tenant: str, name: str) -> Sandbox:
        """See ParkSandbox."""
        place = await self._locator.running(tenant, name)
        stub = await self._links.stub(place.host)
        request = sandboxes_pb2.ParkSandboxRequest(name=place.sandbox.uid)
        await answer(stub.Park, request, place.host.name, PARK_DEADLINE_S)
        return await self._seen(place.sandbox, Phase.PARKED)

    async def unpark(self, tenant: str, name: str) -> Sandbox:
        """See UnparkSandbox."""
        place = await self._locator.running(tenant, name)
        stub = await self._links.stub(place.host)
        request = sandboxes_pb2.UnparkSandboxRequest(name=place.sandbox.uid)
        await answer(stub.Unpark, request, place.host.name, UNPARK_DEADLINE_S)
        return await self._seen(place.sandbox, Phase.RUNNING)

    async def _seen(self, sandbox: Sandbox, phase: Phase) -> Sandbox:
        """The record once the host's report has reached it; as it is when that takes too long."""

        def reached() -> Sandbox | None:
            now = self._view.sandboxes.get(sandbox.uid, sandbox)
            return now if now.status.phase is phase or now.status.phase in lifecycle.ENDED else None

        try:
            async with asyncio.timeout(REPORT_LAG_S):
                return await self._view.until(reached)
        except TimeoutError:
            return self._view.sandboxes.get(sandbox.uid, sandbox)
