"""Hostile bytes against the host's end of the agent protocol.

Whatever comes, a session gives events or ends with a ProtocolError (any other exception fails the test), what
it delivers does not depend on how the bytes were cut, and what it holds stays within one frame.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from guestagent.errors import ProtocolError
from guestagent.fake import FakeAgent, Script
from guestagent.frames import ANSWER_MAGIC, MAX_PAYLOAD_BYTES, encode_frame
from guestagent.messages import AgentEvent, ProcState, StartProcess, Stream
from guestagent.protocol import AgentSession, ProcCarry, SessionCarry, SessionState
from tests.guestagent.sessions import CONFIGURE, MAIN, NONCE, hello_reply

SEED = 20240607
MUTATIONS = 1500
BUDGET_S = 20.0
Outcome = tuple[list[AgentEvent], str]


def driven() -> AgentSession:
    """A READY session with one resumed and followed process, one started, and requests outstanding."""
    carry = SessionCarry("boot-1", (ProcCarry(1, 10, 0, 0, b"abc"),))
    session = AgentSession(NONCE, carry=carry)
    session.receive(ANSWER_MAGIC + NONCE, 0.0)
    session.hello()
    session.receive(hello_reply(ProcState(1, 100, False, 1, 4, 0), ProcState(3, 102, True, 0, 0, 0)), 0.0)
    session.follow(1)
    session.start(StartProcess(2, (b"sh",), stdin=True))  # 2
    session.stats()  # 3
    session.signal(1, 15)  # 4
    session.configure(CONFIGURE)  # 5
    return session


def outcome(session: AgentSession, data: bytes, cuts: list[int]) -> Outcome:
    """All that the bytes gave, and the breach that ended it ("" for none)."""
    events: list[AgentEvent] = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    try:
        for start, end in pairwise(edges):
            events += session.receive(data[start:end], 0.0)
            assert session.held_bytes <= MAX_PAYLOAD_BYTES + 2 * 65536
    except ProtocolError as error:
        assert session.state is SessionState.FAILED
        return events + list(error.events), error.what
    assert session.state is not SessionState.FAILED
    return events, ""


def comparable(found: Outcome) -> tuple[str, str]:
    return repr(found[0]), found[1]


small = st.integers(0, 5)
value = st.recursive(
    st.none()
    | st.booleans()
    | small
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=20)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
offset = small | st.sampled_from([4, 10, 65536, 2**32, 2**64 - 1])
likely = st.one_of(
    st.tuples(st.just(64), st.integers(0, 7), st.sampled_from([0, 0, 2, 4095]), value),
    st.tuples(st.just(65), st.just(0), st.integers(0, 4), st.integers(0, 3), offset, st.binary(max_size=12)),
    st.tuples(st.just(66), st.just(0), st.integers(0, 4), st.integers(-1, 3), st.sampled_from([0, 9]), st.booleans()),
    st.tuples(st.just(67), st.just(0), st.integers(0, 4), offset),
    st.tuples(st.just(68), st.just(0), st.text(max_size=5), st.dictionaries(st.text(max_size=3), small, max_size=2)),
).map(list)
message = likely | st.lists(value, max_size=6)


@given(st.lists(message, max_size=6), st.lists(st.integers(0, 500), max_size=12))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_well_framed_nonsense_gives_events_or_one_named_breach(messages: list[list[object]], cuts: list[int]) -> None:
    data = b"".join(encode_frame(item) for item in messages)
    assert comparable(outcome(driven(), data, cuts)) == comparable(outcome(driven(), data, []))


@given(st.binary(max_size=400), st.booleans(), st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_payload_and_any_bytes_do_too(data: bytes, as_frame: bool, cuts: list[int]) -> None:
    if as_frame and data:
        data = frame_again(data)
    assert comparable(outcome(driven(), data, cuts)) == comparable(outcome(driven(), data, []))


@given(st.binary(max_size=200), st.lists(st.integers(0, 300), max_size=6), st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_noise_before_the_answer_changes_nothing(noise: bytes, cuts: list[int], answered: bool) -> None:
    data = noise + (ANSWER_MAGIC + NONCE if answered else b"")
    _events, problem = outcome(session := AgentSession(NONCE), data, cuts)
    assert problem == ""
    assert (session.state is SessionState.SYNCED) == answered


@given(value)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_answer_to_hello_is_taken_or_refused(body: object) -> None:
    session = AgentSession(NONCE)
    session.receive(ANSWER_MAGIC + NONCE, 0.0)
    session.hello()
    assert outcome(session, encode_frame([64, 1, 0, body]), [])[1] != ""


# Seeded mutation of an honest agent's bytes


def script(start: StartProcess) -> Script:
    return Script(stdout=b"o" * 3000, stderr=b"e" * 10, exit_code=7 if start.proc == 2 else None, echo_stdin=True)


def transcript() -> bytes:
    """All that an honest agent answers after the sync, to the steps of `ready_for_transcript` and an ACK."""
    agent, session = FakeAgent(script), AgentSession(NONCE)
    said = agent.receive(session.open())
    session.receive(said, 0.0)
    heard = b""
    for step in (
        session.hello,
        lambda: session.configure(CONFIGURE)[1],
        lambda: session.start(MAIN)[1],
        lambda: session.start(StartProcess(2, (b"x",), stdin=True))[1],
        lambda: session.stdin(1, b"some input"),
        lambda: session.ack(1, Stream.STDOUT, 3000),
        lambda: session.stats()[1],
        lambda: session.signal(1, 15)[1],
    ):
        answer = agent.receive(step())
        session.receive(answer, 0.0)
        heard += answer
    return heard


def ready_for_transcript() -> AgentSession:
    """A session that made the transcript's requests and heard nothing yet but HELLO's answer."""
    session = AgentSession(NONCE)
    session.receive(ANSWER_MAGIC + NONCE, 0.0)
    session.hello()
    session.receive(hello_reply(), 0.0)
    session.configure(CONFIGURE)
    session.start(MAIN)
    session.start(StartProcess(2, (b"x",), stdin=True))
    session.stdin(1, b"some input")
    session.stats()
    session.signal(1, 15)
    return session


def frames_of(stream: bytes) -> list[bytes]:
    frames, at = [], 0
    while at < len(stream):
        length = int.from_bytes(stream[at : at + 4], "big")
        frames.append(stream[at + 8 : at + 8 + length])
        at += 8 + length
    return frames


def mutate(rng: random.Random, payloads: list[bytes]) -> bytes:
    """A transcript with some payloads changed (under a right CRC, mostly), dropped, doubled or swapped."""
    chosen = list(payloads)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(chosen))
        match rng.randrange(6):
            case 0:
                chosen.insert(at, chosen[at])
            case 1 if len(chosen) > 1:
                del chosen[at]
            case 2:
                other = rng.randrange(len(chosen))
                chosen[at], chosen[other] = chosen[other], chosen[at]
            case 3:
                chosen[at] = chosen[at][: rng.randrange(len(chosen[at]))] or b"\x90"
            case _:
                changed = bytearray(chosen[at])
                for _ in range(rng.randint(1, 4)):
                    changed[rng.randrange(min(len(changed), 40))] = rng.randrange(256)
                chosen[at] = bytes(changed)
    stream = b"".join(map(frame_again, chosen))
    if rng.randrange(8) == 0:
        at = rng.randrange(len(stream))
        stream = stream[:at] + bytes([rng.randrange(256)]) + stream[at + 1 :]
    return stream


def test_the_unchanged_transcript_is_taken_whole() -> None:
    events, problem = outcome(ready_for_transcript(), b"".join(frame_again(p) for p in payloads_after_hello()), [])
    assert problem == ""
    assert len(events) > 12


def payloads_after_hello() -> list[bytes]:
    return frames_of(transcript())[1:]


def frame_again(payload: bytes) -> bytes:
    return struct.pack(">II", len(payload), zlib.crc32(payload)) + payload


def test_mutations_of_an_honest_agent_never_do_worse_than_end_the_session() -> None:
    rng = random.Random(SEED)
    payloads = payloads_after_hello()
    breaches: set[str] = set()
    begun = time.monotonic()
    for done in range(MUTATIONS):
        data = mutate(rng, payloads)
        cuts = [rng.randrange(len(data) + 1) for _ in range(rng.randrange(6))]
        found = outcome(ready_for_transcript(), data, cuts)
        assert comparable(found) == comparable(outcome(ready_for_transcript(), data, []))
        breaches.add(" ".join(word for word in found[1].split() if not any(map(str.isdigit, word))))
        if done >= 200 and time.monotonic() - begun > BUDGET_S:
            break
    assert len(breaches) > 20  # the mutations reach deep, not only the CRC


def test_hostile_floods_leave_nothing_behind() -> None:
    bombs = [
        frame_again(b"\xdc\x10\x00" * 40000),
        frame_again((b"\x9f" + b"\x9f" * 15 + b"\x90" * 240) * 100),
        frame_again(b"\xdc\x10\x00" + b"\x90" * 4096),
        struct.pack(">II", MAX_PAYLOAD_BYTES, 0) + bytes(MAX_PAYLOAD_BYTES - 1),
        encode_frame([68, 0, "x" * 100000, {}]) * 20,
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            session = driven()
            base = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            outcome(session, bomb, [])
            current, peak = tracemalloc.get_traced_memory()
            assert peak - base < len(bomb) + (2 << 20)
            assert current - base < 2 * MAX_PAYLOAD_BYTES
    finally:
        tracemalloc.stop()
