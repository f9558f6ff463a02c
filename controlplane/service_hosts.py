"""Hosts for operators, and HostSync for hosts: parse, call, render. See hosts.proto for every method's contract."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from controlplane import keys, watching
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, pools_pb2, sandboxes_pb2
from controlplane.distribution import Distribution
from controlplane.drains import Drains
from controlplane.edge import hosts as edge
from controlplane.edge import news
from controlplane.edge import sandboxes as sandbox_edge
from controlplane.edge.enums import timestamp
from controlplane.edge.pools import render_assignments
from controlplane.errors import Denied
from controlplane.events import EventLog
from controlplane.gate import Caller, Context, Gate
from controlplane.joining import Joining
from controlplane.listing import list_page
from controlplane.membership import Standing
from controlplane.model import Host
from controlplane.quotas import Quota
from controlplane.registry import Registry
from controlplane.reports import Reports
from controlplane.store.contract import Store
from controlplane.view import View


class HostsService(hosts_pb2_grpc.HostsServicer):
    """What operators see of hosts."""

    def __init__(
        self, gate: Gate, store: Store, registry: Registry, view: View, drains: Drains, joining: Joining
    ) -> None:
        self._gate, self._store, self._registry = gate, store, registry
        self._view, self._drains, self._joining = view, drains, joining

    async def GetHost(self, request: hosts_pb2.GetHostRequest, context: Context) -> hosts_pb2.Host:
        """See hosts.proto."""
        async with self._gate.admit(context):
            return self._rendered(await self._registry.get(sandbox_edge.parse_name(request.name)))

    async def ListHosts(self, request: hosts_pb2.ListHostsRequest, context: Context) -> hosts_pb2.ListHostsResponse:
        """See hosts.proto."""
        async with self._gate.admit(context):
            listed = await list_page(
                self._store, Host, keys.HOSTS, page_size=request.page_size, page_token=request.page_token, of="hosts"
            )
            return hosts_pb2.ListHostsResponse(
                hosts=[self._rendered(host, plan=False) for host in listed.values],
                next_page_token=listed.next_token,
                resource_version=listed.revision,
            )

    async def CordonHost(self, request: hosts_pb2.CordonHostRequest, context: Context) -> hosts_pb2.Host:
        """See hosts.proto."""
        async with self._gate.admit(context):
            return self._rendered(await self._change(request.name, Standing.CORDONED))

    async def UncordonHost(self, request: hosts_pb2.UncordonHostRequest, context: Context) -> hosts_pb2.Host:
        """See hosts.proto."""
        async with self._gate.admit(context):
            return self._rendered(await self._change(request.name, Standing.OPEN))

    async def DrainHost(self, request: hosts_pb2.DrainHostRequest, context: Context) -> hosts_pb2.Host:
        """See hosts.proto."""
        async with self._gate.admit(context):
            name = sandbox_edge.parse_name(request.name)
            if self._view.member(name).standing is Standing.DRAINED:
                return self._rendered(await self._registry.get(name))
            return self._rendered(await self._change(name, Standing.DRAINING, force=request.force))

    async def RemoveHost(self, request: hosts_pb2.RemoveHostRequest, context: Context) -> hosts_pb2.RemoveHostResponse:
        """See hosts.proto."""
        async with self._gate.admit(context):
            name = sandbox_edge.parse_name(request.name)
            await self._registry.remove(name, force=request.force, allow_missing=request.allow_missing)
            return hosts_pb2.RemoveHostResponse()

    async def CreateJoinToken(self, request: hosts_pb2.CreateJoinTokenRequest, context: Context) -> hosts_pb2.JoinToken:
        """See hosts.proto."""
        async with self._gate.admit(context):
            name = sandbox_edge.parse_name(request.host, "host") if request.host else ""
            made = await self._joining.token(name, edge.parse_lifetime_s(request.lifetime_s))
            return hosts_pb2.JoinToken(token=made.word, id=made.id, expires_at=timestamp(made.expires_at_s))

    async def _change(self, name: str, to: Standing, *, force: bool = False) -> Host:
        return await self._registry.change(sandbox_edge.parse_name(name), to, force=force)

    def _rendered(self, host: Host, *, plan: bool = True) -> hosts_pb2.Host:
        member = self._view.member(host.name)
        draining = plan and member.standing is Standing.DRAINING
        blockers = self._drains.plan(host.name).blockers if draining else ()
        return edge.render_host(host, member, alive=self._registry.is_alive(host.name), blockers=blockers)


class HostSyncService(hosts_pb2_grpc.HostSyncServicer):
    """What hosts pull and report. A host speaks for itself only."""

    def __init__(
        self, gate: Gate, view: View, registry: Registry, reports: Reports, event_log: EventLog,
        distribution: Distribution, quota_of: Callable[[str], Quota], *, now_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._gate, self._view, self._registry, self._quota_of = gate, view, registry, quota_of
        self._reports, self._events, self._now_s = reports, event_log, now_s
        self._distribution = distribution

    async def ReportHost(self, request: hosts_pb2.ReportHostRequest, context: Context) -> hosts_pb2.ReportHostResponse:
        """See hosts.proto."""
        async with self._gate.admit(context) as caller:
            _require_itself(caller, request.host.name)
            lease_s = await self._registry.report(edge.parse_host(request.host, self._now_s()))
            return hosts_pb2.ReportHostResponse(lease_s=lease_s)

    async def WatchAssignments(
        self, request: hosts_pb2.WatchAssignmentsRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.SandboxEvent]:
        """See hosts.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            _require_itself(caller, request.host)
            still = functools.partial(self._gate.require_host, context)
            async with aclosing(watching.watch_assignments(self._view, request.host, require=still)) as changes:
                async for told in changes:
                    yield news.render_told_host(told)

    async def WatchPools(
        self, request: hosts_pb2.WatchPoolsRequest, context: Context
    ) -> AsyncIterator[pools_pb2.PoolAssignments]:
        """See hosts.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            _require_itself(caller, request.host)
            async with aclosing(watching.watch_pools(self._view, request.host, self._quota_of)) as changes:
                async for shares in changes:
                    yield render_assignments(shares)

    async def ReportSandbox(
        self, request: hosts_pb2.ReportSandboxRequest, context: Context
    ) -> hosts_pb2.ReportSandboxResponse:
        """See hosts.proto."""
        async with self._gate.admit(context) as caller:
            _require_itself(caller, request.host)
            await self._reports.take(sandbox_edge.parse_report(request))
            return hosts_pb2.ReportSandboxResponse()

    async def LocateImage(
        self, request: hosts_pb2.LocateImageRequest, context: Context
    ) -> hosts_pb2.LocateImageResponse:
        """See hosts.proto."""
        async with self._gate.admit(context) as caller:
            _require_itself(caller, request.host)
            sources = await self._distribution.locate(request.host, request.tenant, request.digest)
            return hosts_pb2.LocateImageResponse(
                sources=[
                    hosts_pb2.ImageSource(host=one.host, address=one.address, ticket=one.ticket) for one in sources
                ]
            )

    async def ReportImage(
        self, request: hosts_pb2.ReportImageRequest, context: Context
    ) -> hosts_pb2.ReportImageResponse:
        """See hosts.proto."""
        async with self._gate.admit(context) as caller:
            _require_itself(caller, request.host)
            await self._distribution.fetched(request.host, request.tenant, request.digest)
            return hosts_pb2.ReportImageResponse()

    async def RecordEvent(
        self, request: hosts_pb2.RecordEventRequest, context: Context
    ) -> hosts_pb2.RecordEventResponse:
        """See hosts.proto."""
        async with self._gate.admit(context) as caller:
            host = caller.identity.name
            _require_itself(caller, request.event.host or host)
            tenant = self._tenant_of(host, request.event)
            await self._events.record(news.parse_event(request.event, host=host, tenant=tenant))
            return hosts_pb2.RecordEventResponse()

    def _tenant_of(self, host: str, event: sandboxes_pb2.Event) -> str:
        """Whose sandbox or pool a host's event tells of; nobody's (operators see it) when that is not certain."""
        if event.kind == "pool":
            tenants = {pool.tenant for pool in self._view.pools.values() if pool.name == event.subject}
            return tenants.pop() if len(tenants) == 1 else ""
        if event.kind != "sandbox":
            return ""
        tenants = {s.tenant for s in self._view.on_host(host) if s.name == event.subject}
        return tenants.pop() if len(tenants) == 1 else ""


def _require_itself(caller: Caller, host: str) -> None:
    if caller.identity.name != host:
        raise Denied("WrongHost", f"{caller.identity} may not speak for host {host!r}")
