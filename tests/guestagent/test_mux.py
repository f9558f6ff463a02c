"""The services port's frames: what is said comes out as it was said, and a guest's nonsense is a breach."""

from __future__ import annotations

import random

import pytest

from guestagent import mux
from guestagent.errors import ProtocolError
from guestagent.mux import Datagram, Endpoint, Frame, FrameReader, Type

NONCE = bytes(range(16))
V4, V6 = Endpoint(mux.address("10.1.2.3"), 443), Endpoint(mux.address("2001:db8::1"), 53)


@pytest.mark.parametrize("cut", [1, 7, 64, 100_000])
def test_frames_survive_any_cutting(cut: int) -> None:
    frames = [Frame(Type.DATA, 7, b"x" * size) for size in (0, 1, 100, 65536)] + [Frame(Type.EOF, 7, b"")]
    wire = b"noise" + NONCE[:9] + NONCE + b"".join(mux.encode(one.type, one.id, one.data) for one in frames)
    reader, found = FrameReader(NONCE), list[Frame]()
    for at in range(0, len(wire), cut):
        found += reader.feed(wire[at : at + cut])
    assert found == frames


def test_values_come_out_as_they_went_in() -> None:
    datagram = Datagram(V4, V4, b"hello")
    (frame,) = FrameReader(NONCE).feed(NONCE + mux.encode_datagram(datagram))
    assert mux.decode_datagram(frame) == datagram
    assert Endpoint.decode(V6.encode()) == V6
    (credit,) = FrameReader(NONCE).feed(NONCE + mux.encode_u32(Type.CREDIT, 3, 70000))
    assert mux.decode_u32(credit) == 70000
    wish = mux.decode_open(Frame(Type.OPEN, 1, b"\0\0\0\x09\0\0\0\x2a" + V6.encode()))
    assert (wish.pid, wish.syscall, wish.to) == (9, 42, V6)


def test_a_mapped_address_is_what_it_reaches() -> None:
    assert str(mux.address("::ffff:127.0.0.1")) == "127.0.0.1"
    assert str(mux.address("fe80::1%eth0")) == "fe80::1"


@pytest.mark.parametrize(
    "wire",
    [
        mux.HEADER.pack(65537, Type.DATA, 1), mux.HEADER.pack(0, 99, 1), mux.HEADER.pack(0, 0, 1),
        mux.HEADER.pack(0, Type.INCOMING, 1),
    ],
)  # fmt: skip
def test_what_an_agent_never_says_is_a_breach(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameReader(NONCE).feed(NONCE + wire)


def test_a_guest_that_never_begins_is_not_listened_to_for_ever() -> None:
    reader = FrameReader(NONCE)
    with pytest.raises(ProtocolError, match="does not begin"):
        for _ in range(100):
            reader.feed(b"\0" * 65536)


def test_hostile_bytes_give_frames_or_a_breach() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        wire = bytearray(mux.encode(rng.choice(list(Type)), rng.randrange(1 << 32), rng.randbytes(rng.randrange(60))))
        for _change in range(rng.randrange(4)):
            wire[rng.randrange(len(wire))] = rng.choice([0, rng.randrange(256)])
        try:
            frames = FrameReader(NONCE).feed(NONCE + bytes(wire))
            for frame in frames:
                {Type.OPEN: mux.decode_open, Type.DATAGRAM: mux.decode_datagram, Type.REFUSED: mux.decode_refused}.get(
                    frame.type, mux.decode_u32
                )(frame)
        except ProtocolError:
            continue
