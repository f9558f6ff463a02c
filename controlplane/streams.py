"""Which host a stream goes to, and when: waits, bounded, for a sandbox that no host has yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from controlplane import lifecycle
from controlplane.errors import NotFound, Precondition, TimedOut, Unavailable
from controlplane.model import Host, Phase, Sandbox
from controlplane.records import Records
from controlplane.view import View

BEGIN_DEADLINE_S = 180.0
"""How long an attach waits for a host to begin; a host boots few guests at a time."""

RUNNABLE = frozenset({Phase.RUNNING, Phase.STOPPING, Phase.PARKED})


@dataclass(frozen=True)
class Ended:
    """The sandbox has ended and no host has it: there is nothing to relay but how it ended."""

    sandbox: Sandbox


@dataclass(frozen=True)
class On:
    """The sandbox is on this host."""

    sandbox: Sandbox
    host: Host


class Locator:
    """See the module."""

    def __init__(self, records: Records, view: View, *, begin_deadline_s: float = BEGIN_DEADLINE_S) -> None:
        self._records, self._view, self._begin_deadline_s = records, view, begin_deadline_s

    async def begun(self, tenant: str, name: str, *, wait: bool = True) -> On | Ended:
        """Where a sandbox is, once a host has begun with it; without `wait` that must be so already (Precondition).
        NotFound, TimedOut, Unavailable (its host is LOST)."""
        sandbox = await self._records.get(tenant, name)
        if not wait and sandbox.status.phase in lifecycle.UNBEGUN:
            text = f"sandbox {sandbox.name} is {sandbox.status.phase.name} and has not begun: {sandbox.status.message}"
            raise Precondition("NotBegun", text, sandbox=sandbox.name, phase=sandbox.status.phase.value)
        seen = [sandbox]

        def begun() -> Sandbox | None:
            now = self._view.sandboxes.get(sandbox.uid)
            if now is None:
                raise NotFound("SandboxRemoved", f"sandbox {sandbox.name} was removed", sandbox=sandbox.name)
            seen[0] = now
            return None if now.status.phase in lifecycle.UNBEGUN else now

        try:
            async with asyncio.timeout(self._begin_deadline_s):
                await self._view.reached(sandbox.revision)
                now = await self._view.until(begun)
        except TimeoutError as error:
            status = seen[0].status
            text = f"sandbox {sandbox.name} is {status.phase.name} for more than {self._begin_deadline_s:g} s"
            raise TimedOut("NotBegun", f"{text}: {status.message}", sandbox=sandbox.name) from error
        return Ended(now) if not now.host else On(now, self._host_of(now))

    async def running(self, tenant: str, name: str) -> On:
        """Where a sandbox runs. Precondition (SandboxNotRunning) unless it does."""
        sandbox = await self._records.get(tenant, name)
        status = sandbox.status
        if status.phase not in RUNNABLE or not sandbox.host:
            why = f" ({status.reason}: {status.message})" if status.reason else ""
            text = f"sandbox {sandbox.name} is {status.phase.name}, not running{why}"
            raise Precondition("SandboxNotRunning", text, sandbox=sandbox.name, phase=status.phase.value)
        return On(sandbox, self._host_of(sandbox))

    def _host_of(self, sandbox: Sandbox) -> Host:
        host = self._view.hosts.get(sandbox.host)
        if host is None:
            text = f"host {sandbox.host} of sandbox {sandbox.name} has not registered"
            raise Unavailable("HostUnreachable", text, host=sandbox.host)
        return host
