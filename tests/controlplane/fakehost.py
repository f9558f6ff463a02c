"""A host as the control plane meets it: speaks HostSync over mTLS and serves HostRuntime. It runs nothing.

Each stream method is a script: the test gives it, or takes the default that echoes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from controlplane.api.channel import TlsFiles, connect, server_credentials
from controlplane.api.v1 import checkpoints_pb2_grpc, hosts_pb2, hosts_pb2_grpc, images_pb2, sandboxes_pb2
from tests.controlplane.fakecheckpoints import FakeHostCheckpoints

Inputs = AsyncIterator[sandboxes_pb2.StreamInput]
Outputs = AsyncIterator[sandboxes_pb2.StreamOutput]
Script = Callable[[Inputs, Any], Outputs]

DIGEST = "sha256:" + "a" * 64
LAYER = "sha256:" + "b" * 64


def image_of(digest: str = DIGEST, *, layer: str = LAYER, layer_mib: int = 64) -> images_pb2.Image:
    """An image as a host would import it."""
    return images_pb2.Image(
        digest=digest,
        layers=[images_pb2.Layer(digest=layer, size_bytes=layer_mib << 20)],
        config=images_pb2.ImageConfig(cmd=["sh"]),
        size_bytes=layer_mib << 20,
        format="rootfs",
    )


async def echo(inputs: Inputs, context: Any) -> Outputs:
    """Says which sandbox it is for, sends every stdin back, and exits with 0 at the end of input."""
    first = await anext(aiter(inputs))
    yield sandboxes_pb2.StreamOutput(started=True)
    yield sandboxes_pb2.StreamOutput(stderr=first.start.name.encode())
    async for message in inputs:
        if message.WhichOneof("input") == "stdin":
            yield sandboxes_pb2.StreamOutput(stdout=message.stdin)
        elif message.WhichOneof("input") == "stdin_eof":
            break
    yield sandboxes_pb2.StreamOutput(exit=sandboxes_pb2.ExitStatus(code=0))


class FakeHost(hosts_pb2_grpc.HostRuntimeServicer):
    """See the module. Made by `fake_host`."""

    def __init__(self, name: str) -> None:
        self.name, self.address = name, ""
        self.attach: Script = echo
        self.exec: Script = echo
        self.images: list[images_pb2.Image] = [image_of()]
        self.forgotten: list[tuple[str, str]] = []
        self.imports: list[tuple[images_pb2.ImportImageRequest.Start, int]] = []
        self.pulls: list[images_pb2.PullImageRequest] = []
        self.offers: list[hosts_pb2.OfferImageRequest] = []
        self.logs_asked: list[sandboxes_pb2.GetLogsRequest] = []
        self.ledger = sandboxes_pb2.SharingLedger()
        self.service_usage = sandboxes_pb2.ServiceUsage()
        self.usage_asked: list[str] = []
        self.checkpoints = FakeHostCheckpoints()
        self.memory_mib = 8192
        self.limits: dict[str, int] = {}
        self.sync: hosts_pb2_grpc.HostSyncAsyncStub
        self.assigned: dict[str, sandboxes_pb2.Sandbox] = {}
        self.listed = asyncio.Event()
        self._changed = asyncio.Event()

    # What a host says.

    def description(self) -> hosts_pb2.Host:
        return hosts_pb2.Host(
            name=self.name,
            capacity=hosts_pb2.HostCapacity(
                memory_mib=self.memory_mib, memory_available_mib=self.memory_mib, cpu_milli=2000, disk_free_mib=10_000,
                system_reserve_mib=512, vm_overhead_mib=64,
            ),
            accel="tcg",
            runtime_address=self.address,
            image_digests=[image.digest for image in self.images],
            classes=[sandboxes_pb2.GUEST_KERNEL],
            limits=[
                hosts_pb2.CountedLimit(name=name, left=left, of_a_guest=name == "pmem_slots")
                for name, left in self.limits.items()
            ],
        )  # fmt: skip

    async def report(self) -> int:
        """One heartbeat; the lease's length."""
        answer = await self.sync.ReportHost(hosts_pb2.ReportHostRequest(host=self.description()), timeout=10)
        return answer.lease_s

    async def tell(
        self, uid: str, phase: sandboxes_pb2.Phase.ValueType, *, epoch: int | None = None, **status: Any
    ) -> None:
        """Reports a sandbox; the epoch is that of its assignment."""
        if epoch is None:
            epoch = self.assigned[uid].assignment.epoch
        removed = bool(status.pop("removed", False))
        if status.get("exit_code") is not None:
            status["has_exit_code"] = True
        observed = sandboxes_pb2.SandboxStatus(phase=phase, **status)
        await self.sync.ReportSandbox(
            hosts_pb2.ReportSandboxRequest(uid=uid, host=self.name, epoch=epoch, status=observed, removed=removed),
            timeout=10,
        )

    async def watch(self) -> None:
        """Follows the assignments for ever, as hostd does."""
        call = self.sync.WatchAssignments(hosts_pb2.WatchAssignmentsRequest(host=self.name))
        async for event in call:
            if event.kind == sandboxes_pb2.SandboxEvent.BOOKMARK:
                self.listed.set()
            elif event.kind == sandboxes_pb2.SandboxEvent.DELETE:
                self.assigned.pop(event.sandbox.uid, None)
            else:
                self.assigned[event.sandbox.uid] = event.sandbox
            self._changed.set()
            self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
        """Waits until the assignments are as wanted."""
        async with asyncio.timeout(deadline_s):
            while not condition():
                await self._changed.wait()

    # What a host serves.

    async def Attach(self, request_iterator: Inputs, context: Any) -> Outputs:
        async for output in self.attach(request_iterator, context):
            yield output

    async def Exec(self, request_iterator: Inputs, context: Any) -> Outputs:
        async for output in self.exec(request_iterator, context):
            yield output

    async def Park(self, request: sandboxes_pb2.ParkSandboxRequest, context: Any) -> hosts_pb2.ParkResponse:
        await self.tell(request.name, sandboxes_pb2.PARKED, reason="Parked")
        return hosts_pb2.ParkResponse()

    async def Unpark(self, request: sandboxes_pb2.UnparkSandboxRequest, context: Any) -> hosts_pb2.UnparkResponse:
        await self.tell(request.name, sandboxes_pb2.RUNNING)
        return hosts_pb2.UnparkResponse()

    async def Logs(self, request: sandboxes_pb2.GetLogsRequest, context: Any) -> Outputs:
        self.logs_asked.append(request)
        yield sandboxes_pb2.StreamOutput(stdout=b"line\n")

    async def Import(
        self, request_iterator: AsyncIterator[images_pb2.ImportImageRequest], context: Any
    ) -> AsyncIterator[images_pb2.ImportImageResponse]:
        first = await anext(aiter(request_iterator))
        size_bytes = 0
        async for message in request_iterator:
            size_bytes += len(message.chunk)
        self.imports.append((first.start, size_bytes))
        progress = images_pb2.ImportImageResponse.Progress(step="receive", done_bytes=size_bytes)
        yield images_pb2.ImportImageResponse(progress=progress)
        if size_bytes == 0:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the archive is empty")
        yield images_pb2.ImportImageResponse(image=self.images[-1])

    async def Pull(
        self, request: images_pb2.PullImageRequest, context: Any
    ) -> AsyncIterator[images_pb2.ImportImageResponse]:
        self.pulls.append(request)
        yield images_pb2.ImportImageResponse(image=self.images[-1])

    async def OfferImage(self, request: hosts_pb2.OfferImageRequest, context: Any) -> hosts_pb2.OfferImageResponse:
        self.offers.append(request)
        return hosts_pb2.OfferImageResponse(ticket=f"ticket of {self.name}")

    async def ForgetImage(self, request: hosts_pb2.ForgetImageRequest, context: Any) -> hosts_pb2.ForgetImageResponse:
        self.forgotten.append((request.tenant, request.digest))
        return hosts_pb2.ForgetImageResponse()

    async def Services(self, request: sandboxes_pb2.GetServiceUsageRequest, context: Any) -> sandboxes_pb2.ServiceUsage:
        self.usage_asked.append(request.name)
        return self.service_usage

    async def Ledger(self, request: sandboxes_pb2.GetSharingLedgerRequest, context: Any) -> sandboxes_pb2.SharingLedger:
        return self.ledger


@asynccontextmanager
async def fake_host(name: str, controlplane: str, tls: TlsFiles, *, port: int = 0) -> AsyncIterator[FakeHost]:
    """A host that serves, has reported itself once and follows its assignments."""
    host = FakeHost(name)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    hosts_pb2_grpc.add_HostRuntimeServicer_to_server(host, server)
    checkpoints_pb2_grpc.add_HostCheckpointsServicer_to_server(host.checkpoints, server)
    port = server.add_secure_port(f"127.0.0.1:{port}", server_credentials(tls))
    host.address = f"127.0.0.1:{port}"
    await server.start()
    async with connect(controlplane, tls) as channel:
        host.sync = hosts_pb2_grpc.HostSyncStub(channel)
        await host.report()
        watching = asyncio.create_task(host.watch())
        try:
            async with asyncio.timeout(10):
                await host.listed.wait()
            yield host
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await server.stop(None)


async def keep_reporting(host: FakeHost, every_s: float) -> None:
    """Heartbeats until cancelled."""
    while True:
        await host.report()
        await asyncio.sleep(every_s)
