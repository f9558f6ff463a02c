"""Images from host to host: verified on arrival, for whom the ticket is, and going on where a stream broke."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from controlplane.api.channel import TlsFiles, connect, server_credentials, server_options
from controlplane.api.identity import Role, host_server_name
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc
from hostd import fetching, peers
from hostd.authority import OnlyControlPlane
from hostd.errors import HostdError, ImageMissing
from hostd.fetching import Fetcher, WrongBytes, parse_layers, parse_record
from hostd.images import domain_of
from hostd.peers import HostPeers, Offers
from sharedcache.errors import NotFound
from sharedcache.images import ImageConfig, ImageRecord, StoredLayer, image_digest
from sharedcache.layer import LayerMeta
from sharedcache.objects import ObjectKind
from sharedcache.store import Store
from tests.hostd.fakecontrolplane import Certificates, FakeControlPlane, certificates
from tests.hostd.hostkit import open_store

CONFIG = ImageConfig(cmd=("sleep",), env=(("Z", "1"), ("A", "2")))


def put_layered(store: Store, *layers: bytes, tenant: str = "acme") -> str:
    """An image of these blobs; its digest."""
    stored = []
    for blob in layers:
        meta = LayerMeta("sha256:" + "1" * 64, b"u" * 16, len(blob), 1, 1, 0, 0, 0, 1)
        item = store.publish_bytes(blob, domain=domain_of(tenant), kind=ObjectKind.LAYER, meta=meta)
        stored.append(StoredLayer.of(item))
    digest = image_digest(tuple(layer.digest for layer in stored), CONFIG)
    store.put_image(ImageRecord(digest, domain_of(tenant), tuple(stored), CONFIG, "rootfs", 0.0))
    return digest


class Breaking(HostPeers):
    """Cuts each stream after so many pieces; may send other bytes than it has."""

    def __init__(self, store: Store, offers: Offers) -> None:
        super().__init__(store, offers)
        self.pieces: int | None = None
        self.garble = False
        self.offsets: list[int] = []

    async def ReadLayer(self, request: hosts_pb2.ReadLayerRequest, context: Any) -> AsyncIterator[hosts_pb2.LayerPiece]:
        self.offsets.append(request.offset)
        sent = 0
        async for piece in super().ReadLayer(request, context):
            if self.pieces is not None and sent == self.pieces:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            sent += 1
            yield hosts_pb2.LayerPiece(data=bytes(len(piece.data))) if self.garble else piece


@dataclass
class Holder:
    """A host that has images."""

    name: str
    store: Store
    offers: Offers
    service: Breaking
    address: str

    def source(self, digest: str, *, to: str = "host-1", tenant: str = "acme") -> hosts_pb2.ImageSource:
        ticket = self.offers.offer(tenant, digest, to)
        return hosts_pb2.ImageSource(host=self.name, address=self.address, ticket=ticket)


@dataclass
class World:
    """A host that lacks everything, its control plane, and hosts that have something."""

    plane: FakeControlPlane
    store: Store
    fetcher: Fetcher
    certs: Certificates
    stack: AsyncExitStack
    folder: Path
    told: list[tuple[str, str]] = field(default_factory=list)

    async def holder(self, name: str) -> Holder:
        store = self.stack.enter_context(open_store(self.folder / name))
        offers = Offers(store, time.monotonic)
        service = Breaking(store, offers)
        server = grpc.aio.server(interceptors=[OnlyControlPlane()], options=server_options())
        hosts_pb2_grpc.add_HostPeersServicer_to_server(service, server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(self.certs.of(Role.HOST, name)))
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        return Holder(name, store, offers, service, f"127.0.0.1:{port}")

    async def fetch(self, digest: str, tenant: str = "acme") -> None:
        await self.fetcher.fetch(tenant, digest, lambda reason, message: self.told.append((reason, message)))


@asynccontextmanager
async def worlds(folder: Path) -> AsyncIterator[World]:
    certs = certificates(folder)
    plane = FakeControlPlane(certs.of(Role.CONTROLPLANE, "cp-1"))
    await plane.up()
    tls: TlsFiles = certs.of(Role.HOST, "host-1")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(plane.down)
        (folder / "own").mkdir()
        store = stack.enter_context(open_store(folder / "own"))
        channel = await stack.enter_async_context(connect(plane.address, tls))
        fetcher = Fetcher(hosts_pb2_grpc.HostSyncStub(channel), tls, "host-1", store)
        yield World(plane, store, fetcher, certs, stack, folder)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(fetching, "RETRY_S", 0.01)
    for name in ("h2", "h3"):
        (tmp_path / name).mkdir()
    async with worlds(tmp_path) as world:
        yield world


async def test_an_image_comes_whole_under_this_hosts_own_keys(world: World) -> None:
    holder = await world.holder("h2")
    blobs = (os.urandom(3 << 20), os.urandom(4096) + bytes(2 << 20), os.urandom(3 << 20))
    digest = put_layered(holder.store, *blobs, blobs[0])
    world.plane.sources = [holder.source(digest)]
    await asyncio.gather(world.fetch(digest), world.fetch(digest))
    image = world.store.get_image(domain_of("acme"), digest)
    theirs = holder.store.get_image(domain_of("acme"), digest)
    assert image.config == theirs.config and [layer.digest for layer in image.layers] == [
        layer.digest for layer in theirs.layers
    ]
    assert not image.keys & theirs.keys, "two hosts' secrets give two keys"
    for layer, blob in zip(image.layers, [*blobs, blobs[0]], strict=True):
        assert world.store.get(domain_of("acme"), layer.digest).path.read_bytes() == blob
    assert holder.service.offsets == [0, 0, 0], "each distinct layer once, for both who waited"
    assert world.plane.fetched == [("acme", digest)]
    assert [reason for reason, _ in world.told] == ["ImageFetching", "ImageFetched"]
    await world.fetch(digest)
    assert len(world.plane.located) == 1, "what is here is not asked for"


async def test_a_stream_that_breaks_goes_on_where_it_stood(world: World) -> None:
    holder = await world.holder("h2")
    digest = put_layered(holder.store, os.urandom(4 * peers.PIECE_BYTES))
    holder.service.pieces = 1
    world.plane.sources = [holder.source(digest)]
    await world.fetch(digest)
    assert holder.service.offsets == [n * peers.PIECE_BYTES for n in range(4)]


async def test_wrong_bytes_are_never_published_and_another_host_is_asked(world: World) -> None:
    bad, good = await world.holder("h2"), await world.holder("h3")
    blob = os.urandom(1 << 20)
    digest = put_layered(bad.store, blob)
    assert put_layered(good.store, blob) == digest
    bad.service.garble = True
    world.plane.sources = [bad.source(digest)]
    with pytest.raises(HostdError, match="its bytes give sha256"):
        await world.fetch(digest)
    assert world.store.objects() == []
    world.plane.sources = [bad.source(digest), good.source(digest)]
    await world.fetch(digest)
    assert world.store.get_image(domain_of("acme"), digest).digest == digest


async def test_what_nobody_has_is_missing(world: World) -> None:
    with pytest.raises(ImageMissing):
        await world.fetch("sha256:" + "0" * 64)


async def test_a_tenants_image_is_not_another_tenants(world: World) -> None:
    holder = await world.holder("h2")
    digest = put_layered(holder.store, os.urandom(4096))
    world.plane.sources = [holder.source(digest)]
    await world.fetch(digest)
    with pytest.raises(NotFound):
        world.store.get_image(domain_of("other"), digest)
    with pytest.raises(NotFound):
        holder.source(digest, tenant="other")


async def test_a_ticket_is_one_hosts_for_one_image_for_a_while(world: World) -> None:
    holder = await world.holder("h2")
    digest, other = put_layered(holder.store, b"one"), put_layered(holder.store, b"two")
    source = holder.source(digest)
    foreign = holder.store.get_image(domain_of("acme"), other).layers[0].digest

    async def refusal(role: Role, name: str, *, ticket: str = source.ticket, layer: str = "") -> str:
        server_name = host_server_name("h2")
        async with connect(holder.address, world.certs.of(role, name), server_name=server_name) as channel:
            stub: Any = hosts_pb2_grpc.HostPeersStub(channel)
            try:
                if layer:
                    request = hosts_pb2.ReadLayerRequest(ticket=ticket, digest=layer)
                    async for _ in stub.ReadLayer(request, timeout=60):
                        break
                else:
                    await stub.GetOffer(hosts_pb2.GetOfferRequest(ticket=ticket), timeout=60)
            except grpc.aio.AioRpcError as error:
                assert parse_error(error).condition is Condition.DENIED
                return parse_error(error).reason
            return ""

    assert await refusal(Role.HOST, "host-1") == ""
    assert await refusal(Role.HOST, "h3") == "TicketRefused"
    assert await refusal(Role.HOST, "host-1", ticket="x") == "TicketRefused"
    assert await refusal(Role.HOST, "host-1", layer=foreign) == "TicketRefused"
    for role, name in ((Role.TENANT, "acme"), (Role.OPERATOR, "op"), (Role.CONTROLPLANE, "cp-1")):
        assert await refusal(role, name) == "NotHost"
    holder.offers._clock_s = lambda: time.monotonic() + peers.TICKET_S
    assert await refusal(Role.HOST, "host-1") == "TicketRefused"


async def test_a_record_that_does_not_prove_itself_is_not_believed(world: World) -> None:
    holder = await world.holder("h2")
    digest = put_layered(holder.store, b"one")
    offered = holder.service._described(holder.store.get_image(domain_of("acme"), digest))
    record = parse_record(offered.record, digest)
    assert parse_layers(offered.layers, record)
    assert holder.store.get_image(domain_of("acme"), digest).layers[0].key.encode() not in offered.SerializeToString()
    changed = json.loads(offered.record)
    changed["config"]["cmd"] = ["other"]
    for data in (b"{", json.dumps(changed).encode(), b"[]"):
        with pytest.raises(WrongBytes):
            parse_record(data, digest)
    with pytest.raises(WrongBytes):
        parse_record(offered.record, "sha256:" + "0" * 64)
    facts = json.loads(offered.layers[0].facts)
    facts["meta"]["blob_bytes"] += 1
    for bad in ([], [hosts_pb2.OfferedLayer(digest=offered.layers[0].digest, facts=json.dumps(facts).encode())]):
        with pytest.raises(WrongBytes):
            parse_layers(bad, record)
