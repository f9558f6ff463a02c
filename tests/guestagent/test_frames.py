"""Frames: cut anywhere, checked before they are held, linear in what a dribbling agent costs."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestagent.errors import BadRequest, ProtocolError
from guestagent.fake import FakeAgent
from guestagent.frames import (
    ANSWER_MAGIC,
    MAX_PAYLOAD_BYTES,
    SYNC_MAGIC,
    FrameReader,
    Limits,
    SyncHunter,
    check_shape,
    decode_payload,
    encode_frame,
    sync_flush,
)

NONCE = b"\x01\x02\x03\x04\x05\x06\x07\x08"
LIMITS = Limits()


def framed(payload: bytes) -> bytes:
    return struct.pack(">II", len(payload), zlib.crc32(payload)) + payload


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    sizes=st.lists(st.integers(min_value=0, max_value=100), max_size=60),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_cut_gives_the_same_payloads(payloads: list[bytes], sizes: list[int]) -> None:
    reader = FrameReader()
    stream = b"".join(map(framed, payloads))
    assert [payload for piece in cut(stream, sizes) for payload in reader.feed(piece)] == payloads
    assert reader.held_bytes == 0


@pytest.mark.parametrize("length", [0, MAX_PAYLOAD_BYTES + 1, 0x534C5359, 0xFFFFFFFF])
def test_an_impossible_length_is_refused_at_the_header(length: int) -> None:
    reader = FrameReader()
    assert list(reader.feed(struct.pack(">II", length, 0)[:7])) == []
    with pytest.raises(ProtocolError, match=f"frame length {length} "):
        list(reader.feed(b"\x00"))
    assert reader.held_bytes == 0


def test_the_longest_frame_passes_and_a_wrong_crc_does_not() -> None:
    payload = bytes(MAX_PAYLOAD_BYTES)
    assert list(FrameReader().feed(framed(payload))) == [payload]
    with pytest.raises(ProtocolError, match="fails its CRC"):
        list(FrameReader().feed(framed(b"abc")[:-1] + b"d"))


def test_frames_before_a_bad_one_still_come() -> None:
    got = []
    with pytest.raises(ProtocolError):
        for payload in FrameReader().feed(framed(b"one") + framed(b"two") + bytes(8)):
            got.append(payload)
    assert got == [b"one", b"two"]


def test_a_claimed_length_holds_nothing_before_its_bytes_come() -> None:
    tracemalloc.start()
    try:
        readers = [FrameReader() for _ in range(100)]
        before = tracemalloc.get_traced_memory()[0]
        for reader in readers:
            assert list(reader.feed(struct.pack(">II", MAX_PAYLOAD_BYTES, 0) + b"x" * 10)) == []
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert all(reader.held_bytes == 10 for reader in readers)
    assert grown < 100 * 1024


def dribble_s(n_bytes: int) -> float:
    """The least CPU seconds of three runs for one frame of `n_bytes`, fed a byte at a time."""
    stream = framed(bytes(n_bytes))
    pieces = [stream[at : at + 1] for at in range(len(stream))]
    runs = []
    for _ in range(3):
        reader = FrameReader()
        begun = time.process_time()
        count = sum(1 for piece in pieces for _payload in reader.feed(piece))
        runs.append(time.process_time() - begun)
        assert count == 1
    return min(runs)


def test_a_byte_at_a_time_costs_linear_time() -> None:
    # 8 times the bytes: 8 times the time when linear, 64 times when each byte copies what is held.
    assert dribble_s(MAX_PAYLOAD_BYTES) < 24 * dribble_s(MAX_PAYLOAD_BYTES // 8)


# Shape


def nested(depth: int) -> bytes:
    return b"\x91" * (depth - 1) + b"\x90"


def test_depth_is_limited_exactly() -> None:
    check_shape(nested(LIMITS.max_depth), LIMITS)
    with pytest.raises(ProtocolError, match="nested deeper than 6"):
        check_shape(nested(LIMITS.max_depth + 1), LIMITS)
    with pytest.raises(ProtocolError, match="nested deeper than 6"):
        check_shape(b"\x81\xa1k" * 7 + b"\xc0", LIMITS)


@pytest.mark.parametrize("make", [lambda n: [0] * n, lambda n: {f"k{i}": 0 for i in range(n)}])
def test_entries_are_limited_exactly(make: object) -> None:
    assert callable(make)
    check_shape(msgpack.packb(make(4096)), LIMITS)
    with pytest.raises(ProtocolError, match="container of 4097 entries"):
        check_shape(msgpack.packb(make(4097)), LIMITS)


def test_the_sum_of_values_is_limited() -> None:
    with pytest.raises(ProtocolError, match="more than 32768 values"):
        check_shape(msgpack.packb([[0] * 4096] * 9), LIMITS)


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"\x92\x01", "longer than its frame"),
        (b"\x91\xcf\x00", "differ in length"),
        (b"\x91\xc6\xff\xff\xff\xff", "differ in length"),
        (b"\x91\xcf", "differ in length"),
        (b"\xdd\xff\xff\xff\xff", "container of 4294967295 entries"),
        (b"\xdf\xff\xff\xff\xff", "container of 4294967295 entries"),
        (b"\x90\x00", "differ in length"),
        (b"\xdc", "longer than its frame"),
        (b"", "cut short"),
        (msgpack.packb([msgpack.Timestamp(1)]), "tag 0xd6"),
        (msgpack.packb([msgpack.ExtType(5, b"abc")]), "tag 0xc7"),
        (b"\x91\xc1", "tag 0xc1"),
    ],
)
def test_a_misshapen_payload_is_named(payload: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        decode_payload(payload, LIMITS)


@pytest.mark.parametrize("payload", [b"\x01", b"\x80", b"\xa1x", b"\xc0"])
def test_a_payload_that_is_no_array_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="not an array"):
        decode_payload(payload, LIMITS)


def test_a_map_key_must_be_text_or_bytes() -> None:
    with pytest.raises(ProtocolError, match="not msgpack"):
        decode_payload(b"\x91\x81\x90\x01", LIMITS)
    with pytest.raises(ProtocolError, match="not msgpack"):
        decode_payload(b"\x91\x81\x01\x01", LIMITS)


def test_bad_utf8_is_replaced() -> None:
    assert decode_payload(b"\x91\xa2\xffA", LIMITS) == ["�A"]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=30,
)


@given(st.lists(json_like, max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_msgpack_makes_within_the_limits_is_read_back(message: list[object]) -> None:
    deep = Limits(max_depth=64)
    assert decode_payload(msgpack.packb(message), deep) == message


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdc\x10\x00" * 40000,  # arrays that claim 4,096 entries, each in the last one's first
        b"\xdc\x10\x00" + b"\x90" * 4096 + b"\x90" * 100000,
        (b"\xdc\x0f\xff" + b"\x90" * 4095) * 31,
        b"\x9f" + (b"\xdc\x10\x00" + b"\x80" * 4096) * 15,
    ],
)
def test_no_payload_blows_up_in_memory(payload: bytes) -> None:
    tracemalloc.start()
    try:
        try:
            decode_payload(payload[:MAX_PAYLOAD_BYTES], LIMITS)
        except ProtocolError:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# Encoding


def test_what_cannot_be_sent_is_the_callers_fault() -> None:
    with pytest.raises(BadRequest, match="takes 131084 bytes"):
        encode_frame([4, 0, 1, 0, bytes(131073), True])
    with pytest.raises(BadRequest, match="cannot be encoded"):
        encode_frame([4, 2**64])


# SYNC


def test_the_flush_is_as_long_as_the_contract_says() -> None:
    flush = sync_flush(NONCE)
    assert flush == (SYNC_MAGIC + NONCE) * 8194
    assert len(flush) >= 131088 + 16
    with pytest.raises(BadRequest, match="nonce must be 8 bytes"):
        sync_flush(b"short")


@pytest.mark.parametrize("size", [1, 7, 15, 16, 17, 1000])
def test_the_answer_is_found_over_any_cut(size: int) -> None:
    stream = b"junk" * 50 + ANSWER_MAGIC + b"othernon" + ANSWER_MAGIC[:7] + ANSWER_MAGIC + NONCE + b"after"
    hunter = SyncHunter(NONCE, 4096)
    rest = b""
    found = False
    for at in range(0, len(stream), size):
        piece = stream[at : at + size]
        if found:
            rest += piece
        elif (after := hunter.feed(piece)) is not None:
            found, rest = True, after
    assert found
    assert rest == b"after"
    assert hunter.discarded_bytes == 200 + 16 + 7


def test_noise_is_thrown_away_up_to_the_limit_only() -> None:
    hunter = SyncHunter(NONCE, 1000)
    assert hunter.feed(bytes(1000)) is None
    assert hunter.feed(ANSWER_MAGIC + NONCE) == b""
    hunter = SyncHunter(NONCE, 1000)
    assert hunter.feed(bytes(1000)) is None
    with pytest.raises(ProtocolError, match="no answer to SYNC within 1000 bytes"):
        hunter.feed(bytes(16))


@pytest.mark.parametrize("left_behind", [b"", b"\x00", b"\x00\x02\x00\x00", struct.pack(">II", 131072, 1)])
@pytest.mark.parametrize("sent", [0, 1, 5, 131071])
def test_the_flush_frees_an_agent_from_any_half_frame(left_behind: bytes, sent: int) -> None:
    agent = FakeAgent()
    half = left_behind + bytes(sent if len(left_behind) == 8 else 0)
    assert agent.receive(sync_flush(b"earlier!")) == ANSWER_MAGIC + b"earlier!"
    assert agent.receive(half) == b""
    assert agent.receive(sync_flush(NONCE)) == ANSWER_MAGIC + NONCE
