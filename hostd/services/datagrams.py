"""UDP of a sandbox: one socket of the host for each port that it sends from, published ports, and its resolver.

A reply is passed on only from where the sandbox has sent something to; to a published port everybody may send. What a
guest can make this hold is bounded: sockets, peers of a socket, questions under way; the oldest goes first.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import OrderedDict
from collections.abc import Callable

from controlplane.api.services import (
    GATEWAY,
    GATEWAY_V6,
    SANDBOX,
    SANDBOX_V6,
    Answerer,
    IPAddress,
    Publish,
    Service,
    Transport,
)
from guestagent import mux
from guestagent.mux import Datagram, Endpoint
from hostd.services import dns
from hostd.services.account import Account, Refusal
from hostd.services.reach import Reach, host_side, sandbox_side
from hostd.tasks import OwnedTasks

MAX_SOCKETS, MAX_PEERS, MAX_QUESTIONS = 256, 256, 64
RESOLVE_DEADLINE_S = 10.0
READS_AT_ONCE = 64
DATAGRAM_BYTES = 65535
DNS_PORT = 53


class UdpSocket:
    """A socket of the host's for one endpoint of the sandbox. `peers`: whom it knows, as the sandbox sees them."""

    def __init__(self, handle: socket.socket, inside: Endpoint, *, published: bool) -> None:
        self.handle, self.inside, self.published = handle, inside, published
        self.peers: OrderedDict[Endpoint, tuple[str, int]] = OrderedDict()

    def know(self, peer: Endpoint, outside: tuple[str, int]) -> None:
        """`peer` may be answered, and may answer."""
        self.peers[peer] = outside
        self.peers.move_to_end(peer)
        if len(self.peers) > MAX_PEERS:
            self.peers.popitem(last=False)


class Datagrams:
    """All of a sandbox's UDP. `send` has a datagram delivered to it."""

    def __init__(self, reach: Reach, account: Account, send: Callable[[Datagram], None], tasks: OwnedTasks) -> None:
        self._reach, self._account, self._send, self._tasks = reach, account, send, tasks
        self._loop = asyncio.get_running_loop()
        self._sockets: OrderedDict[Endpoint, UdpSocket] = OrderedDict()
        self._published: dict[Endpoint, UdpSocket] = {}
        self._questions = 0

    def publish(self, port: Publish) -> Publish:
        """Listens for a port of the sandbox. OSError."""
        family = socket.AF_INET6 if ":" in port.host_address else socket.AF_INET
        handle = socket.socket(family, socket.SOCK_DGRAM)
        try:
            handle.setblocking(False)
            handle.bind((port.host_address, port.host_port))
        except OSError:
            handle.close()
            raise
        inside = Endpoint(mux.address(SANDBOX_V6 if family == socket.AF_INET6 else SANDBOX), port.port)
        self._published[inside] = self._watched(UdpSocket(handle, inside, published=True))
        return Publish(handle.getsockname()[1], port.port, port.transport, port.host_address)

    def recheck(self) -> None:
        """Other rules hold: who is not allowed by them any more may not answer either."""
        for one in [*self._sockets.values(), *self._published.values()]:
            for peer in list(one.peers):
                if not self._may_stay(one, peer):
                    del one.peers[peer]

    def _may_stay(self, one: UdpSocket, peer: Endpoint) -> bool:
        if one.published:
            return self._reach.policy.now(Service.SOCKETS) is Answerer.TOOL
        return self._reach.verdict(Transport.UDP, peer.address, peer.port, self._loop.time()).allowed

    def close(self) -> None:
        """Closes every socket. Idempotent."""
        for one in [*self._sockets.values(), *self._published.values()]:
            self._forget(one)
        self._sockets.clear()
        self._published.clear()

    def _watched(self, one: UdpSocket) -> UdpSocket:
        self._loop.add_reader(one.handle.fileno(), self._receive, one)
        return one

    def _forget(self, one: UdpSocket) -> None:
        self._loop.remove_reader(one.handle.fileno())
        one.handle.close()

    def take(self, datagram: Datagram) -> None:
        """The sandbox sent it."""
        to = datagram.to
        if self._reach.policy.dns is Answerer.TOOL and to.port == DNS_PORT and str(to.address) in (GATEWAY, GATEWAY_V6):
            self._ask(datagram)
            return
        published = self._published.get(datagram.source)
        if published is not None and to in published.peers:
            self._out(published, datagram)
            return
        verdict = self._reach.verdict(Transport.UDP, to.address, to.port, self._loop.time())
        if not verdict.allowed:
            self._account.refused(Refusal("sockets", 0, "sendto", f"udp {to}", verdict.rule), self._loop.time())
            return
        self._account.decided("sockets", allowed=True)
        one = self._socket_of(datagram.source)
        one.know(to, (host_side(to.address), to.port))
        self._out(one, datagram)

    def _socket_of(self, source: Endpoint) -> UdpSocket:
        one = self._sockets.get(source)
        if one is None:
            handle = socket.socket(
                socket.AF_INET6 if source.address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM
            )
            handle.setblocking(False)
            one = self._sockets[source] = self._watched(UdpSocket(handle, source, published=False))
            if len(self._sockets) > MAX_SOCKETS:
                self._forget(self._sockets.popitem(last=False)[1])
        self._sockets.move_to_end(source)
        return one

    def _out(self, one: UdpSocket, datagram: Datagram) -> None:
        try:
            one.handle.sendto(datagram.data, one.peers[datagram.to])
        except OSError:
            return  # lost, as on any network
        self._account.datagrams += 1
        self._account.bytes_out += len(datagram.data)

    def _receive(self, one: UdpSocket) -> None:
        for _ in range(READS_AT_ONCE):
            try:
                data, sender = one.handle.recvfrom(DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    continue
                return
            peer = Endpoint(sandbox_side(mux.address(sender[0])), sender[1])
            if one.published and self._reach.policy.now(Service.SOCKETS) is Answerer.TOOL:
                one.know(peer, sender[:2])
            elif peer not in one.peers:
                continue
            self._in(Datagram(peer, one.inside, data))

    def _in(self, datagram: Datagram) -> None:
        if len(datagram.data) > mux.MOST_BYTES - 2 * mux.ENDPOINT_BYTES:
            return
        self._account.datagrams += 1
        self._account.bytes_in += len(datagram.data)
        self._send(datagram)

    # The resolver.

    def _ask(self, datagram: Datagram) -> None:
        question = dns.parse(datagram.data)
        if question is None or self._questions >= MAX_QUESTIONS:
            return
        code = dns.understood(question)
        if code == dns.NO_ERROR:
            verdict = self._reach.may_resolve(question.name)
            if verdict.allowed:
                self._account.decided("dns", allowed=True)
                self._questions += 1
                self._tasks.spawn(self._resolve(datagram, question), f"resolve {question.name}")
                return
            refusal = Refusal("dns", 0, "sendto", question.name, verdict.rule)
            self._account.refused(refusal, self._loop.time())
            code = dns.REFUSED
        self._reply(datagram, dns.answer(question, code, []))

    async def _resolve(self, datagram: Datagram, question: dns.Question) -> None:
        addresses: list[IPAddress] = []
        code = dns.NO_ERROR
        try:
            async with asyncio.timeout(RESOLVE_DEADLINE_S):
                found = await self._loop.getaddrinfo(question.name, None, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(mux.address(str(one[4][0])) for one in found))
        except (socket.gaierror, UnicodeError) as error:
            unknown = isinstance(error, UnicodeError) or error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
            code = dns.NAME_ERROR if unknown else dns.SERVER_FAILURE
        except (OSError, TimeoutError):
            code = dns.SERVER_FAILURE
        finally:
            self._questions -= 1
        fit = self._reach.learn(question.name, addresses, self._loop.time())
        self._reply(datagram, dns.answer(question, code, fit))

    def _reply(self, datagram: Datagram, message: bytes) -> None:
        self._in(Datagram(datagram.to, datagram.source, message))
