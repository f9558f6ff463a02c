"""Frames on the byte stream between host and agent, and finding their start again.

Layout (PROTOCOL.md): `u32 BE length (1 … 131072) | u32 BE CRC-32 | payload: one msgpack array`; SYNC is
`SLSYNC\\x00\\x01` + 8 nonce bytes, its answer `SLSYNA\\x00\\x01` + the same nonce.

Promise: pure and incremental. Work is linear in the bytes fed however they are cut; memory is at most one
frame; a length is checked before anything of that length is held; nesting and counts are checked on the
encoded bytes, before msgpack makes any object of them. Every breach is a ProtocolError that names it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgpack

from guestagent.errors import BadRequest, ProtocolError

SYNC_MAGIC = b"SLSYNC\x00\x01"
ANSWER_MAGIC = b"SLSYNA\x00\x01"
NONCE_BYTES = 8
SYNC_BYTES = 16
HEADER = struct.Struct(">II")
MAX_PAYLOAD_BYTES = 131072
# Enough copies to fill the longest frame the agent may be inside of, and one more to be found after it.
SYNC_COPIES = (MAX_PAYLOAD_BYTES + HEADER.size + 8 + SYNC_BYTES) // SYNC_BYTES


@dataclass(frozen=True)
class Limits:
    """What the host takes from a guest. The defaults are the contract's; only tests should need others.

    `max_nodes` bounds the msgpack objects of one frame (a frame of one-byte objects would be 128 Ki of them).
    `max_text_chars` cuts every guest string. Events beyond `event_rate_per_s` (bursts of `event_burst`) are
    counted and dropped. `max_outstanding` bounds the requests without a reply.
    """

    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    max_depth: int = 6
    max_entries: int = 4096
    max_nodes: int = 32768
    window_bytes: int = 65536
    max_output_bytes: int = 32768
    max_sync_discard_bytes: int = 4 << 20
    max_text_chars: int = 512
    event_rate_per_s: float = 10.0
    event_burst: int = 50
    max_outstanding: int = 256


def sync_flush(nonce: bytes) -> bytes:
    """The host's opening: 8194 copies of SYNC, which end any frame the agent may be inside of."""
    if len(nonce) != NONCE_BYTES:
        raise BadRequest(f"the session's nonce must be {NONCE_BYTES} bytes, not {len(nonce)}")
    return (SYNC_MAGIC + nonce) * SYNC_COPIES


def encode_frame(message: list[object]) -> bytes:
    """One message as a whole frame. BadRequest when it cannot be said, or is longer than a frame may be."""
    try:
        payload: bytes = msgpack.packb(message, use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"message of kind {message[0]} cannot be encoded: {error}") from error
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise BadRequest(f"message of kind {message[0]} takes {len(payload)} bytes, a frame holds {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


class SyncHunter:
    """Throws bytes away until the answer to this session's SYNC, at most `max_discard_bytes` of them."""

    def __init__(self, nonce: bytes, max_discard_bytes: int) -> None:
        self._answer = ANSWER_MAGIC + nonce
        self._max_discard_bytes = max_discard_bytes
        self._tail = b""
        self.discarded_bytes = 0

    def feed(self, data: bytes) -> bytes | None:
        """What follows the answer, or None while it has not come."""
        window = self._tail + data
        found = window.find(self._answer)
        keep = min(len(window), len(self._answer) - 1)
        self.discarded_bytes += found if found >= 0 else len(window) - keep
        if self.discarded_bytes > self._max_discard_bytes:
            raise ProtocolError(f"no answer to SYNC within {self._max_discard_bytes} bytes")
        if found < 0:
            self._tail = window[len(window) - keep :]
            return None
        self._tail = b""
        return window[found + len(self._answer) :]


class FrameReader:
    """Cuts a byte stream into payloads whose length and CRC are right. Holds at most one partial frame."""

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._partial = bytearray()
        self._header: tuple[int, int] | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of an unfinished frame held now (its header, once read, not among them)."""
        return len(self._partial)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields each payload that `data` completes. Use it to its end; after a ProtocolError, not again."""
        view = memoryview(data)
        position = 0
        while True:
            need = (self._header[0] if self._header else HEADER.size) - len(self._partial)
            self._partial += view[position : position + need]
            if len(view) - position < need:
                return
            position += need
            block = bytes(self._partial)
            self._partial.clear()
            if self._header is None:
                self._header = self._checked_header(block)
                continue
            crc = self._header[1]
            self._header = None
            if zlib.crc32(block) != crc:
                raise ProtocolError(f"frame of {len(block)} bytes fails its CRC")
            yield block

    def _checked_header(self, block: bytes) -> tuple[int, int]:
        length, crc = HEADER.unpack(block)
        if not 1 <= length <= self._max_payload_bytes:
            raise ProtocolError(f"frame length {length} is outside 1 … {self._max_payload_bytes}")
        return length, crc


# The msgpack tags (https://github.com/msgpack/msgpack/blob/master/spec.md) by how to step over them.
_SCALARS = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SCALARS |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_BLOBS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}


def check_shape(payload: bytes, limits: Limits) -> None:
    """ProtocolError unless `payload` is one whole msgpack value within the limits on depth and counts.

    Looks at tags only, so a small payload cannot first be blown up into many or large objects: msgpack's own
    limits count neither depth (below its 1,024) nor the sum, and it makes a list at its claimed length.
    """
    position, end, nodes = 0, len(payload), 0
    open_counts = [1]  # values still to come, per open container; the first is the top level
    while open_counts:
        if open_counts[-1] == 0:
            open_counts.pop()
            continue
        open_counts[-1] -= 1
        nodes += 1
        if nodes > limits.max_nodes:
            raise ProtocolError(f"more than {limits.max_nodes} values in one frame")
        if position >= end:
            raise ProtocolError("msgpack value is cut short")
        position, children = _step(payload, position, limits)
        if children is None:
            continue
        if len(open_counts) > limits.max_depth:
            raise ProtocolError(f"msgpack nested deeper than {limits.max_depth}")
        if children > end - position:
            raise ProtocolError("msgpack container is longer than its frame")
        open_counts.append(children)
    if position != end:
        raise ProtocolError("msgpack value and frame differ in length")


def _step(payload: bytes, position: int, limits: Limits) -> tuple[int, int | None]:
    """Past one tag (and a scalar's bytes): the next position, and the children of a container or None."""
    tag = payload[position]
    position += 1
    if tag < 0x80 or tag >= 0xE0:
        return position, None
    if tag < 0x90:
        return position, 2 * (tag & 0x0F)
    if tag < 0xA0:
        return position, tag & 0x0F
    if tag < 0xC0:
        return position + (tag & 0x1F), None
    if tag in _SCALARS:
        return position + _SCALARS[tag], None
    width = _BLOBS.get(tag) or _ARRAYS.get(tag) or _MAPS.get(tag)
    if width is None:
        raise ProtocolError(f"msgpack tag 0x{tag:02x} is not in the protocol")
    count = int.from_bytes(payload[position : position + width], "big")
    position += width
    if tag in _BLOBS:
        return position + count, None
    if count > limits.max_entries:
        raise ProtocolError(f"msgpack container of {count} entries, at most {limits.max_entries}")
    return position, count * (2 if tag in _MAPS else 1)


def decode_payload(payload: bytes, limits: Limits) -> list[object]:
    """The array a payload holds, within the limits. Text that is not UTF-8 has its bad bytes replaced."""
    check_shape(payload, limits)
    try:
        message = msgpack.unpackb(
            payload, raw=False, unicode_errors="replace", strict_map_key=True,
            max_array_len=limits.max_entries, max_map_len=limits.max_entries, max_ext_len=0,
        )  # fmt: skip
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError(f"payload is not msgpack: {type(error).__name__}") from error
    if not isinstance(message, list):
        raise ProtocolError(f"payload is a {type(message).__name__}, not an array")
    return message
