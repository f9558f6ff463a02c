"""The streams into hosts: attach, exec, logs and the sharing ledger. Parse, find the host, relay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from controlplane.api.v1 import sandboxes_pb2
from controlplane.edge import sandboxes as edge
from controlplane.errors import Invalid, NotFound, OperationError, Precondition, Unavailable
from controlplane.gate import Caller, Context, Gate
from controlplane.model import Host, Phase, Sandbox
from controlplane.relay import HostLinks, answer, answers, relay
from controlplane.streams import Ended, Locator
from controlplane.view import View

FIRST_MESSAGE_S = 30.0
LEDGER_DEADLINE_S = 25.0
USAGE_DEADLINE_S = 10.0
MAX_STDIN_BYTES = 64 << 10
Inputs = AsyncIterator[sandboxes_pb2.StreamInput]
Outputs = AsyncIterator[sandboxes_pb2.StreamOutput]


@dataclass(frozen=True)
class Streams:
    """What the stream methods need."""

    locator: Locator
    links: HostLinks
    view: View


class StreamMethods:
    """Methods of SandboxesService."""

    def __init__(self, gate: Gate, streams: Streams) -> None:
        self._gate, self._streams = gate, streams

    async def AttachSandbox(self, request_iterator: Inputs, context: Context) -> Outputs:
        """See sandboxes.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            start = await _start_of(request_iterator)
            place = await self._streams.locator.begun(caller.tenant, edge.parse_name(start.name, "start.name"))
            if isinstance(place, Ended):
                yield _how_it_ended(place.sandbox)
                return
            stub = await self._streams.links.stub(place.host)
            first = _addressed(start, place.sandbox)
            async with aclosing(relay(stub.Attach, first, _inputs(request_iterator), place.host.name)) as outputs:
                async for output in outputs:
                    yield output

    async def ExecSandbox(self, request_iterator: Inputs, context: Context) -> Outputs:
        """See sandboxes.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            start = await _start_of(request_iterator)
            if not start.exec.argv:
                raise Invalid("start.exec.argv", "name the command to run", reason="NoCommand")
            edge.parse_process(start.exec, "start.exec")
            place = await self._streams.locator.running(caller.tenant, edge.parse_name(start.name, "start.name"))
            stub = await self._streams.links.stub(place.host)
            first = _addressed(start, place.sandbox)
            async with aclosing(relay(stub.Exec, first, _inputs(request_iterator), place.host.name)) as outputs:
                async for output in outputs:
                    yield output

    async def GetLogs(self, request: sandboxes_pb2.GetLogsRequest, context: Context) -> Outputs:
        """See sandboxes.proto."""
        async with self._gate.admit(context, stream=True) as caller:
            if request.tail_lines < 0:
                raise Invalid("tail_lines", f"{request.tail_lines} is negative")
            name = edge.parse_name(request.name)
            place = await self._streams.locator.begun(caller.tenant, name, wait=request.follow)
            if isinstance(place, Ended):
                if place.sandbox.status.started_at_s is None:
                    return  # it never ran: there is nothing that could be lost
                status = place.sandbox.status
                text = f"the log of sandbox {place.sandbox.name} is gone with its host ({status.message})"
                raise NotFound("LogsGone", text, sandbox=place.sandbox.name)
            stub = await self._streams.links.stub(place.host)
            asked = sandboxes_pb2.GetLogsRequest(
                name=place.sandbox.uid, follow=request.follow, tail_lines=request.tail_lines
            )
            async with aclosing(answers(stub.Logs(asked), place.host.name)) as outputs:
                async for output in outputs:
                    yield output

    async def GetServiceUsage(
        self, request: sandboxes_pb2.GetServiceUsageRequest, context: Context
    ) -> sandboxes_pb2.ServiceUsage:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            place = await self._streams.locator.running(caller.tenant, edge.parse_name(request.name))
            stub = await self._streams.links.stub(place.host)
            asked = sandboxes_pb2.GetServiceUsageRequest(name=place.sandbox.uid)
            usage: sandboxes_pb2.ServiceUsage = await answer(stub.Services, asked, place.host.name, USAGE_DEADLINE_S)
            return usage

    async def GetSharingLedger(
        self, request: sandboxes_pb2.GetSharingLedgerRequest, context: Context
    ) -> sandboxes_pb2.SharingLedger:
        """See sandboxes.proto."""
        async with self._gate.admit(context) as caller:
            view = self._streams.view
            if request.host and not _may_know(caller, request.host, view):
                raise NotFound("HostNotFound", f"there is no host {request.host}", host=request.host)
            if request.host and request.host not in view.alive:
                text = f"host {request.host} is LOST: what its sandboxes hold is not known until it returns"
                raise Unavailable("HostLost", text, host=request.host)
            known = sorted(name for name in view.hosts if _may_know(caller, name, view))
            names = [request.host] if request.host else [name for name in known if name in view.alive]
            lost = [] if request.host else [name for name in known if name not in view.alive]
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._ledger_of(view.hosts[name])) for name in names]
            except ExceptionGroup as failed:
                told = next((error for error in failed.exceptions if isinstance(error, OperationError)), None)
                if told is None:
                    raise
                raise told from failed
            merged = _merged([task.result() for task in tasks], caller, view)
            merged.lost_hosts.extend(lost)
            return merged

    async def _ledger_of(self, host: Host) -> sandboxes_pb2.SharingLedger:
        stub = await self._streams.links.stub(host)
        asked = sandboxes_pb2.GetSharingLedgerRequest(host=host.name)
        ledger: sandboxes_pb2.SharingLedger = await answer(stub.Ledger, asked, host.name, LEDGER_DEADLINE_S)
        return ledger


async def _start_of(inputs: Inputs) -> sandboxes_pb2.StreamStart:
    async with asyncio.timeout(FIRST_MESSAGE_S):
        first = await anext(aiter(inputs), None)
    if first is None or first.WhichOneof("input") != "start":
        raise Invalid("start", "the first message of a stream must be `start`")
    return first.start


async def _inputs(inputs: Inputs) -> Inputs:
    """What comes after `start`; a message that is too large or a second start ends the stream."""
    async for message in inputs:
        if message.WhichOneof("input") == "start":
            raise Invalid("start", "it may come only once")
        if len(message.stdin) > MAX_STDIN_BYTES:
            raise Invalid("stdin", f"{len(message.stdin)} bytes in one message, {MAX_STDIN_BYTES} is the most")
        yield message


def _addressed(start: sandboxes_pb2.StreamStart, sandbox: Sandbox) -> sandboxes_pb2.StreamInput:
    """The start as the host wants it: by uid."""
    message = sandboxes_pb2.StreamInput(start=start)
    message.start.name = sandbox.uid
    return message


def _how_it_ended(sandbox: Sandbox) -> sandboxes_pb2.StreamOutput:
    status = sandbox.status
    if status.phase is not Phase.EXITED:
        text = f"sandbox {sandbox.name} failed: {status.message or status.reason}"
        raise Precondition(status.reason or "SandboxFailed", text, sandbox=sandbox.name)
    code = status.exit_code or 0
    signal = code - 128 if 128 < code <= 192 else 0
    return sandboxes_pb2.StreamOutput(exit=sandboxes_pb2.ExitStatus(code=code, signal=signal, message=status.message))


def _may_know(caller: Caller, host: str, view: View) -> bool:
    """A tenant knows the hosts that its own sandboxes and pools are on."""
    if host not in view.hosts or caller.is_operator:
        return host in view.hosts
    tenants = {sandbox.tenant for sandbox in view.on_host(host)} | {pool.tenant for pool in view.hosts[host].pools}
    return caller.tenant in tenants


def _merged(ledgers: list[sandboxes_pb2.SharingLedger], caller: Caller, view: View) -> sandboxes_pb2.SharingLedger:
    """One ledger of many. A tenant sees its own sandboxes' rows and nothing of the hosts, which are not its own."""
    merged = sandboxes_pb2.SharingLedger()
    for ledger in ledgers:
        for row in ledger.sandboxes:
            known = view.sandboxes.get(row.uid) or view.pool_of_member(row.uid)
            if caller.is_operator or (known is not None and known.tenant == caller.tenant):
                merged.sandboxes.append(row)
        if caller.is_operator:
            merged.hosts.extend(ledger.hosts)
    return merged
