"""TCP connections between a sandbox and the world: one Flow each, with credit in both directions.

What a flow holds is bounded: by WINDOW_BYTES for what the guest may send before it is told that the peer took it, and
by the same for what came from the peer and the guest did not take; beyond that the peer is not read.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from guestagent import mux
from guestagent.errors import ProtocolError
from guestagent.mux import Frame, Type
from hostd.services.account import Account

CHUNK_BYTES = 32768 - mux.HEADER_BYTES
"""A frame that the guest's port takes in one piece (drivers/char/virtio_console.c copies 32 KiB at most)."""

TELL_BYTES = mux.WINDOW_BYTES // 4


class Port(Protocol):
    """Where frames go."""

    account: Account

    def send(self, frame: bytes) -> None:
        """Queues it."""
        ...

    def ended(self, flow: Flow) -> None:
        """Both ends are done with it."""
        ...


class Flow(asyncio.Protocol):
    """One connection. `begun` is called once the peer is there; before that, and while the port is full, it is not
    read."""

    def __init__(self, port: Port, flow_id: int, begun: Callable[[Flow], None]) -> None:
        self.id, self._port, self._begun = flow_id, port, begun
        self.to: mux.Endpoint | None = None  # whom the sandbox asked for; None: a client of a published port
        self._transport: asyncio.Transport | None = None
        self._credit, self._owed = mux.WINDOW_BYTES, 0
        self._waiting = bytearray()
        self._peer_ended = self._end_told = self._guest_ended = self._over = False
        self._port_full = self._peer_full = False
        self._opened = self._reading = False

    @property
    def transport(self) -> asyncio.Transport:
        """The peer's, once it is there."""
        assert self._transport is not None
        return self._transport

    # The peer.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.pause_reading()
        transport.set_write_buffer_limits(high=mux.WINDOW_BYTES)
        handle = transport.get_extra_info("socket")
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._over:
            transport.abort()
        else:
            self._begun(self)

    def open(self, *, port_full: bool) -> None:
        """The sandbox has its end: bytes may flow."""
        self._opened, self._port_full = True, port_full
        self._settle()

    def data_received(self, data: bytes) -> None:
        """The peer said something."""
        if self._waiting or not self._credit or self._port_full:
            self._waiting += data
        else:
            sent = self._forward(data)
            self._waiting += data[sent:]
        self._settle()

    def eof_received(self) -> bool:
        """The peer has said all; it may still listen."""
        self._peer_ended = True
        self._settle()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        if not self._over and (exc is not None or not (self._end_told and self._guest_ended)):
            self._port.send(mux.encode(Type.RESET, self.id))
        self._finish()

    def pause_writing(self) -> None:
        """The peer takes less than the guest sends: no new credit."""
        self._peer_full = True

    def resume_writing(self) -> None:
        """It takes more again."""
        self._peer_full = False
        self._tell_consumed()

    # The guest.

    def take(self, frame: Frame) -> None:
        """What the guest says of it. ProtocolError at a breach."""
        if frame.type is Type.DATA:
            self._take_data(frame.data)
        elif frame.type is Type.EOF:
            self._guest_ended = True
            if self._transport is not None and not self._transport.is_closing():
                self._transport.write_eof()
            self._close_when_done()
        elif frame.type is Type.CREDIT:
            self._credit += mux.decode_u32(frame)
            if self._credit > mux.WINDOW_BYTES:
                raise ProtocolError(f"flow {self.id}: credit for {self._credit} bytes")
            self._settle()
        else:
            self.abort()

    def _take_data(self, data: bytes) -> None:
        if self._guest_ended or self._transport is None:
            raise ProtocolError(f"flow {self.id}: data where none can be")
        self._owed += len(data)
        if self._transport.get_write_buffer_size() + len(data) > 2 * mux.WINDOW_BYTES or self._owed > mux.WINDOW_BYTES:
            raise ProtocolError(f"flow {self.id}: more data than its window")
        self._port.account.bytes_out += len(data)
        if not self._transport.is_closing():
            self._transport.write(data)
        if self._owed >= TELL_BYTES and not self._peer_full:
            self._tell_consumed()

    def _tell_consumed(self) -> None:
        if self._owed and not self._over:
            self._port.send(mux.encode_u32(Type.CREDIT, self.id, self._owed))
            self._owed = 0

    # Both.

    def port_full(self, full: bool) -> None:
        """Whether the port takes no more."""
        self._port_full = full
        self._settle()

    def _forward(self, data: bytes | bytearray) -> int:
        """Sends as much of `data` as there is credit for."""
        size, at = min(len(data), self._credit), 0
        while at < size:
            piece = bytes(data[at : min(at + CHUNK_BYTES, size)])
            self._port.send(mux.encode(Type.DATA, self.id, piece))
            at += len(piece)
        self._credit -= size
        self._port.account.bytes_in += size
        return size

    def _settle(self) -> None:
        if not self._opened or self._over or self._transport is None:
            return
        if self._waiting and self._credit and not self._port_full:
            del self._waiting[: self._forward(self._waiting)]
        wanted = not self._waiting and self._credit > 0 and not self._port_full and not self._peer_ended
        if wanted is not self._reading:
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            elif not self._peer_ended:
                self._transport.pause_reading()
        if self._peer_ended and not self._waiting and not self._end_told:
            self._end_told = True
            self._port.send(mux.encode(Type.EOF, self.id))
        self._close_when_done()

    def _close_when_done(self) -> None:
        if self._end_told and self._guest_ended and self._transport is not None and not self._over:
            self._transport.close()  # what is written still goes out
            self._finish()

    def abort(self) -> None:
        """Ends it at once, the peer by a reset."""
        if self._transport is not None:
            handle = self._transport.get_extra_info("socket")
            if handle is not None and handle.fileno() >= 0:
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self._transport.abort()
        self._finish()

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._waiting.clear()
            self._port.ended(self)
