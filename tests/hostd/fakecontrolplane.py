"""A control plane's end of HostSync, in this process, over real gRPC and TLS: for tests of a host alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio

from controlplane.api.channel import TlsFiles, connect, server_credentials, server_options
from controlplane.api.identity import Identity, Role, host_server_name
from controlplane.api.status import Condition, Failure, abort
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, pools_pb2, sandboxes_pb2
from controlplane.ca import Authority

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

Event = sandboxes_pb2.SandboxEvent


@dataclass
class Certificates:
    """One fabric's certificates, by who has them."""

    authority: Authority
    folder: Path

    def of(self, role: Role, name: str) -> TlsFiles:
        return self.authority.issue_files(
            Identity(role, name), self.folder / f"{role.value}-{name}", ip_addresses=("127.0.0.1",)
        )


def certificates(folder: Path) -> Certificates:
    return Certificates(Authority.create(folder / "ca"), folder)


def assignment(uid: str, image: str, *argv: str, epoch: int = 1, **changes: Any) -> sandboxes_pb2.Sandbox:
    """A sandbox as the control plane assigns it."""
    sandbox = sandboxes_pb2.Sandbox(
        name=uid,
        uid=uid,
        tenant="acme",
        spec=sandboxes_pb2.SandboxSpec(
            image_digest=image,
            resources=sandboxes_pb2.Resources(memory_min_mib=256, memory_max_mib=1024, memory_mib=256, cpu_milli=1000),
            process=sandboxes_pb2.Process(argv=argv, stdin=True),
        ),
        desired_state=sandboxes_pb2.DESIRED_RUNNING,
        assignment=sandboxes_pb2.Assignment(host="host-1", epoch=epoch),
        stop_grace_s=5,
    )
    sandbox.MergeFrom(sandboxes_pb2.Sandbox(**changes))
    return sandbox


@dataclass
class FakeControlPlane(hosts_pb2_grpc.HostSyncServicer):
    """`sandboxes` is what is assigned; put() and delete() tell a watching host. It notes what it is told."""

    tls: TlsFiles
    sandboxes: dict[str, sandboxes_pb2.Sandbox] = field(default_factory=dict)
    hosts: list[hosts_pb2.Host] = field(default_factory=list)
    reports: list[hosts_pb2.ReportSandboxRequest] = field(default_factory=list)
    events: list[sandboxes_pb2.Event] = field(default_factory=list)
    pools: list[pools_pb2.PoolAssignment] = field(default_factory=list)
    refuse: Callable[[hosts_pb2.ReportSandboxRequest], Failure | None] = lambda _: None
    refuse_events: Failure | None = None
    refuse_hosts: Failure | None = None
    sources: list[hosts_pb2.ImageSource] = field(default_factory=list)
    located: list[tuple[str, str]] = field(default_factory=list)
    fetched: list[tuple[str, str]] = field(default_factory=list)
    watches: int = 0
    lease_s: int = 3
    address: str = ""
    _pool_watchers: set[asyncio.Event] = field(default_factory=set)
    _watchers: set[asyncio.Queue[Event | None]] = field(default_factory=set)
    _server: grpc.aio.Server | None = None

    async def up(self) -> None:
        """Serves, at the same port as before."""
        self._server = grpc.aio.server(options=server_options())
        hosts_pb2_grpc.add_HostSyncServicer_to_server(self, self._server)
        port = self._server.add_secure_port(self.address or "127.0.0.1:0", server_credentials(self.tls))
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def down(self) -> None:
        """Is away."""
        assert self._server is not None
        await self._server.stop(None)

    def put(self, sandbox: sandboxes_pb2.Sandbox) -> None:
        self.sandboxes[sandbox.uid] = sandbox
        self._tell(Event(kind=Event.PUT, sandbox=sandbox))

    def delete(self, uid: str) -> None:
        self._tell(Event(kind=Event.DELETE, sandbox=self.sandboxes.pop(uid)))

    def cut_watches(self) -> None:
        """Ends every watch, as a proxy or a restart does."""
        for watcher in self._watchers:
            watcher.put_nowait(None)

    def _tell(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(event)

    def last(self, uid: str) -> hosts_pb2.ReportSandboxRequest | None:
        """The newest report of a sandbox."""
        return next((report for report in reversed(self.reports) if report.uid == uid), None)

    def phase(self, uid: str) -> str:
        report = self.last(uid)
        return sandboxes_pb2.Phase.Name(report.status.phase) if report else ""

    # The service.

    async def ReportHost(self, request: hosts_pb2.ReportHostRequest, context: Context) -> hosts_pb2.ReportHostResponse:
        if self.refuse_hosts is not None:
            await abort(context, self.refuse_hosts)
        self.hosts.append(request.host)
        return hosts_pb2.ReportHostResponse(lease_s=self.lease_s)

    async def WatchAssignments(
        self, request: hosts_pb2.WatchAssignmentsRequest, context: Context
    ) -> AsyncIterator[Event]:
        self.watches += 1
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        for sandbox in self.sandboxes.values():
            queue.put_nowait(Event(kind=Event.PUT, sandbox=sandbox))
        queue.put_nowait(Event(kind=Event.BOOKMARK))
        self._watchers.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._watchers.discard(queue)

    def put_pools(self, *pools: pools_pb2.PoolAssignment) -> None:
        """All pools from now on."""
        self.pools = list(pools)
        for watcher in self._pool_watchers:
            watcher.set()

    async def WatchPools(
        self, request: hosts_pb2.WatchPoolsRequest, context: Context
    ) -> AsyncIterator[pools_pb2.PoolAssignments]:
        changed = asyncio.Event()
        self._pool_watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield pools_pb2.PoolAssignments(pools=self.pools)
                await changed.wait()
        finally:
            self._pool_watchers.discard(changed)

    async def ReportSandbox(
        self, request: hosts_pb2.ReportSandboxRequest, context: Context
    ) -> hosts_pb2.ReportSandboxResponse:
        failure = self.refuse(request)
        if failure is not None:
            await abort(context, failure)
        self.reports.append(request)
        return hosts_pb2.ReportSandboxResponse()

    async def LocateImage(
        self, request: hosts_pb2.LocateImageRequest, context: Context
    ) -> hosts_pb2.LocateImageResponse:
        self.located.append((request.tenant, request.digest))
        if not self.sources:
            await abort(context, Failure(Condition.NOT_FOUND, "ImageNotFound", f"no host gives {request.digest}"))
        return hosts_pb2.LocateImageResponse(sources=self.sources)

    async def ReportImage(
        self, request: hosts_pb2.ReportImageRequest, context: Context
    ) -> hosts_pb2.ReportImageResponse:
        self.fetched.append((request.tenant, request.digest))
        return hosts_pb2.ReportImageResponse()

    async def RecordEvent(
        self, request: hosts_pb2.RecordEventRequest, context: Context
    ) -> hosts_pb2.RecordEventResponse:
        if self.refuse_events is not None:
            await abort(context, self.refuse_events)
        self.events.append(request.event)
        return hosts_pb2.RecordEventResponse()


def runtime_of(host: hosts_pb2.Host, tls: TlsFiles) -> grpc.aio.Channel:
    """A channel to the HostRuntime of a host that reported itself."""
    return connect(host.runtime_address, tls, server_name=host_server_name(host.name))
