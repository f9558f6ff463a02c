"""What this host lets other hosts read of its images: by tickets, which only the control plane can have made.

A ticket is 256 random bits, good for one image of one tenant, for one host (its certificate says which it is), for
TICKET_S. It is kept in memory: a hostd that restarts has forgotten it, and another one is made.

The other host makes its own key of each layer (its domain's secret differs), so none of ours leaves here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import grpc.aio

from controlplane.api.identity import Role, peer_identity
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc
from hostd.errors import NotAdmitted
from hostd.images import domain_of
from hostd.translation import translated
from sharedcache import images, objects
from sharedcache.domains import Domain
from sharedcache.images import ImageRecord
from sharedcache.store import Store

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

TICKET_S = 900.0
MOST_TICKETS = 4096
PIECE_BYTES = 512 << 10
READERS = 4
NO_KEY = ""


@dataclass(frozen=True)
class Ticket:
    """What one ticket is good for."""

    domain: Domain
    digest: str
    host: str
    until_s: float


class Offers:
    """The tickets that are out. `clock_s` is monotonic."""

    def __init__(self, store: Store, clock_s: Callable[[], float]) -> None:
        self._store, self._clock_s = store, clock_s
        self._tickets: dict[str, Ticket] = {}

    def offer(self, tenant: str, digest: str, host: str) -> str:
        """A new ticket for `host`. NotFound when the image is not here. Blocks."""
        domain = domain_of(tenant)
        self._store.get_image(domain, digest)
        now_s = self._clock_s()
        self._tickets = {word: ticket for word, ticket in self._tickets.items() if ticket.until_s > now_s}
        while len(self._tickets) >= MOST_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        word = secrets.token_urlsafe(32)
        self._tickets[word] = Ticket(domain, digest, host, now_s + TICKET_S)
        return word

    def image(self, word: str, host: str) -> ImageRecord:
        """The image that a ticket is for. NotAdmitted, always in the same words; NotFound when it is gone since."""
        ticket = self._tickets.get(word)
        if ticket is None or ticket.host != host or ticket.until_s <= self._clock_s():
            text = "the ticket is unknown, expired or another host's: ask the control plane again"
            raise NotAdmitted(text, reason="TicketRefused")
        return self._store.get_image(ticket.domain, ticket.digest)


class HostPeers(hosts_pb2_grpc.HostPeersServicer):
    """See the module."""

    def __init__(self, store: Store, offers: Offers) -> None:
        self._store, self._offers = store, offers
        self._readers = asyncio.Semaphore(READERS)

    async def GetOffer(self, request: hosts_pb2.GetOfferRequest, context: Context) -> hosts_pb2.OfferedImage:
        """See hosts.proto."""
        async with translated(context):
            return await asyncio.to_thread(self._described, self._offers.image(request.ticket, _caller(context)))

    def _described(self, image: ImageRecord) -> hosts_pb2.OfferedImage:
        record = images.encode(replace(image, layers=tuple(replace(layer, key=NO_KEY) for layer in image.layers)))
        offered = hosts_pb2.OfferedImage(record=json.dumps(record).encode())
        for digest in dict.fromkeys(layer.digest for layer in image.layers):
            item = self._store.get(image.domain, digest)
            facts = json.dumps(objects.encode(replace(item, key=NO_KEY, path=Path()))).encode()
            offered.layers.add(digest=digest, size_bytes=item.size_bytes, facts=facts)
        return offered

    async def ReadLayer(
        self, request: hosts_pb2.ReadLayerRequest, context: Context
    ) -> AsyncIterator[hosts_pb2.LayerPiece]:
        """See hosts.proto."""
        async with translated(context):
            image = self._offers.image(request.ticket, _caller(context))
            if request.digest not in {layer.digest for layer in image.layers}:
                raise NotAdmitted("the ticket is for another image's layers", reason="TicketRefused")
            item = await asyncio.to_thread(self._store.get, image.domain, request.digest)
            async with self._readers:
                with item.path.open("rb") as file:
                    file.seek(request.offset)
                    while piece := await asyncio.to_thread(_read, file):
                        yield hosts_pb2.LayerPiece(data=piece)


def _read(file: BinaryIO) -> bytes:
    return file.read(PIECE_BYTES)


def _caller(context: Context) -> str:
    """The host that calls, whose role the server has checked (hostd/authority.py)."""
    identity = peer_identity(context.auth_context())
    assert identity.role is Role.HOST, "authority.py lets nobody else in"
    return identity.name
