"""HostRuntime: streams into this host's sandboxes, uploads into its store, its part of the ledger.

The edge: protobuf in, hostd's values inside, protobuf out; an error becomes a gRPC status with its ErrorInfo here and
nowhere else (hostd/failures.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
import psutil

from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, images_pb2, sandboxes_pb2
from hostd import edge, ledger, pulls, streams, uploads
from hostd.drivers.contract import Region
from hostd.errors import NotRunning
from hostd.images import domain_of
from hostd.peers import Offers
from hostd.sandboxes import Sandboxes
from hostd.translation import translated

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

T = TypeVar("T")

MEASURE_ATTEMPTS = 3


class Runtime(hosts_pb2_grpc.HostRuntimeServicer):
    """See the module. `changed` is called when what the host reports of itself has changed."""

    def __init__(self, sandboxes: Sandboxes, host: str, changed: Callable[[], None], offers: Offers) -> None:
        self._sandboxes, self._host, self._changed, self._offers = sandboxes, host, changed, offers

    async def Attach(self, request_iterator: streams.Inputs, context: Context) -> streams.Outputs:
        """See hosts.proto."""
        async with translated(context):
            start = await streams.start_of(request_iterator)
            async for output in _closing(streams.attach(self._sandboxes.find(start.name), start, request_iterator)):
                yield output

    async def Exec(self, request_iterator: streams.Inputs, context: Context) -> streams.Outputs:
        """See hosts.proto."""
        async with translated(context):
            start = await streams.start_of(request_iterator)
            sandbox, now_ns = self._sandboxes.find(start.name), self._sandboxes.now_ns
            async for output in _closing(streams.execute(sandbox, start, request_iterator, now_ns)):
                yield output

    async def Park(self, request: sandboxes_pb2.ParkSandboxRequest, context: Context) -> hosts_pb2.ParkResponse:
        """See hosts.proto."""
        async with translated(context):
            await self._sandboxes.find(request.name).park("asked for")
            return hosts_pb2.ParkResponse()

    async def Unpark(self, request: sandboxes_pb2.UnparkSandboxRequest, context: Context) -> hosts_pb2.UnparkResponse:
        """See hosts.proto."""
        async with translated(context):
            sandbox = self._sandboxes.find(request.name)
            await sandbox.awake()
            return hosts_pb2.UnparkResponse()

    async def Logs(self, request: sandboxes_pb2.GetLogsRequest, context: Context) -> streams.Outputs:
        """See hosts.proto."""
        async with translated(context):
            sandbox = self._sandboxes.find(request.name)
            log = streams.read_log(sandbox, follow=request.follow, tail_lines=request.tail_lines)
            async for output in _closing(log):
                yield output

    async def Import(self, request_iterator: uploads.Chunks, context: Context) -> uploads.Responses:
        """See hosts.proto."""
        store, state_dir = self._sandboxes.store, self._sandboxes.config.state_dir
        async with translated(context):
            async for response in _closing(uploads.import_image(request_iterator, store, state_dir, self._host)):
                yield response
            self._changed()

    async def Pull(self, request: images_pb2.PullImageRequest, context: Context) -> uploads.Responses:
        """See hosts.proto."""
        async with translated(context):
            async for response in _closing(pulls.pull_image(request, self._sandboxes.store, self._sandboxes.config)):
                yield response
            self._changed()

    async def OfferImage(self, request: hosts_pb2.OfferImageRequest, context: Context) -> hosts_pb2.OfferImageResponse:
        """See hosts.proto."""
        async with translated(context):
            return hosts_pb2.OfferImageResponse(ticket=self._offers.offer(request.tenant, request.digest, request.host))

    async def ForgetImage(
        self, request: hosts_pb2.ForgetImageRequest, context: Context
    ) -> hosts_pb2.ForgetImageResponse:
        """See hosts.proto."""
        store = self._sandboxes.store
        async with translated(context):
            await asyncio.to_thread(store.forget_image, domain_of(request.tenant), request.digest)
            await asyncio.to_thread(store.collect)
        self._changed()
        return hosts_pb2.ForgetImageResponse()

    async def Services(
        self, request: sandboxes_pb2.GetServiceUsageRequest, context: Context
    ) -> sandboxes_pb2.ServiceUsage:
        """See hosts.proto."""
        async with translated(context):
            sandbox = self._sandboxes.find(request.name)
            usage = sandbox.running().engine.service_usage()
            if usage is None:
                text = f"sandbox {sandbox.spec.name}: its own kernel answers all of its calls: nothing is counted"
                raise NotRunning(text, reason="NoServices")
            return edge.render_service_usage(usage)

    async def Ledger(
        self, request: sandboxes_pb2.GetSharingLedgerRequest, context: Context
    ) -> sandboxes_pb2.SharingLedger:
        """See hosts.proto."""
        async with translated(context):
            measured, names = await self._measure()
            boxes = self._sandboxes
            cached_bytes = await asyncio.to_thread(ledger.layer_cache_bytes, boxes.store, boxes.config.mounts_dir)
        memory = psutil.virtual_memory()
        return sandboxes_pb2.SharingLedger(
            sandboxes=[edge.render_memory(row, names[row.uid], self._host) for row in measured.rows],
            hosts=[
                sandboxes_pb2.HostMemory(
                    host=self._host,
                    distinct_bytes=measured.distinct_bytes,
                    mem_total_bytes=memory.total,
                    mem_available_bytes=memory.available,
                    layer_cache_bytes=cached_bytes,
                )
            ],
        )

    async def _measure(self) -> tuple[ledger.Ledger, dict[str, str]]:
        """The ledger, and each uid's name. A sandbox that ends meanwhile is measured without."""
        attempt = 0
        while True:
            attempt += 1
            live = [(sandbox.spec, sandbox.live.engine) for sandbox in self._sandboxes.all() if sandbox.live]
            regions: dict[str, list[Region]] = {spec.uid: await engine.regions() for spec, engine in live}
            names = {spec.uid: spec.name for spec, _ in live}
            for member, guest in self._sandboxes.pools.ready():  # in rows named after the pool
                regions[member.uid] = await guest.regions()
                names[member.uid] = member.pool.name
            try:
                measured = await asyncio.to_thread(ledger.measure, regions)
            except OSError:
                if attempt == MEASURE_ATTEMPTS:
                    raise
                continue
            return measured, names


async def _closing(outputs: AsyncIterator[T]) -> AsyncIterator[T]:
    """Closes the generator at once when its consumer goes, not when it happens to be collected."""
    try:
        async for output in outputs:
            yield output
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]
