"""Which hosts there are, which of them live, and what operators decided of them.

The report is a durable record; the lease is kept by every report and means liveness only. When it runs out the store
deletes the host's `alive` key, which is how everybody learns that the host is LOST. Ownership never follows from it:
that is the sandbox records' epoch. What operators decided (membership.py) is a record of its own, which no report
touches, and outlives the host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from controlplane import codec, events, keys, lifecycle, membership
from controlplane.errors import Conflict, NotFound, Precondition
from controlplane.images import Images
from controlplane.membership import Member, Standing
from controlplane.model import Event, Host
from controlplane.store.contract import Delete, Expect, Put, Store, Write
from controlplane.view import View

ATTEMPTS = 16
VIEW_LAG_S = 5.0


class Registry:
    """See the module."""

    def __init__(
        self, store: Store, view: View, images: Images, lease_s: int, *, now_s: Callable[[], float] = time.time
    ) -> None:
        self._store, self._view, self._images = store, view, images
        self._lease_s, self._now_s = lease_s, now_s

    async def report(self, host: Host) -> int:
        """Takes a host's report and keeps it alive; the lease's length in seconds. Idempotent."""
        await self._keep_alive(host)
        revision = await self._store.commit([Put(keys.host(host.name), codec.encode(host))])
        await self._images.reported(host)
        await self._view.reached(revision)
        return self._lease_s

    async def _keep_alive(self, host: Host) -> None:
        alive = await self._store.get(keys.alive(host.name))
        if alive is not None:
            try:
                await self._store.keep_lease(alive.lease)
                return
            except NotFound:  # it ran out just now: begin anew
                alive = await self._store.get(keys.alive(host.name))
        lease = await self._store.grant_lease(self._lease_s)
        text = f"registered, serving at {host.runtime_address}"
        told = Event(self._now_s(), "host", host.name, "HostReady", text, host.name)
        writes = [Put(keys.alive(host.name), b"", lease), events.entry(told)]
        expect = [Expect(keys.alive(host.name), alive.mod_revision if alive else 0)]
        try:
            await self._store.commit(writes, expect)
        except Conflict:  # another report of the same host was quicker
            await self._store.revoke_lease(lease)

    def is_alive(self, name: str) -> bool:
        """Whether its lease holds."""
        return name in self._view.alive

    def admits(self, name: str, serial: str) -> bool:
        """Whether a certificate with this serial may speak for the host."""
        return membership.admits(self._view.members.get(name), serial)

    async def get(self, name: str) -> Host:
        """A host's last report. NotFound."""
        record = await self._store.get(keys.host(name))
        if record is None:
            raise NotFound("HostNotFound", f"there is no host {name}", host=name)
        return codec.decode(Host, record.value, record.key, revision=record.mod_revision)

    # What operators decide.

    async def change(self, name: str, to: Standing, *, force: bool = False) -> Host:
        """Moves a host to another standing. See CordonHost, UncordonHost, DrainHost."""
        for _ in range(ATTEMPTS):
            host = await self.get(name)
            now = await self.member(name)
            after = membership.moved(now, to, self._now_s(), force=force)
            if after == now:
                return host
            try:
                await self._commit(now, after, [], "forced" if force else "")
            except Conflict:
                continue
            return host
        raise Conflict("Busy", f"host {name} changes too fast: retry")

    async def member(self, name: str) -> Member:
        """What is recorded of a host, as of now."""
        record = await self._store.get(keys.member(name))
        if record is None:
            return Member(name)
        return codec.decode(Member, record.value, record.key, revision=record.mod_revision)

    async def remove(self, name: str, *, force: bool, allow_missing: bool) -> None:
        """Forgets a host, its tombstone apart. See RemoveHost."""
        for _ in range(ATTEMPTS):
            try:
                await self.get(name)
            except NotFound:
                if allow_missing:
                    return
                raise
            now = await self.member(name)
            if not force:
                self._require_empty(name)
            after = membership.moved(now, Standing.REMOVED, self._now_s())
            try:
                await self._commit(now, after, await self._traces(name), "its certificates are refused from now on")
            except Conflict:
                continue
            return
        raise Conflict("Busy", f"host {name} changes too fast: retry")

    def _require_empty(self, name: str) -> None:
        there = [*self._view.on_host(name), *self._view.leaving(name)]
        live = sorted({s.name for s in there if s.status.phase not in lifecycle.ENDED})
        if live:
            shown = ", ".join(live[:8]) + (f" and {len(live) - 8} more" if len(live) > 8 else "")
            text = (
                f"host {name} holds {shown}: drain it first (`sandloom hosts drain {name}`), or remove it with --force"
            )
            raise Precondition("HostHolds", text, host=name, sandboxes=",".join(live)[:256])
        only_here = sorted({
            image.name for image in self._view.images.values()
            if self._view.holders(image.tenant, image.digest) == [name]
        })  # fmt: skip
        if only_here:
            text = (
                f"images {', '.join(only_here[:8])} are on host {name} only: start a sandbox of each elsewhere, which"
                " fetches it, or remove the host with --force and import them again"
            )
            raise Precondition("HostHolds", text, host=name, images=",".join(only_here)[:256])

    async def _traces(self, name: str) -> list[Write]:
        """What else there is of a host: its report, its lease's key, the images it holds."""
        found: list[Write] = [Delete(keys.host(name)), Delete(keys.alive(name))]
        held = [key for key, residency in self._view.residency.items() if residency.host == name]
        return [*found, *(Delete(key) for key in held)]

    async def _commit(self, now: Member, after: Member, more: list[Write], text: str) -> None:
        name, key = after.name, keys.member(after.name)
        reason = f"Host{after.standing.value.title()}"
        told = events.entry(Event(self._now_s(), "host", name, reason, text, name))
        revision = await self._store.commit([Put(key, codec.encode(after)), told, *more], [Expect(key, now.revision)])
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)  # so that nothing is placed there any more

    async def drained(self, member: Member) -> None:
        """Nothing lives on a host that was being drained. Conflict when somebody decided otherwise meanwhile."""
        await self._commit(member, membership.moved(member, Standing.DRAINED, self._now_s()), [], "nothing lives there")

    async def joined(self, name: str, serial: str, more: list[Write], expect: list[Expect]) -> None:
        """A host may speak with a new certificate, and with no other. Conflict."""
        now = await self.member(name)
        base = now if now.standing is not Standing.REMOVED else membership.moved(now, Standing.OPEN, self._now_s())
        after = replace(base, serials=(serial,))
        key = keys.member(name)
        told = events.entry(Event(self._now_s(), "host", name, "HostJoined", f"certificate {serial}", name))
        writes = [Put(key, codec.encode(after)), told, *more]
        revision = await self._store.commit(writes, [Expect(key, now.revision), *expect])
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)
