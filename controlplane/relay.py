"""Streams between a client and the host that runs its sandbox: one connection a host, messages passed on as they are.

Nothing is buffered here: a message is read from one side when the other has taken the one before, so that a slow client
slows its sandbox down and not the control plane. When either side ends or cancels, the other one is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from controlplane.api.calls import keep_status
from controlplane.api.channel import TlsFiles, connect
from controlplane.api.identity import host_server_name
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import checkpoints_pb2_grpc, hosts_pb2_grpc
from controlplane.errors import OperationError, Relayed, Unavailable
from controlplane.model import Host

log = logging.getLogger("sandloom.controlplane.relay")

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Response = TypeVar("Response", covariant=True)
CONNECT_DEADLINE_S = 10.0


class StreamCall(Protocol[Response]):
    """What this module needs of a grpc.aio call that answers with a stream."""

    def __aiter__(self) -> AsyncIterator[Response]: ...
    def cancel(self) -> bool: ...


@dataclass(frozen=True)
class _Link:
    """An open channel and the address it goes to."""

    address: str
    channel: grpc.aio.Channel
    stub: hosts_pb2_grpc.HostRuntimeAsyncStub


class HostLinks:
    """Channels to the hosts' HostRuntime, made when needed. `async with` closes them."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._links: dict[str, _Link] = {}

    async def __aenter__(self) -> HostLinks:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as stack:
            for link in self._links.values():
                stack.push_async_callback(link.channel.close, None)
            self._links.clear()

    async def stub(self, host: Host) -> hosts_pb2_grpc.HostRuntimeAsyncStub:
        """The HostRuntime of a host, which must answer under that host's own name. Unavailable when it does not."""
        return (await self._link(host)).stub

    async def checkpoints(self, host: Host) -> checkpoints_pb2_grpc.HostCheckpointsAsyncStub:
        """The HostCheckpoints of a host, likewise."""
        return checkpoints_pb2_grpc.HostCheckpointsStub((await self._link(host)).channel)

    async def _link(self, host: Host) -> _Link:
        link = self._links.get(host.name)
        if link is None or link.address != host.runtime_address:
            if link is not None:
                await link.channel.close(None)
            channel = connect(host.runtime_address, self._tls, server_name=host_server_name(host.name))
            link = _Link(host.runtime_address, channel, hosts_pb2_grpc.HostRuntimeStub(channel))
            self._links[host.name] = link
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await _connected(link.channel)
        except TimeoutError as error:
            text = f"host {host.name} does not answer at {host.runtime_address}: is its sandloom-hostd running?"
            raise Unavailable("HostUnreachable", text, host=host.name) from error
        return link


async def _connected(channel: grpc.aio.Channel) -> None:
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


async def relay(
    open_call: Callable[[AsyncIterator[Request]], StreamCall[Response]],
    first: Request,
    rest: AsyncIterator[Request],
    host: str,
) -> AsyncGenerator[Response, None]:
    """Sends `first`, then `rest` to the host, and gives what it answers. The end of `rest` is the half-close.

    The host's failure comes as Relayed, a fault in `rest` (an OperationError) as that. However the consumer ends (it
    closes this generator: `aclosing`), the host's call is cancelled."""
    faults: list[OperationError] = []

    async def inputs() -> AsyncIterator[Request]:
        yield first
        try:
            async for message in rest:
                yield message
        except OperationError as error:
            faults.append(error)
            raise
        except grpc.aio.UsageError:  # the client's call is over: so is its input
            return

    async with aclosing(answers(keep_status(open_call(inputs())), host)) as outputs:
        try:
            async for output in outputs:
                yield output
        except Unavailable as error:
            raise faults[0] if faults else error from error


async def answers(call: StreamCall[Response], host: str) -> AsyncGenerator[Response, None]:
    """What the host answers. Relayed, or Unavailable when the connection is gone; cancels the call when closed."""
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise relayed(error, host) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not we were cancelled but the call: its input failed, or its channel was closed.
        raise Unavailable("HostUnreachable", f"the call to host {host} was cut off", host=host) from None
    finally:
        call.cancel()


def relayed(error: grpc.aio.AioRpcError, host: str) -> Relayed | Unavailable:
    """What a host's call failed with, for the client. A broken connection is told as such, with the host's name."""
    failure = parse_error(error)
    if failure.condition is Condition.UNAVAILABLE and failure.reason == "Unavailable":
        return Unavailable("HostUnreachable", f"host {host}: {failure.message}", host=host)
    return Relayed(failure)


async def answer(call: Callable[..., Any], request: object, host: str, deadline_s: float) -> Any:
    """One unary call to a host, within a deadline; its failure as Relayed."""
    try:
        return await call(request, timeout=deadline_s)
    except grpc.aio.AioRpcError as error:
        raise relayed(error, host) from error
