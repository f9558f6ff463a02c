"""The ways a fake agent breaks the contract: each turns what an honest agent says into what this one says."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from enum import Enum, auto

from guestagent.frames import HEADER, encode_frame
from guestagent.messages import Kind, Stream


class Misbehaviour(Enum):
    """How the fake breaks the contract."""

    NONE = auto()
    SILENT = auto()  # reads, writes nothing
    DRIBBLE = auto()  # writes one byte a call: the rest comes by `FakeAgent.more` (no breach, only slow)
    GARBLE = auto()  # writes bytes that are no frame
    BAD_CRC = auto()  # whole frames, wrong CRC
    OVERSIZE = auto()  # a header that claims 4 GiB
    DEEP_NESTING = auto()  # 1,000 arrays in one another
    HUGE_COUNT = auto()  # an array that claims 2^32 - 1 entries
    WRONG_ID = auto()  # a reply to a request nobody made
    FLOOD_EVENTS = auto()  # 1,000 EVENTs with each answer (counted and dropped, no breach)
    FLOOD_OUTPUT = auto()  # output that does not stop at the window
    WRONG_OFFSET = auto()  # output that skips bytes
    UNKNOWN_PROC = auto()  # output of a process nobody started
    NOISE = auto()  # 64 KiB of noise in place of each answer, so that SYNC is never answered


_PLAIN = (Misbehaviour.NONE, Misbehaviour.DRIBBLE, Misbehaviour.FLOOD_OUTPUT)


def _framed(payload: bytes) -> bytes:
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def spoil(misbehaviour: Misbehaviour, said: bytes, proc: int) -> bytes:
    """What goes out in place of `said`. `proc` is a process of the host's, for those that lie about one.

    NONE, DRIBBLE and FLOOD_OUTPUT leave it as it is: they show elsewhere.
    """
    if misbehaviour in _PLAIN or not said:
        return said
    spoilt: dict[Misbehaviour, Callable[[], bytes]] = {
        Misbehaviour.SILENT: lambda: b"",
        Misbehaviour.GARBLE: lambda: bytes(byte ^ 0xFF for byte in said),
        Misbehaviour.BAD_CRC: lambda: HEADER.pack(3, 0xDEADBEEF) + b"\x93\x01\x02",
        Misbehaviour.OVERSIZE: lambda: struct.pack(">II", 0xFFFFFFFF, 0) + said,
        Misbehaviour.DEEP_NESTING: lambda: _framed(b"\x91" * 1000 + b"\x90"),
        Misbehaviour.HUGE_COUNT: lambda: _framed(b"\xdd\xff\xff\xff\xff"),
        Misbehaviour.WRONG_ID: lambda: encode_frame([Kind.REPLY, 0x7FFFFFFF, 0, None]),
        Misbehaviour.FLOOD_EVENTS: lambda: said + encode_frame([Kind.EVENT, 0, "oom_kill", {"n": 1}]) * 1000,
        Misbehaviour.WRONG_OFFSET: lambda: said + _output(proc, 2**40),
        Misbehaviour.UNKNOWN_PROC: lambda: said + _output(0xFFFFFFFF, 0),
        Misbehaviour.NOISE: lambda: b"\xa5" * 65536,
    }
    return spoilt[misbehaviour]()


def _output(proc: int, offset: int) -> bytes:
    return encode_frame([Kind.OUTPUT, 0, proc, Stream.STDOUT, offset, b"surprise"])
