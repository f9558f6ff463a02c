"""Gets images that this host lacks from hosts that have them, layer by layer, verified on arrival.

    who has it? (HostSync.LocateImage) → GetOffer → ReadLayer into the store's staging, hashed on the way → publish

A layer that breaks off goes on where it stood, from the same or the next source: all have the same bytes, or a wrong
digest says otherwise and it begins again elsewhere. Nothing is published before its digest is right, and the image
last, so that an end anywhere leaves nothing that the store's collection would not remove. At most FETCHES at a time;
one at a time of an image, the others wait for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from controlplane.api.channel import TlsFiles, connect
from controlplane.api.errors import ControlPlaneError
from controlplane.api.identity import host_server_name
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc
from hostd.errors import HostdError, ImageMissing
from hostd.images import domain_of
from sharedcache import images, objects
from sharedcache.domains import Domain
from sharedcache.errors import CacheError, NotFound
from sharedcache.images import ImageRecord, StoredLayer
from sharedcache.objects import ObjectKind, StoredObject
from sharedcache.staging import Staging
from sharedcache.store import Store

log = logging.getLogger("sandloom.hostd.fetching")

FETCHES = 2
CALL_S, PIECE_S, WHOLE_S = 20.0, 30.0, 1800.0
TRIES, RETRY_S = 6, 0.5
MOST_LAYERS, MOST_BYTES = 512, 256 << 30
TELL_S = 10.0

Tell = Callable[[str, str], None]
if TYPE_CHECKING:
    Peer = hosts_pb2_grpc.HostPeersAsyncStub  # a name that only the stub file has


class Fetcher:
    """See the module. `sync` is the control plane's end."""

    def __init__(self, sync: hosts_pb2_grpc.HostSyncAsyncStub, tls: TlsFiles, host: str, store: Store) -> None:
        self._sync, self._tls, self._host, self._store = sync, tls, host, store
        self._slots = asyncio.Semaphore(FETCHES)
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    async def fetch(self, tenant: str, digest: str, tell: Tell) -> None:
        """The image is in this host's store, for that tenant, when it returns. ImageMissing, HostdError, CacheError."""
        lock = self._locks.setdefault((tenant, digest), asyncio.Lock())
        async with lock:
            if await asyncio.to_thread(self._has, tenant, digest):
                return
            async with self._slots:
                try:
                    async with asyncio.timeout(WHOLE_S):
                        await self._fetch(tenant, digest, tell)
                except TimeoutError as error:
                    raise _failed(digest, f"it took longer than {WHOLE_S:g} s") from error

    def _has(self, tenant: str, digest: str) -> bool:
        try:
            self._store.get_image(domain_of(tenant), digest)
        except NotFound:
            return False
        return True

    async def _fetch(self, tenant: str, digest: str, tell: Tell) -> None:
        sources = await self._locate(tenant, digest)
        tell("ImageFetching", f"{digest} from {', '.join(source.host for source in sources)}")
        transfer = _Transfer(self._store, domain_of(tenant), digest, tell)
        why: list[str] = []
        for turn in range(TRIES):
            source = sources[turn % len(sources)]
            try:
                name = host_server_name(source.host)
                async with connect(source.address, self._tls, server_name=name) as channel:
                    image = await transfer.attempt(hosts_pb2_grpc.HostPeersStub(channel), source.ticket)
                break
            except grpc.aio.AioRpcError as error:
                why.append(f"{source.host}: {parse_error(error).message[:200]}")
            except (ControlPlaneError, TimeoutError, WrongBytes) as error:
                why.append(f"{source.host}: {error or 'it fell silent'}")
            log.warning("image %s: %s", digest, why[-1])
            await asyncio.sleep(RETRY_S)
        else:
            raise _failed(digest, "; ".join(dict.fromkeys(why)))
        tell("ImageFetched", f"{digest}, {image.size_bytes >> 20} MiB")
        await self._report(tenant, digest)

    async def _locate(self, tenant: str, digest: str) -> Sequence[hosts_pb2.ImageSource]:
        request = hosts_pb2.LocateImageRequest(host=self._host, tenant=tenant, digest=digest)
        try:
            found = await self._sync.LocateImage(request, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            failure = parse_error(error)
            if failure.condition is Condition.NOT_FOUND:
                raise ImageMissing(failure.message) from error
            raise _failed(digest, failure.message) from error
        return list(found.sources)

    async def _report(self, tenant: str, digest: str) -> None:
        """So that others may have it from here. Without the answer the image is used here all the same."""
        request = hosts_pb2.ReportImageRequest(host=self._host, tenant=tenant, digest=digest)
        try:
            await self._sync.ReportImage(request, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            log.warning("that image %s is here is not taken: %s", digest, parse_error(error).message)


class WrongBytes(HostdError):
    """A peer sent what it did not promise; another one may do better."""

    reason = "WrongBytes"


class _Transfer:
    """One image on its way: what came in one attempt is there in the next."""

    def __init__(self, store: Store, domain: Domain, digest: str, tell: Tell) -> None:
        self._store, self._domain, self._digest, self._tell = store, domain, digest, tell
        self._done_bytes, self._total_bytes = 0, 0
        self._loop = asyncio.get_running_loop()
        self._told_s = self._loop.time()

    async def attempt(self, peer: Peer, ticket: str) -> ImageRecord:
        """From one source, to the end. What is in the store already is not asked for again."""
        offered = await peer.GetOffer(hosts_pb2.GetOfferRequest(ticket=ticket), timeout=CALL_S)
        record = parse_record(offered.record, self._digest)
        facts = parse_layers(offered.layers, record)
        self._total_bytes = sum(item.size_bytes for item in facts.values())
        self._done_bytes = 0
        with self._store.hold() as hold:
            stored: dict[str, StoredLayer] = {}
            for digest, item in facts.items():
                stored[digest] = StoredLayer.of(await self._layer(peer, ticket, item, hold))
            made = ImageRecord(
                record.digest, self._domain, tuple(stored[layer.digest] for layer in record.layers), record.config,
                record.format, self._store.now_s(),
            )  # fmt: skip
            return await asyncio.to_thread(self._store.put_image, made)

    async def _layer(self, peer: Peer, ticket: str, item: StoredObject, hold: str) -> StoredObject:
        try:
            known = await asyncio.to_thread(self._store.get, self._domain, item.digest, hold=hold)
        except CacheError:  # not here, or not sound
            with self._store.stage(item.size_bytes) as staging:
                await _receive(peer, ticket, item, staging, self._add)
                return await asyncio.to_thread(
                    self._store.publish, staging, domain=self._domain, kind=ObjectKind.LAYER, meta=item.layer, hold=hold
                )
        self._add(item.size_bytes)
        return known

    def _add(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        if self._loop.time() - self._told_s >= TELL_S:
            self._told_s = self._loop.time()
            self._tell("ImageFetching", f"{self._done_bytes >> 20} of {self._total_bytes >> 20} MiB of {self._digest}")


async def _receive(peer: Peer, ticket: str, item: StoredObject, staging: Staging, add: Callable[[int], None]) -> None:
    """A layer into `staging`, going on where the stream broke. WrongBytes when it is not what its digest says."""
    sha256, offset = hashlib.sha256(), 0

    def keep(data: bytes) -> None:
        sha256.update(data)
        if data.count(0) == len(data):
            staging.file.seek(len(data), 1)  # a hole, as the layer had it where it came from
        else:
            staging.file.write(data)

    for turn in range(TRIES):
        request = hosts_pb2.ReadLayerRequest(ticket=ticket, digest=item.digest, offset=offset)
        call: Any = peer.ReadLayer(request)
        try:
            pieces = call.__aiter__()
            while True:
                async with asyncio.timeout(PIECE_S):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                offset += len(piece.data)
                if offset > item.size_bytes:
                    raise WrongBytes(f"layer {item.digest} is longer than the {item.size_bytes} bytes promised")
                await asyncio.to_thread(keep, piece.data)
                add(len(piece.data))
            break
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            refused = isinstance(error, grpc.aio.AioRpcError) and parse_error(error).condition is Condition.DENIED
            if refused or turn == TRIES - 1:
                raise
            await asyncio.sleep(RETRY_S)
        finally:
            call.cancel()
    await asyncio.to_thread(staging.file.truncate, offset)
    if f"sha256:{sha256.hexdigest()}" != item.digest:
        raise WrongBytes(f"layer {item.digest}: its bytes give sha256:{sha256.hexdigest()}")


def parse_record(data: bytes, digest: str) -> ImageRecord:
    """The image's record from a peer, of which nothing is believed that the digest does not prove. WrongBytes."""
    try:
        record = images.decode(json.loads(data))  # its digest is that of layers and config
    except (ValueError, TypeError, KeyError) as error:
        raise WrongBytes(f"image {digest}: its record cannot be read ({error})") from error
    if record.digest != digest or not 0 < len(record.layers) <= MOST_LAYERS:
        raise WrongBytes(f"image {digest}: the record is that of {record.digest}, of {len(record.layers)} layers")
    return record


def parse_layers(offered: Sequence[hosts_pb2.OfferedLayer], record: ImageRecord) -> Mapping[str, StoredObject]:
    """The facts of each layer of the record, by digest. WrongBytes when they are not those."""
    wanted = {layer.digest: layer for layer in record.layers}
    found: dict[str, StoredObject] = {}
    for one in offered:
        try:
            item = objects.decode(json.loads(one.facts), Path())
            layer, meta = wanted[one.digest], item.layer
        except (ValueError, TypeError, KeyError) as error:
            raise WrongBytes(f"layer {one.digest}: its facts cannot be read ({error})") from error
        same = (layer.source_digest, layer.volume_uuid, layer.size_bytes) == (
            meta.source_digest, meta.volume_uuid, meta.blob_bytes,
        )  # fmt: skip
        if item.digest != one.digest or not same or item.size_bytes != meta.blob_bytes:
            raise WrongBytes(f"layer {one.digest}: its facts are not those of the image's record")
        found[one.digest] = replace(item, size_bytes=meta.blob_bytes)
    total_bytes = sum(item.size_bytes for item in found.values())
    if set(found) != set(wanted) or total_bytes > MOST_BYTES:
        raise WrongBytes(f"image {record.digest}: {len(found)} of {len(wanted)} layers, {total_bytes} bytes")
    return found


def _failed(digest: str, why: str) -> HostdError:
    return HostdError(f"image {digest} could not be fetched: {why}", reason="ImageFetchFailed")
