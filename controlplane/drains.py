"""Empties hosts that are being drained: moves what can be moved, stops what cannot when that is wanted.

Level-triggered: each round looks at what is left and does the next bit; which bit is membership.plan_drain's decision.
A sandbox leaves a host only when another one could take it now, and few at a time, so that a drain never leaves a crowd
without a host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from controlplane import codec, membership, placing, scheduler, transitions
from controlplane.errors import Conflict
from controlplane.membership import DrainPlan, Standing
from controlplane.model import DesiredState, Sandbox
from controlplane.records import Records
from controlplane.registry import Registry
from controlplane.store.contract import Put, Store
from controlplane.view import View

log = logging.getLogger("sandloom.controlplane.drains")

MOVING_AT_ONCE = 8


class Drains:
    """See the module."""

    def __init__(self, store: Store, view: View, records: Records, registry: Registry) -> None:
        self._store, self._view, self._records, self._registry = store, view, records, registry

    def plan(self, host: str) -> DrainPlan:
        """What is to be done on a host now, by the present view."""
        view = self._view
        others = [state for state in view.survey() if state.name != host]

        def has_room(sandbox: Sandbox) -> bool:
            return scheduler.place(placing.demand_on(view, sandbox), others).placement is not None

        return membership.plan_drain(view.on_host(host), len(view.leaving(host)), MOVING_AT_ONCE, has_room)

    async def step(self) -> None:
        """One round over every host that is being drained."""
        for name, member in sorted(self._view.members.items()):
            if member.standing is not Standing.DRAINING:
                continue
            plan = self.plan(name)
            for sandbox in plan.move:
                await self._change(sandbox, self._moved, "Moved", f"host {name} is being drained")
            if member.force:
                for blocker in plan.blockers:
                    text = f"host {name} is being drained by force, and {blocker.reason}"
                    await self._change(blocker.sandbox, _stopped, "StopAsked", text)
            if plan.empty and self._is_at_rest(name):
                await self._registry.drained(member)

    def _is_at_rest(self, name: str) -> bool:
        """Whether the host itself says, too, that it has promised nothing more (to members of pools, to what still
        ends there); one that is LOST says nothing more."""
        host = self._view.hosts.get(name)
        return host is None or name not in self._view.alive or not host.capacity.memory_reserved_mib

    def _moved(self, sandbox: Sandbox) -> Sandbox:
        return transitions.moved(sandbox, max(self._view.revision, sandbox.epoch + 1))

    async def _change(self, sandbox: Sandbox, change: Callable[[Sandbox], Sandbox], reason: str, message: str) -> None:
        """Changes a sandbox that is as the view has it; another round sees what became of it otherwise."""
        stored = await self._records.find_uid(sandbox.uid)
        if stored is None or stored.sandbox != sandbox:
            return
        writes = [Put(stored.record.key, codec.encode(change(sandbox))), self._records.event(sandbox, reason, message)]
        try:
            revision = await self._store.commit(writes, [stored.expect])
        except Conflict:
            return
        await self._view.reached(revision)


def _stopped(sandbox: Sandbox) -> Sandbox:
    return replace(sandbox, desired=DesiredState.STOPPED)
