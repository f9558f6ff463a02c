"""Images: parse, call, render. See images.proto for every method's contract."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from controlplane import keys
from controlplane.api.v1 import images_pb2, images_pb2_grpc
from controlplane.edge import hosts as edge
from controlplane.edge.sandboxes import MAX_WORDS
from controlplane.errors import Denied, Invalid, NotFound
from controlplane.gate import Caller, Context, Gate
from controlplane.images import Images
from controlplane.listing import list_page
from controlplane.model import Host, Image
from controlplane.relay import HostLinks, answers, relay
from controlplane.store.contract import Store
from controlplane.view import View

log = logging.getLogger("sandloom.controlplane.images")

FIRST_MESSAGE_S = 30.0
MAX_CHUNK_BYTES = 1 << 20
Requests = AsyncIterator[images_pb2.ImportImageRequest]


class ImagesService(images_pb2_grpc.ImagesServicer):
    """See the module."""

    def __init__(self, gate: Gate, store: Store, view: View, images: Images, links: HostLinks) -> None:
        self._gate, self._store, self._view = gate, store, view
        self._images, self._links = images, links

    async def ImportImage(
        self, request_iterator: Requests, context: Context
    ) -> AsyncIterator[images_pb2.ImportImageResponse]:
        """See images.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            start = await _start_of(request_iterator)
            name = edge.parse_image_name(start.name, "start.name")
            host = self._host_for(caller, start.host, name)
            stub = await self._links.stub(host)
            first = images_pb2.ImportImageRequest(start=start)
            first.start.tenant, first.start.host = caller.tenant, host.name
            async with aclosing(relay(stub.Import, first, _chunks(request_iterator), host.name)) as responses:
                async for response in responses:
                    yield await self._bound(response, name, caller.tenant, host.name)

    async def PullImage(
        self, request: images_pb2.PullImageRequest, context: Context
    ) -> AsyncIterator[images_pb2.ImportImageResponse]:
        """See images.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            name = edge.parse_image_name(request.name, "name")
            host = self._host_for(caller, request.host, name)
            asked = images_pb2.PullImageRequest(
                reference=edge.parse_registry_reference(request.reference), tenant=caller.tenant, host=host.name
            )
            stub = await self._links.stub(host)
            async with aclosing(answers(stub.Pull(asked), host.name)) as responses:
                async for response in responses:
                    yield await self._bound(response, name, caller.tenant, host.name)

    def _host_for(self, caller: Caller, wanted: str, name: str) -> Host:
        """Where an image goes; only an operator chooses. Exhausted when the tenant may have no more of them."""
        if wanted and not caller.is_operator:
            raise Denied("OperatorOnly", "only an operator chooses the host that an image goes to: leave it out")
        self._images.require_name(caller.tenant, name)
        return self._images.host_for_import(wanted)

    async def _bound(
        self, response: images_pb2.ImportImageResponse, name: str, tenant: str, host: str
    ) -> images_pb2.ImportImageResponse:
        """What a host answered, with the image bound to its name once it is there."""
        if response.WhichOneof("output") != "image":
            return response
        image = edge.parse_image(response.image, name=name, tenant=tenant)
        return images_pb2.ImportImageResponse(image=self._rendered(await self._images.bind(image, host)))

    async def GetImage(self, request: images_pb2.GetImageRequest, context: Context) -> images_pb2.Image:
        """See images.proto."""
        async with self._gate.admit(context) as caller:
            return self._rendered(await self._images.get(caller.tenant, edge.parse_image_reference(request.name)))

    async def ListImages(
        self, request: images_pb2.ListImagesRequest, context: Context
    ) -> images_pb2.ListImagesResponse:
        """See images.proto."""
        async with self._gate.admit(context) as caller:
            listed = await list_page(
                self._store,
                Image,
                keys.images_of(caller.tenant),
                page_size=request.page_size,
                page_token=request.page_token,
                of=f"images/{caller.tenant}",
            )
            return images_pb2.ListImagesResponse(
                images=[self._rendered(image) for image in listed.values],
                next_page_token=listed.next_token,
                resource_version=listed.revision,
            )

    async def DeleteImage(
        self, request: images_pb2.DeleteImageRequest, context: Context
    ) -> images_pb2.DeleteImageResponse:
        """See images.proto."""
        async with self._gate.admit(context) as caller:
            reference = edge.parse_image_reference(request.name)
            try:
                await self._images.unbind(caller.tenant, reference)
            except NotFound:
                if not request.allow_missing:
                    raise
            return images_pb2.DeleteImageResponse()

    def _rendered(self, image: Image) -> images_pb2.Image:
        return edge.render_image(image, self._view.holders(image.tenant, image.digest))


async def _start_of(requests: Requests) -> images_pb2.ImportImageRequest.Start:
    async with asyncio.timeout(FIRST_MESSAGE_S):
        first = await anext(aiter(requests), None)
    if first is None or first.WhichOneof("input") != "start":
        raise Invalid("start", "the first message of an import must be `start`")
    if len(first.start.cmd) > MAX_WORDS:
        raise Invalid("start.cmd", f"{len(first.start.cmd)} words, {MAX_WORDS} is the most")
    return first.start


async def _chunks(requests: Requests) -> Requests:
    async for message in requests:
        if message.WhichOneof("input") != "chunk":
            raise Invalid("chunk", "after `start` come only chunks")
        if len(message.chunk) > MAX_CHUNK_BYTES:
            raise Invalid("chunk", f"{len(message.chunk)} bytes, {MAX_CHUNK_BYTES} is the most")
        yield message
