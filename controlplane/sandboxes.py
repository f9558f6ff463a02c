"""What users can do with sandboxes: create, resize, stop, delete.

Every change is one compare-and-swap commit: the record as it was read, the guards of what was decided on (keys.py) and
the event that tells of it. A lost race is decided again on what is now; after ATTEMPTS of them Conflict goes out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from controlplane import codec, lifecycle, scheduler, transitions
from controlplane.admission import Admission, Guard
from controlplane.creating import Creator
from controlplane.errors import Conflict, HostsFull, NotFound, Precondition
from controlplane.explaining import Explanation, explain
from controlplane.images import Images
from controlplane.leadership import Leadership, OnlyOne
from controlplane.model import Checkpoint, DesiredState, Sandbox
from controlplane.records import Records, Stored
from controlplane.requests import Creation, ResizeWish, ServiceWish
from controlplane.store.contract import Put, Store
from controlplane.tenants import Tenants
from controlplane.view import View

ATTEMPTS = 16


class Sandboxes:
    """See the module."""

    def __init__(
        self, store: Store, view: View, records: Records, images: Images,
        tenants: Tenants, *, leadership: Leadership | None = None, admission: Admission | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._view, self._records, self._now_s = store, view, records, now_s
        self._admission = admission or Admission(view, tenants.quota)
        self._creator = Creator(
            store, view, records, images, tenants, leadership or OnlyOne(), self._admission, now_s=now_s
        )

    # Creating: see creating.py.

    async def create(self, tenant: str, asked: Creation) -> Sandbox:
        """Records a sandbox and places it. See CreateSandbox."""
        return await self._creator.create(tenant, asked)

    async def create_on(self, checkpoint: Checkpoint, asked: Creation) -> Sandbox:
        """Records a sandbox that goes on from a checkpoint, which only the host that has it can do. As create()."""
        return await self._creator.create_on(checkpoint, asked)

    async def place_pending(self, sandbox: Sandbox) -> bool:
        """Places a PENDING sandbox if the present view has room for it; whether it did."""
        return await self._creator.place_pending(sandbox)

    def explain(self, sandbox: Sandbox, *, most: int) -> Explanation:
        """Why it is where it is, or what hosts lack for it, by the present view."""
        return explain(sandbox, self._view.survey(), most=most, expected=self._view.measured.expected)

    # Changing.

    async def resize(self, tenant: str, name: str, wish: ResizeWish) -> Sandbox:
        """New target sizes. See ResizeSandbox."""

        def change(sandbox: Sandbox) -> Sandbox:
            _require_etag(sandbox, wish.etag)
            after = transitions.resized(sandbox, wish)
            self._creator.require_quota(after)
            self._require_room(sandbox, after)
            return after

        return await self._change(tenant, name, change, "ResizeAsked", _told_sizes, counted=True)

    async def set_services(self, tenant: str, name: str, wish: ServiceWish) -> Sandbox:
        """Other rules, or a tool that denies. See SetServices."""

        def change(sandbox: Sandbox) -> Sandbox:
            _require_etag(sandbox, wish.etag)
            return transitions.served_otherwise(sandbox, wish)

        return await self._change(tenant, name, change, "ServicesAsked", _told_services)

    def _require_room(self, before: Sandbox, after: Sandbox) -> None:
        """HostsFull when the host cannot guarantee the larger minimum."""
        more_mib = after.spec.resources.memory_min_mib - before.spec.resources.memory_min_mib
        view = self._view
        host = view.hosts.get(before.host)
        if more_mib <= 0 or host is None:
            return
        state = scheduler.host_state(host, True, view.on_host(before.host), ())
        if more_mib > state.unpromised_mib:
            text = f"host {before.host} cannot guarantee {more_mib} MiB more to sandbox {before.name}"
            room_mib = max(0, state.unpromised_mib)
            raise HostsFull(
                f"{text}: that much is not left of its memory; ask for a lower minimum",
                f"{text}: {room_mib} MiB are not promised",
                {"room_mib": room_mib},
                needed_mib=more_mib,
                limit="host-capacity",
            )

    async def stop(self, tenant: str, name: str, grace_s: int) -> Sandbox:
        """Asks it to end. See StopSandbox."""
        stored = await self._records.find(tenant, name)
        sandbox = stored.sandbox
        if sandbox.spec.remove_on_exit and not sandbox.host and sandbox.status.phase not in lifecycle.ENDED:
            await self._records.remove(stored, "Removed", "stopped before it ran")
            return transitions.stopped(sandbox, grace_s, self._now_s())
        return await self._change(
            tenant, name, lambda now: transitions.stopped(now, grace_s, self._now_s()), "StopAsked", _told_grace
        )

    async def _change(
        self, tenant: str, name: str, change: Callable[[Sandbox], Sandbox], reason: str, told: Callable[[Sandbox], str],
        *, counted: bool = False,
    ) -> Sandbox:  # fmt: skip
        """`counted`: the change is decided on the tenant's quota."""
        for _ in range(ATTEMPTS):
            stored = await self._records.find(tenant, name)
            async with self._admission.deciding(tenant) if counted else nullcontext(Guard()) as guard:
                after = change(stored.sandbox)
                if after == stored.sandbox:
                    return after
                told_of = self._records.event(after, reason, told(after))
                writes = [Put(stored.record.key, codec.encode(after)), told_of, *guard.writes]
                try:
                    revision = await self._store.commit(writes, [stored.expect, *guard.expect])
                except Conflict:
                    continue
                await self._admission.settled(guard, revision)
            return replace(after, revision=revision)
        raise Conflict("Busy", f"sandbox {name} changes too fast: retry")

    async def delete(self, tenant: str, name: str, *, force: bool, allow_missing: bool) -> None:
        """Removes it. See DeleteSandbox."""
        for _ in range(ATTEMPTS):
            try:
                stored = await self._records.find(tenant, name)
            except NotFound:
                if allow_missing:
                    return
                raise
            if await self._delete_once(stored, force=force):
                return
        raise Conflict("Busy", f"sandbox {name} changes too fast: retry")

    async def _delete_once(self, stored: Stored, *, force: bool) -> bool:
        sandbox = stored.sandbox
        ended = sandbox.status.phase in lifecycle.ENDED
        if not ended and not force:
            text = f"sandbox {sandbox.name} is {sandbox.status.phase.name}: stop it first, or remove it with force (-f)"
            raise Precondition("SandboxLive", text, sandbox=sandbox.name, phase=sandbox.status.phase.value)
        try:
            if not sandbox.host or (ended and sandbox.host not in self._view.alive):
                gone = f"; its host {sandbox.host} is LOST and lets go of it when it returns" if sandbox.host else ""
                await self._records.remove(stored, "Removed", f"removed{gone}")
            elif sandbox.desired is not DesiredState.REMOVED:
                after = replace(sandbox, desired=DesiredState.REMOVED)
                writes = [Put(stored.record.key, codec.encode(after)), self._records.event(after, "RemoveAsked", "")]
                await self._store.commit(writes, [stored.expect])
        except Conflict:
            return False
        return True


def _require_etag(sandbox: Sandbox, etag: str) -> None:
    if etag and etag != transitions.etag(sandbox):
        text = f"sandbox {sandbox.name} has changed since etag {etag}: read it again"
        raise Conflict("EtagMismatch", text, etag=transitions.etag(sandbox))


def _told_services(sandbox: Sandbox) -> str:
    policy = sandbox.spec.services
    answers = ", ".join(f"{service.value}: {policy.now(service).value}" for service, _ in policy.answered)
    return f"{answers}; {len(policy.allow)} rules"


def _told_sizes(sandbox: Sandbox) -> str:
    sizes = sandbox.spec.resources
    memory = f"memory {sizes.memory_mib} MiB of {sizes.memory_min_mib}:{sizes.memory_max_mib}"
    return f"{memory}, cpu {sizes.cpu_milli / 1000:g}"


def _told_grace(sandbox: Sandbox) -> str:
    return f"with a grace of {sandbox.stop_grace_s} s"
