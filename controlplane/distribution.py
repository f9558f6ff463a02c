"""How an image gets to a host that was chosen for a sandbox of it: from a host that has it, for that tenant only.

Pulled: the host that was assigned something it lacks the image of asks who has it; the answer is a ticket for each of
a few hosts, good for that image, that tenant's and that asking host. The bytes go from host to host. A host gets
nothing that is not needed for what is assigned to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from controlplane import codec, events, keys, lifecycle
from controlplane.api.v1 import hosts_pb2
from controlplane.errors import NotFound, OperationError
from controlplane.model import Event, Host, Residency
from controlplane.relay import HostLinks, answer
from controlplane.store.contract import Put, Store
from controlplane.view import View

MOST_SOURCES = 3
OFFER_DEADLINE_S = 5.0
VIEW_LAG_S = 5.0


@dataclass(frozen=True)
class Source:
    """A host that lets another one read an image."""

    host: str
    address: str
    ticket: str


class Distribution:
    """See the module."""

    def __init__(self, store: Store, view: View, links: HostLinks, *, now_s: Callable[[], float] = time.time) -> None:
        self._store, self._view, self._links, self._now_s = store, view, links, now_s

    async def locate(self, host: str, tenant: str, digest: str) -> list[Source]:
        """See LocateImage. NotFound."""
        self._require_needed(host, tenant, digest)
        view = self._view
        holders = [name for name in view.holders(tenant, digest) if name != host and name in view.alive]
        asked = [view.hosts[name] for name in holders if name in view.hosts]
        asked.sort(key=lambda holder: (holder.sandboxes, holder.name))  # the least busy first
        offers = await asyncio.gather(*(self._offer(one, host, tenant, digest) for one in asked[:MOST_SOURCES]))
        sources = [offer for offer in offers if offer is not None]
        if not sources:
            raise _missing(digest)
        return sources

    def _require_needed(self, host: str, tenant: str, digest: str) -> None:
        there = self._view.on_host(host)
        live = (s for s in there if s.tenant == tenant and s.status.phase not in lifecycle.ENDED)
        if not any(s.spec.image_digest == digest for s in live):
            raise _missing(digest)

    async def _offer(self, holder: Host, to: str, tenant: str, digest: str) -> Source | None:
        """None when it does not answer, or has lost it."""
        request = hosts_pb2.OfferImageRequest(tenant=tenant, digest=digest, host=to)
        try:
            async with asyncio.timeout(OFFER_DEADLINE_S):
                stub = await self._links.stub(holder)
                offered = await answer(stub.OfferImage, request, holder.name, OFFER_DEADLINE_S)
        except (OperationError, TimeoutError):
            return None
        return Source(holder.name, holder.runtime_address, offered.ticket)

    async def fetched(self, host: str, tenant: str, digest: str) -> None:
        """See ReportImage. NotFound."""
        self._require_needed(host, tenant, digest)
        key = keys.residency(tenant, digest, host)
        if key in self._view.residency:
            return
        held = Residency(tenant, digest, host, self._now_s())
        told = events.entry(Event(self._now_s(), "image", digest[:19], "Fetched", digest, host, tenant))
        revision = await self._store.commit([Put(key, codec.encode(held)), told])
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)


def _missing(digest: str) -> NotFound:
    return NotFound("ImageNotFound", f"no host gives image {digest}: import it again", image=digest)
