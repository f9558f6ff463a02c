"""Sandboxes: parse, call, render. See sandboxes.proto for every method's contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from controlplane import keys, lifecycle, watching
from controlplane.api.services import ALL_KERNEL, ServicePolicy
from controlplane.api.status import to_status
from controlplane.api.v1 import sandboxes_pb2, sandboxes_pb2_grpc
from controlplane.edge import news
from controlplane.edge import sandboxes as edge
from controlplane.edge.rules import parse_most, render_explanation
from controlplane.errors import Invalid, OperationError
from controlplane.events import EventLog
from controlplane.explaining import for_tenant
from controlplane.gate import Caller, Context, Gate, failure_of, late
from controlplane.listing import list_page
from controlplane.model import Event, Sandbox
from controlplane.parking import Parking
from controlplane.records import Records
from controlplane.sandboxes import Sandboxes
from controlplane.service_streams import StreamMethods, Streams
from controlplane.store.contract import Store
from controlplane.usageledger import Usage


class SandboxesService(StreamMethods, sandboxes_pb2_grpc.SandboxesServicer):
    """The unary methods and the watches; the streams into hosts are StreamMethods."""

    def __init__(
        self,
        gate: Gate,
        store: Store,
        records: Records,
        sandboxes: Sandboxes,
        event_log: EventLog,
        streams: Streams,
        services: Mapping[str, ServicePolicy],
    ) -> None:
        """`services` are the tenants' defaults."""
        super().__init__(gate, streams)
        self._store, self._records, self._sandboxes, self._events = store, records, sandboxes, event_log
        self._services = services
        self._parking = Parking(streams.locator, streams.view, streams.links)

    async def CreateSandbox(
        self, request: sandboxes_pb2.CreateSandboxRequest, context: Context
    ) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            asked = edge.parse_creation(request, self._services.get(caller.tenant, ALL_KERNEL))
            return edge.render_sandbox(await self._sandboxes.create(caller.tenant, asked))

    async def CreateSandboxes(
        self, request: sandboxes_pb2.CreateSandboxesRequest, context: Context
    ) -> sandboxes_pb2.CreateSandboxesResponse:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            edge.require_few(len(request.requests))
            async with asyncio.TaskGroup() as group:
                making = [group.create_task(self._outcome(caller.tenant, one)) for one in request.requests]
            return sandboxes_pb2.CreateSandboxesResponse(outcomes=[one.result() for one in making])

    async def _outcome(self, tenant: str, request: sandboxes_pb2.CreateSandboxRequest) -> sandboxes_pb2.CreateOutcome:
        try:
            asked = edge.parse_creation(request, self._services.get(tenant, ALL_KERNEL))
            return sandboxes_pb2.CreateOutcome(sandbox=edge.render_sandbox(await self._sandboxes.create(tenant, asked)))
        except (OperationError, TimeoutError) as error:
            failure = late() if isinstance(error, TimeoutError) else failure_of(error)
            return sandboxes_pb2.CreateOutcome(error=to_status(failure).SerializeToString())

    async def GetSandbox(self, request: sandboxes_pb2.GetSandboxRequest, context: Context) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            return edge.render_sandbox(await self._records.get(caller.tenant, edge.parse_name(request.name)))

    async def ListSandboxes(
        self, request: sandboxes_pb2.ListSandboxesRequest, context: Context
    ) -> sandboxes_pb2.ListSandboxesResponse:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            listed = await list_page(
                self._store,
                Sandbox,
                keys.sandboxes_of(caller.tenant),
                page_size=request.page_size,
                page_token=request.page_token,
                of=f"sandboxes/{caller.tenant}/{'all' if request.ended else 'live'}",
                keep=lambda s: request.ended or s.status.phase not in lifecycle.ENDED,
            )
            return sandboxes_pb2.ListSandboxesResponse(
                sandboxes=[edge.render_sandbox(sandbox) for sandbox in listed.values],
                next_page_token=listed.next_token,
                resource_version=listed.revision,
            )

    async def ListUsage(
        self, request: sandboxes_pb2.ListUsageRequest, context: Context
    ) -> sandboxes_pb2.ListUsageResponse:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            listed = await list_page(
                self._store, Usage, keys.ledger_of(caller.tenant), page_size=request.page_size,
                page_token=request.page_token, of=f"usage/{caller.tenant}",
            )  # fmt: skip
            rows = [news.render_usage(usage) for usage in listed.values]
            return sandboxes_pb2.ListUsageResponse(usage=rows, next_page_token=listed.next_token)

    async def WatchSandboxes(
        self, request: sandboxes_pb2.WatchSandboxesRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.SandboxEvent]:
        """See sandboxes.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            if request.resource_version < 0:
                raise Invalid("resource_version", f"{request.resource_version} is negative")
            async with aclosing(
                watching.watch_sandboxes(self._store, caller.tenant, request.resource_version)
            ) as changes:
                async for told in changes:
                    yield news.render_told(told)

    async def SetServices(self, request: sandboxes_pb2.SetServicesRequest, context: Context) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            name, wish = edge.parse_name(request.name), edge.parse_service_wish(request)
            return edge.render_sandbox(await self._sandboxes.set_services(caller.tenant, name, wish))

    async def ResizeSandbox(
        self, request: sandboxes_pb2.ResizeSandboxRequest, context: Context
    ) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            name, wish = edge.parse_name(request.name), edge.parse_resize(request)
            return edge.render_sandbox(await self._sandboxes.resize(caller.tenant, name, wish))

    async def ParkSandbox(self, request: sandboxes_pb2.ParkSandboxRequest, context: Context) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            return edge.render_sandbox(await self._parking.park(caller.tenant, edge.parse_name(request.name)))

    async def UnparkSandbox(
        self, request: sandboxes_pb2.UnparkSandboxRequest, context: Context
    ) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            return edge.render_sandbox(await self._parking.unpark(caller.tenant, edge.parse_name(request.name)))

    async def StopSandbox(self, request: sandboxes_pb2.StopSandboxRequest, context: Context) -> sandboxes_pb2.Sandbox:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            name, grace_s = edge.parse_name(request.name), edge.parse_grace_s(request)
            return edge.render_sandbox(await self._sandboxes.stop(caller.tenant, name, grace_s))

    async def DeleteSandbox(
        self, request: sandboxes_pb2.DeleteSandboxRequest, context: Context
    ) -> sandboxes_pb2.DeleteSandboxResponse:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            await self._sandboxes.delete(
                caller.tenant, edge.parse_name(request.name), force=request.force, allow_missing=request.allow_missing
            )
            return sandboxes_pb2.DeleteSandboxResponse()

    async def ExplainSandbox(
        self, request: sandboxes_pb2.ExplainSandboxRequest, context: Context
    ) -> sandboxes_pb2.Explanation:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            sandbox = await self._records.get(caller.tenant, edge.parse_name(request.name))
            explained = self._sandboxes.explain(sandbox, most=parse_most(request))
            return render_explanation(explained if caller.is_operator else for_tenant(explained))

    async def WatchEvents(
        self, request: sandboxes_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[sandboxes_pb2.Event]:
        """See sandboxes.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            revision = 0
            async for item in self._events.stored():
                if isinstance(item, int):
                    revision = item
                elif _may_see(caller, item, request.subject):
                    yield news.render_event(item)
            if not request.follow:
                return
            async with aclosing(self._events.follow(revision)) as changes:
                async for event in changes:
                    if _may_see(caller, event, request.subject):
                        yield news.render_event(event)


def _may_see(caller: Caller, event: Event, subject: str) -> bool:
    mine = event.tenant == caller.tenant or (caller.is_operator and not event.tenant)
    return mine and subject in ("", event.subject)
