"""`sockets: tool`: dials and listens for one sandbox that has no network, under its rules, and meters what flows.

Frames come over the sandbox's services port (guestagent/PROTOCOL.md). All of it runs in hostd's event loop; nothing
blocks. The guest is hostile: what it asks is decided here, by hostd.services.reach, whatever its agent said before;
a breach of the protocol ends the session. Owns: the port's connection, every connection to the world, every listening
socket, from start() to aclose(). `lost` resolves, with why, when the session is over.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from controlplane.api.services import Answerer, Publish, Service, ServicePolicy, Transport
from guestagent import mux
from guestagent.errors import ProtocolError
from guestagent.messages import Services
from guestagent.mux import Endpoint, Frame, FrameReader, Type
from hostd.errors import StartFailed
from hostd.services.account import Account, Refusal, ServiceUsage
from hostd.services.datagrams import Datagrams
from hostd.services.flows import Flow
from hostd.services.notified import answerers_of
from hostd.services.reach import Reach, host_side, sandbox_side
from hostd.services.syscalls import syscall_name
from hostd.tasks import OwnedTasks

log = logging.getLogger("sandloom.hostd.services")

DIAL_DEADLINE_S = 30.0
JOIN_DEADLINE_S = 10.0
CONNECT_DEADLINE_S = 10.0
MAX_DIALING = 256
PORT_HIGH_BYTES = 262144
PORT_MOST_BYTES = 16 << 20
VIEW_OPENED = ("sysview", "openat")
VIEW_FILES = dict(enumerate(("/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/sys/devices/system/cpu/online")))
"""Which one was opened, where `sysview: deny` refuses it: as guestagent/src/viewing.c counts them."""


class SocketsTool(asyncio.Protocol):
    """See the module."""

    def __init__(self, policy: ServicePolicy, account: Account) -> None:
        self.policy, self.account, self.reach = policy, account, Reach(policy)
        self._loop = asyncio.get_running_loop()
        self.nonce = os.urandom(mux.NONCE_BYTES)
        self._reader = FrameReader(self.nonce)
        self._transport: asyncio.Transport | None = None
        self._flows: dict[int, Flow] = {}
        self._dialing: dict[int, asyncio.Task[None]] = {}
        self._joining: dict[int, Flow] = {}
        self._next_slot, self._serial = mux.HOST_FLOWS, 0
        self._servers: list[asyncio.Server] = []
        self._tasks = OwnedTasks()
        self._datagrams = Datagrams(self.reach, account, self.send_datagram, self._tasks)
        self._full = False
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.published: tuple[Publish, ...] = ()

    async def listen(self) -> None:
        """Opens the published ports. StartFailed names the one that cannot be."""
        told = []
        for port in self.policy.publish:
            try:
                told.append(await self._publish(port))
            except OSError as error:
                await self.aclose()
                reason = f"{port} cannot be published: {error.strerror or error}: choose another host port"
                raise StartFailed(reason, reason="PortTaken") from error
        self.published = tuple(told)

    async def _publish(self, port: Publish) -> Publish:
        if port.transport is Transport.UDP:
            return self._datagrams.publish(port)
        server = await self._loop.create_server(
            lambda: self._client(port), port.host_address, port.host_port, backlog=512
        )
        self._servers.append(server)
        return Publish(server.sockets[0].getsockname()[1], port.port, port.transport, port.host_address)

    async def start(self, port: Path | socket.socket, begin: Callable[[Services], Awaitable[None]]) -> None:
        """Connects to the services port (or takes what is connected to it), and has the agent begin the session.
        StartFailed."""
        where = {"sock": port} if isinstance(port, socket.socket) else {"path": str(port)}
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await self._loop.create_unix_connection(lambda: self, **where)
        except (OSError, TimeoutError) as error:
            raise StartFailed(f"{port}: the services port: {error}", reason="ServicesPort") from error
        await begin(services_of(self.policy, self.nonce))
        self._write(self.nonce)

    def change(self, policy: ServicePolicy) -> None:
        """Other rules from now on. What they do not allow is cut, whether it stands or is being dialled; the rest lives
        on. Idempotent. What the agent was told (who answers) never changes: see controlplane/api/servicechange.py."""
        self.policy = policy
        self.reach.change(policy)
        self._datagrams.recheck()
        for flow in [*self._flows.values(), *self._joining.values()]:
            if not self._may_stay(flow.to):
                self.account.cut("sockets")
                self.send(mux.encode(Type.RESET, flow.id))
                flow.abort()

    def _may_stay(self, to: Endpoint | None) -> bool:
        """`to` is whom the sandbox dialled; None: it was dialled itself."""
        if to is None:
            return self.policy.now(Service.SOCKETS) is Answerer.TOOL
        return self.reach.verdict(Transport.TCP, to.address, to.port, self._loop.time()).allowed

    def usage(self) -> ServiceUsage:
        """What it did since it started."""
        counted = self.account
        return ServiceUsage(
            counted.bytes_out, counted.bytes_in, counted.connections, len(self._flows), counted.datagrams,
            tuple(sorted(counted.decisions.items())), tuple(map(str, self.published)),
        )  # fmt: skip

    async def aclose(self) -> None:
        """Ends everything. Idempotent."""
        await self._tasks.aclose()
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._datagrams.close()
        self._end("hostd let go of it")

    # The port.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The port is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=PORT_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        """The guest said something."""
        try:
            for frame in self._reader.feed(data):
                self._take(frame)
        except ProtocolError as error:
            self._end(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """The port closed."""
        self._end(f"the services port closed{f': {exc}' if exc else ''}")

    def pause_writing(self) -> None:
        """The guest does not take what it asked for."""
        self._set_full(True)

    def resume_writing(self) -> None:
        """It does again."""
        self._set_full(False)

    def _set_full(self, full: bool) -> None:
        self._full = full
        for flow in list(self._flows.values()):
            flow.port_full(full)

    def send(self, frame: bytes) -> None:
        """See Port.send. A guest that reads nothing is cut off when too much waits for it."""
        if self._transport is not None and self._transport.get_write_buffer_size() > PORT_MOST_BYTES:
            self._end("the guest does not read its services port")
        self._write(frame)

    def send_datagram(self, datagram: mux.Datagram) -> None:
        """A datagram for the sandbox; lost when the port is full, as on any network."""
        if not self._full:
            self._write(mux.encode_datagram(datagram))

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _end(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)
        for flow in [*self._flows.values(), *self._joining.values()]:
            flow.abort()
        for task in self._dialing.values():
            task.cancel()
        if self._transport is not None:
            self._transport.abort()

    # What the guest says.

    def _take(self, frame: Frame) -> None:
        if frame.type is Type.OPEN:
            self._take_open(frame)
        elif frame.type is Type.DATAGRAM:
            self._datagrams.take(mux.decode_datagram(frame))
        elif frame.type is Type.REFUSED:
            self._take_refused(mux.decode_refused(frame))
        elif frame.type is Type.OPENED:
            self._take_opened(frame.id, mux.decode_u32(frame))
        elif frame.id in self._flows:
            self._flows[frame.id].take(frame)
        elif frame.id in self._dialing and frame.type is Type.RESET:
            self._dialing.pop(frame.id).cancel()

    def _take_refused(self, refused: mux.Refused) -> None:
        names = [service.value for service in Service]
        service = names[refused.service] if refused.service < len(names) else "unknown"
        call = syscall_name(refused.syscall)
        argument = VIEW_FILES.get(refused.argument, "") if (service, call) == VIEW_OPENED else str(refused.argument)
        answerer = self.policy.of(Service(service)).value if service in names else "deny"
        self.account.refused(Refusal(service, refused.pid, call, argument, f"{service}: {answerer}"), self._loop.time())

    def _take_open(self, frame: Frame) -> None:
        wish = mux.decode_open(frame)
        slot = frame.id % mux.MAX_FLOWS
        if slot >= mux.HOST_FLOWS or frame.id in self._flows or frame.id in self._dialing:
            raise ProtocolError(f"OPEN of flow {frame.id}, which is not free to open")
        verdict = self.reach.verdict(Transport.TCP, wish.to.address, wish.to.port, self._loop.time())
        if not verdict.allowed:
            call = syscall_name(wish.syscall)
            refusal = Refusal("sockets", wish.pid, call, f"tcp {wish.to}", verdict.rule)
            self.account.refused(refusal, self._loop.time())
            self.send(mux.encode_u32(Type.OPENED, frame.id, errno.EACCES))
        elif len(self._dialing) >= MAX_DIALING:
            self.send(mux.encode_u32(Type.OPENED, frame.id, errno.ENOBUFS))
        else:
            self.account.decided("sockets", allowed=True)
            self._dialing[frame.id] = self._tasks.spawn(self._dial(frame.id, wish.to), f"dial {wish.to}")

    async def _dial(self, flow_id: int, to: Endpoint) -> None:
        flow = Flow(self, flow_id, lambda flow: None)
        try:
            async with asyncio.timeout(DIAL_DEADLINE_S):
                await self._loop.create_connection(lambda: flow, host_side(to.address), to.port)
        except (OSError, TimeoutError) as error:
            failed = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EHOSTUNREACH
            self.send(mux.encode_u32(Type.OPENED, flow_id, failed))
            return
        finally:
            self._dialing.pop(flow_id, None)
        if self.lost.done():
            flow.abort()
            return
        if not self._may_stay(to):  # the rules have changed meanwhile
            flow.abort()
            self.account.cut("sockets")
            self.send(mux.encode_u32(Type.OPENED, flow_id, errno.EACCES))
            return
        flow.to = to
        self.account.connections += 1
        self._flows[flow_id] = flow
        self.send(mux.encode_u32(Type.OPENED, flow_id, 0))
        flow.open(port_full=self._full)

    # Published ports.

    def _client(self, port: Publish) -> Flow:
        return Flow(self, self._new_id(), lambda flow: self._join(flow, port))

    def _new_id(self) -> int:
        taken = {flow_id % mux.MAX_FLOWS for flow_id in (*self._flows, *self._joining)}
        for _ in range(mux.MAX_FLOWS - mux.HOST_FLOWS):
            slot, self._next_slot = self._next_slot, self._next_slot + 1
            if self._next_slot == mux.MAX_FLOWS:
                self._next_slot = mux.HOST_FLOWS
            if slot not in taken:
                self._serial = (self._serial + 1) % (1 << 20)
                return self._serial << 12 | slot
        return 0  # not of the host's half: the client is turned away in _join

    def _join(self, flow: Flow, port: Publish) -> None:
        transport = flow.transport
        peer = transport.get_extra_info("peername")
        serves = self._transport is not None and self._reader.synced and self._may_stay(None)
        if flow.id == 0 or peer is None or not serves:
            flow.abort()
            return
        self._joining[flow.id] = flow
        client = Endpoint(sandbox_side(mux.address(peer[0])), peer[1])
        self.send(mux.encode_incoming(flow.id, port.port, client))
        self._loop.call_later(JOIN_DEADLINE_S, self._give_up, flow.id)

    def _give_up(self, flow_id: int) -> None:
        flow = self._joining.pop(flow_id, None)
        if flow is not None:
            self.send(mux.encode(Type.RESET, flow_id))
            flow.abort()

    def _take_opened(self, flow_id: int, error: int) -> None:
        flow = self._joining.pop(flow_id, None)
        if flow is None:
            raise ProtocolError(f"OPENED of flow {flow_id}, which nobody asked for")
        if error:
            flow.abort()
            return
        self.account.connections += 1
        self._flows[flow_id] = flow
        flow.open(port_full=self._full)

    def ended(self, flow: Flow) -> None:
        """See Port.ended."""
        self._flows.pop(flow.id, None)
        self._joining.pop(flow.id, None)


def services_of(policy: ServicePolicy, nonce: bytes) -> Services:
    """The policy as the agent takes it."""
    return Services(answerers_of(policy), nonce)


def needed(policy: ServicePolicy) -> bool:
    """Whether a sandbox with this policy needs its services port served."""
    return any(answerer is not Answerer.KERNEL for _, answerer in policy.answered)
