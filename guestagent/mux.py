"""Frames on the services port, sans-I/O: what the agent and the host's tools say to each other (PROTOCOL.md).

    u32 BE size of payload (0 … 65536) | u8 type | 3 zero bytes | u32 BE id | payload

A session begins, in both directions, with the nonce that SERVICES told the agent; what is before it in the stream
belongs to another session. Every byte from a guest is hostile: a breach is a ProtocolError, and memory is bounded by
one frame and what was fed.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum

from guestagent.errors import ProtocolError

HEADER = struct.Struct("!IB3xI")
HEADER_BYTES, MOST_BYTES, NONCE_BYTES, ENDPOINT_BYTES = 12, 65536, 16, 20
WINDOW_BYTES = 262144
"""Of a flow, in each direction: what was sent and not consumed."""

MAX_FLOWS, HOST_FLOWS = 4096, 2048
"""A flow's slot is the low 12 bits of its id: those below HOST_FLOWS the agent gives, the others the host."""

MAX_DISCARD_BYTES = 4 << 20
_ENDPOINT = struct.Struct("!BBH16s")
_OPEN = struct.Struct("!II20s")
_REFUSED = struct.Struct("!IIIQ")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def address(text: str) -> IPAddress:
    """What the kernel says of a peer, without a link's zone; an IPv4 address mapped into IPv6 is the IPv4 one."""
    found = ipaddress.ip_address(text.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


class Type(IntEnum):
    """What a frame is."""

    OPENED = 1
    INCOMING = 2
    OPEN = 3
    DATA = 4
    EOF = 5
    RESET = 6
    CREDIT = 7
    DATAGRAM = 8
    REFUSED = 9


_FROM_AGENT = {Type.OPENED, Type.OPEN, Type.DATA, Type.EOF, Type.RESET, Type.CREDIT, Type.DATAGRAM, Type.REFUSED}


@dataclass(frozen=True)
class Endpoint:
    """An address and a port."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"

    def encode(self) -> bytes:
        """ENDPOINT_BYTES."""
        return _ENDPOINT.pack(self.address.version, 0, self.port, self.address.packed)

    @classmethod
    def decode(cls, data: bytes) -> Endpoint:
        """ProtocolError when it is none."""
        family, zero, port, packed = _ENDPOINT.unpack(data)
        if family not in (4, 6) or zero:
            raise ProtocolError(f"an endpoint of family {family}")
        return cls(ipaddress.ip_address(packed[: 4 if family == 4 else 16]), port)


@dataclass(frozen=True)
class Frame:
    """A frame as it came."""

    type: Type
    id: int
    data: bytes


@dataclass(frozen=True)
class OpenWish:
    """A process of the sandbox wants to be connected. The pid is as the guest's agent sees it, and its claim."""

    pid: int
    syscall: int
    to: Endpoint


@dataclass(frozen=True)
class Refused:
    """The agent refused a call of the sandbox by itself."""

    service: int
    pid: int
    syscall: int
    argument: int


@dataclass(frozen=True)
class Datagram:
    """One UDP datagram."""

    source: Endpoint
    to: Endpoint
    data: bytes


def encode(kind: Type, flow_id: int, data: bytes = b"") -> bytes:
    """A frame; at most MOST_BYTES of data."""
    return HEADER.pack(len(data), kind, flow_id) + data


def encode_u32(kind: Type, flow_id: int, value: int) -> bytes:
    """OPENED (an errno, or 0) and CREDIT (bytes)."""
    return encode(kind, flow_id, value.to_bytes(4, "big"))


def encode_incoming(flow_id: int, port: int, client: Endpoint) -> bytes:
    """A client of the host's wants to reach `port` of the sandbox."""
    return encode(Type.INCOMING, flow_id, struct.pack("!HH", port, 0) + client.encode())


def encode_datagram(datagram: Datagram) -> bytes:
    """A datagram for the sandbox."""
    return encode(Type.DATAGRAM, 0, datagram.source.encode() + datagram.to.encode() + datagram.data)


def decode_u32(frame: Frame) -> int:
    """Of OPENED and CREDIT. ProtocolError."""
    if len(frame.data) != 4:
        raise ProtocolError(f"{frame.type.name} of {len(frame.data)} bytes, not 4")
    return int.from_bytes(frame.data, "big")


def decode_open(frame: Frame) -> OpenWish:
    """Of OPEN. ProtocolError."""
    if len(frame.data) != _OPEN.size:
        raise ProtocolError(f"OPEN of {len(frame.data)} bytes, not {_OPEN.size}")
    pid, syscall, endpoint = _OPEN.unpack(frame.data)
    return OpenWish(pid, syscall, Endpoint.decode(endpoint))


def decode_datagram(frame: Frame) -> Datagram:
    """Of DATAGRAM. ProtocolError."""
    if len(frame.data) < 2 * ENDPOINT_BYTES:
        raise ProtocolError(f"DATAGRAM of {len(frame.data)} bytes")
    source, to = frame.data[:ENDPOINT_BYTES], frame.data[ENDPOINT_BYTES : 2 * ENDPOINT_BYTES]
    return Datagram(Endpoint.decode(source), Endpoint.decode(to), frame.data[2 * ENDPOINT_BYTES :])


def decode_refused(frame: Frame) -> Refused:
    """Of REFUSED. ProtocolError."""
    if len(frame.data) != _REFUSED.size:
        raise ProtocolError(f"REFUSED of {len(frame.data)} bytes, not {_REFUSED.size}")
    return Refused(*_REFUSED.unpack(frame.data))


class FrameReader:
    """Cuts a guest's bytes into frames, after `nonce`."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce, self._buffer, self._discarded, self.synced = nonce, bytearray(), 0, False

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. ProtocolError at a breach."""
        buffer = self._buffer
        buffer += data
        if not self.synced and not self._hunt():
            return []
        frames, at, end = [], 0, len(buffer)
        while end - at >= HEADER_BYTES:
            size, kind, flow_id = HEADER.unpack_from(buffer, at)
            if size > MOST_BYTES or kind not in _FROM_AGENT:
                raise ProtocolError(f"a frame of type {kind} and {size} bytes on the services port")
            if end - at < HEADER_BYTES + size:
                break
            start = at + HEADER_BYTES
            at = start + size
            frames.append(Frame(Type(kind), flow_id, bytes(buffer[start:at])))
        del buffer[:at]
        return frames

    def _hunt(self) -> bool:
        found = self._buffer.find(self._nonce)
        self.synced = found >= 0
        gone = found + NONCE_BYTES if self.synced else max(0, len(self._buffer) - NONCE_BYTES + 1)
        self._discarded += gone
        if self._discarded > MAX_DISCARD_BYTES:
            raise ProtocolError("the guest does not begin the session on its services port")
        del self._buffer[:gone]
        return self.synced
