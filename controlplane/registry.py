"""Which hosts there are, and which of them live. A host is known by its report and alive by its lease.

The report is a durable record; the lease is kept by every report and means liveness only. When it runs out the store
deletes the host's `alive` key, which is how everybody learns that the host is LOST. Ownership never follows from it:
that is the sandbox records' epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from controlplane import codec, events, keys
from controlplane.errors import Conflict, NotFound
from controlplane.images import Images
from controlplane.model import Event, Host
from controlplane.store.contract import Expect, Put, Store
from controlplane.view import View


class Registry:
    """See the module."""

    def __init__(
        self, store: Store, view: View, images: Images, lease_s: int, *, now_s: Callable[[], float] = time.time
    ) -> None:
        self._store, self._view, self._images = store, view, images
        self._lease_s, self._now_s = lease_s, now_s

    async def report(self, host: Host) -> int:
        """Takes a host's report and keeps it READY; the lease's length in seconds. Idempotent."""
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

    def is_ready(self, name: str) -> bool:
        """Whether its lease holds."""
        return name in self._view.alive

    async def get(self, name: str) -> Host:
        """A host's last report. NotFound."""
        record = await self._store.get(keys.host(name))
        if record is None:
            raise NotFound("HostNotFound", f"there is no host {name}", host=name)
        return codec.decode(Host, record.value, record.key, revision=record.mod_revision)
