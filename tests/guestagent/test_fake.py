"""The fake agent keeps the contract as a real one does, and breaks it exactly where it is told to."""

from __future__ import annotations

import errno

import pytest

from guestagent.errors import GuestRefused, ProtocolError
from guestagent.fake import DEFAULT_STATS, FakeAgent, Misbehaviour, Script
from guestagent.frames import ANSWER_MAGIC, sync_flush
from guestagent.messages import (
    Exited,
    GuestEvent,
    Kind,
    Output,
    OutputEnded,
    Prepare,
    Renew,
    ReplyReceived,
    StartProcess,
    StdinAcked,
    Stream,
)
from guestagent.protocol import AgentSession, SessionState
from tests.guestagent.sessions import CONFIGURE, MAIN, NONCE, Link, frame


def running(agent: FakeAgent | None = None, start: StartProcess = MAIN) -> Link:
    """A configured guest with its main process started."""
    link = Link.connect(agent or FakeAgent())
    link.send(link.session.configure(CONFIGURE)[1])
    link.send(link.session.start(start)[1])
    return link


def reply(link: Link, request: tuple[int, bytes]) -> ReplyReceived:
    [event] = [event for event in link.send(request[1]) if isinstance(event, ReplyReceived)]
    assert event.request_id == request[0]
    return event


def output_of(link: Link, stream: Stream = Stream.STDOUT) -> bytes:
    return b"".join(event.data for event in link.events if isinstance(event, Output) and event.stream is stream)


# Keeping the contract


def test_a_whole_life() -> None:
    link = running()
    assert link.agent.configured == CONFIGURE
    assert link.send(link.session.stdin(1, b"hello", eof=True)) == [
        StdinAcked(1, 5),
        Output(1, Stream.STDOUT, 0, b"hello"),
        OutputEnded(1, Stream.STDOUT, 5),
        OutputEnded(1, Stream.STDERR, 0),
        Exited(1, 0, 0, False),
    ]
    assert reply(link, link.session.stats()).result() == DEFAULT_STATS
    assert reply(link, link.session.forget(1)).refused is None
    assert reply(link, link.session.shutdown(0)).refused is None
    assert link.agent.powered_off
    assert link.agent.requests[:4] == [Kind.HELLO, Kind.CONFIGURE, Kind.START, Kind.STDIN]


@pytest.mark.parametrize(
    ("argv", "code", "signal", "out"),
    [
        ((b"true",), 0, 0, b""),
        ((b"/bin/false",), 1, 0, b""),
        ((b"exit", b"42"), 42, 0, b""),
        ((b"echo", b"a", b"b"), 0, 0, b"a b\n"),
        ((b"fault",), -1, 11, b""),
    ],
)
def test_the_default_scripts(argv: tuple[bytes, ...], code: int, signal: int, out: bytes) -> None:
    link = running(start=StartProcess(1, argv))
    assert link.events[-1] == Exited(1, code, signal, False)
    assert output_of(link) == out


def test_refusals() -> None:
    link = Link.connect(FakeAgent())
    refusals = [
        (link.session.start(MAIN), errno.EAGAIN),
        (link.session.configure(CONFIGURE), 0),
        (link.session.configure(CONFIGURE), errno.EALREADY),
        (link.session.start(StartProcess(2, (b"nope",))), errno.ENOENT),
    ]
    for request, code in refusals:
        refused = reply(link, request).refused
        assert (refused.errno if refused else 0) == code
    link.send(link.session.start(MAIN)[1])
    refused = reply(link, link.session.forget(1)).refused
    assert isinstance(refused, GuestRefused)
    assert refused.errno == errno.EBUSY


def test_a_frozen_copy_becomes_somebody_else() -> None:
    renew = Renew(b"web-2", b"f" * 32, b"f" * 32, 2)
    unconfigured = Link.connect(FakeAgent())
    refused = reply(unconfigured, unconfigured.session.freeze(10)).refused
    assert refused is not None and refused.errno == errno.EAGAIN
    link = running()
    refused = reply(link, link.session.renew(renew)).refused
    assert refused is not None and refused.errno == errno.EINVAL
    assert reply(link, link.session.freeze(10)).refused is None
    refused = reply(link, link.session.freeze(10)).refused
    assert refused is not None and refused.errno == errno.EALREADY
    assert reply(link, link.session.renew(renew)).refused is None
    assert (link.agent.renewed, link.agent.frozen) == (renew, False)
    assert reply(link, link.session.thaw()).refused is None


def test_a_start_before_configure_is_a_rehearsal_and_leaves_nothing() -> None:
    link = Link.connect(FakeAgent())
    refused = reply(link, link.session.rehearse(CONFIGURE)).refused
    assert refused is not None and refused.errno == errno.EINVAL
    assert reply(link, link.session.prepare(Prepare(CONFIGURE.layers, 1000))).refused is None
    refused = reply(link, link.session.start(StartProcess(2, (b"true",)))).refused
    assert refused is not None and refused.errno == errno.EAGAIN
    assert reply(link, link.session.rehearse(CONFIGURE)).refused is None
    refused = reply(link, link.session.start(StartProcess(1, (b"true",)))).refused
    assert refused is not None and refused.errno == errno.EINVAL
    link.send(link.session.start(StartProcess(3, (b"echo", b"r")))[1])
    link.send(link.session.ack(3, Stream.STDOUT, 0))
    assert output_of(link) == b"r\n"
    refused = reply(link, link.session.configure(CONFIGURE)).refused
    assert refused is not None and refused.errno == errno.EBUSY
    link.send(link.session.ack(3, Stream.STDOUT, 2))
    assert reply(link, link.session.forget(3)).refused is None
    assert reply(link, link.session.configure(CONFIGURE)).refused is None


def test_output_waits_for_the_window() -> None:
    agent = FakeAgent(lambda start: Script(stdout=bytes(200_000), stderr=b"warn"))
    link = running(agent, StartProcess(1, (b"big",)))
    assert len(output_of(link)) == 65536
    assert output_of(link, Stream.STDERR) == b"warn"
    while not isinstance(link.events[-1], Exited):
        last = [event for event in link.events if isinstance(event, Output) and event.stream is Stream.STDOUT][-1]
        link.send(link.session.ack(1, Stream.STDOUT, last.offset + len(last.data)))
    assert output_of(link) == bytes(200_000)


def test_a_signal_ends_a_process_and_main_takes_all_with_it() -> None:
    link = running(start=StartProcess(1, (b"sleep",)))
    link.send(link.session.start(StartProcess(2, (b"sleep",)))[1])
    link.send(link.session.signal(1, 15)[1])
    assert [event for event in link.events if isinstance(event, Exited)] == [
        Exited(1, -1, 15, False),
        Exited(2, -1, 9, False),
    ]
    refused = reply(link, link.session.signal(1, 15)).refused
    assert refused is not None
    assert refused.errno == errno.ESRCH


def test_a_test_can_make_a_process_write_end_and_the_guest_speak() -> None:
    link = running(start=StartProcess(1, (b"sleep",)))
    assert link.take(link.agent.write(1, b"x", Stream.STDERR)) == [Output(1, Stream.STDERR, 0, b"x")]
    assert link.take(link.agent.event("oom_kill", {"pid": 9})) == [GuestEvent("oom_kill", (("pid", 9),))]
    assert link.take(link.agent.exit(1, 3))[-1] == Exited(1, 3, 0, False)


def test_a_winsize_is_taken() -> None:
    link = running()
    assert reply(link, link.session.winsize(1, 50, 100)).refused is None


# Reconnecting


def reconnect(link: Link, nonce: bytes = b"another!") -> Link:
    link.session.close()
    link.agent.hang_up()
    return Link.connect(link.agent, link.session.carry(), nonce)


def test_resumption_is_exact() -> None:
    link = running()
    link.send(link.session.stdin(1, b"abcdef"))
    link.send(link.session.ack(1, Stream.STDOUT, 4))
    link.take(link.agent.write(1, b"gh"))
    link.agent.write(1, b"lost on the way")
    again = reconnect(link)
    assert again.session.guest is not None
    assert again.session.guest.configured
    assert again.send(again.session.follow(1)) == [Output(1, Stream.STDOUT, 4, b"efghlost on the way")]
    assert again.send(again.session.stdin(1, b"!", eof=True))[0] == StdinAcked(1, 7)
    assert again.events[-1] == Exited(1, 0, 0, False)


def test_stdin_that_never_arrived_is_sent_again() -> None:
    link = running()
    link.session.stdin(1, b"lost", eof=True)
    again = reconnect(link)
    again.send(again.session.follow(1))
    assert output_of(again) == b"lost"
    assert again.events[-1] == Exited(1, 0, 0, False)


def test_an_exit_is_told_again_until_forgotten() -> None:
    link = running(start=StartProcess(1, (b"echo", b"hi")))
    link.send(link.session.ack(1, Stream.STDOUT, 3))
    again = reconnect(link)
    assert again.send(again.session.follow(1)) == [
        OutputEnded(1, Stream.STDOUT, 3),
        OutputEnded(1, Stream.STDERR, 0),
        Exited(1, 0, 0, False),
    ]
    again.send(again.session.forget(1)[1])
    last = reconnect(again, b"thirdone")
    assert last.session.procs == ()


def test_an_agent_that_speaks_before_it_read_all_acks_is_understood() -> None:
    link = running()
    link.send(link.session.stdin(1, b"abcdef"))
    link.session.ack(1, Stream.STDOUT, 6)  # never arrives: the agent still holds all six
    again = reconnect(link)
    acks = again.session.follow(1)
    first = frame(5, 0, 1, int(Stream.STDERR), 0)
    assert acks.endswith(first)
    assert again.send(first) == []
    assert again.send(acks[: -len(first)]) == []
    assert again.take(again.agent.write(1, b"new")) == [Output(1, Stream.STDOUT, 6, b"new")]


def test_a_half_written_frame_is_dropped_on_the_next_connection() -> None:
    link = running()
    link.agent.receive(link.session.stats()[1][:-3])
    again = reconnect(link)
    assert again.session.state is SessionState.READY


def test_copies_of_the_sessions_own_sync_are_swallowed() -> None:
    link = running()
    assert link.agent.receive(sync_flush(NONCE)) == b""
    assert reply(link, link.session.stats()).refused is None


# Breaking it


BREACHES = {
    Misbehaviour.GARBLE: "frame length",
    Misbehaviour.BAD_CRC: "fails its CRC",
    Misbehaviour.OVERSIZE: "frame length 4294967295",
    Misbehaviour.DEEP_NESTING: "nested deeper than 6",
    Misbehaviour.HUGE_COUNT: "container of 4294967295 entries",
    Misbehaviour.WRONG_ID: "REPLY to 2147483647, which is not outstanding",
    Misbehaviour.FLOOD_OUTPUT: "goes over the window of 65536 bytes",
    Misbehaviour.WRONG_OFFSET: "at offset 1099511627776, 0 is next",
    Misbehaviour.UNKNOWN_PROC: "process 4294967295, not started by the host",
    Misbehaviour.NOISE: "frame length",
}


@pytest.mark.parametrize("misbehaviour", BREACHES)
def test_a_breach_ends_the_session(misbehaviour: Misbehaviour) -> None:
    link = running()
    link.agent.misbehaviour = misbehaviour
    with pytest.raises(ProtocolError, match=BREACHES[misbehaviour]):
        link.send(link.session.stats()[1])
    assert link.session.state is SessionState.FAILED


@pytest.mark.parametrize("misbehaviour", [item for item in Misbehaviour if item not in BREACHES])
def test_the_other_kinds_break_no_contract(misbehaviour: Misbehaviour) -> None:
    link = running()
    link.agent.misbehaviour = misbehaviour
    request_id, data = link.session.stats()
    got = link.send(data)
    if misbehaviour is Misbehaviour.SILENT:
        assert got == []
        assert link.session.outstanding == (request_id,)
        return
    while misbehaviour is Misbehaviour.DRIBBLE and (piece := link.agent.more()):
        assert len(piece) == 1
        got += link.take(piece)
    assert got[0] == ReplyReceived(request_id, Kind.STATS, DEFAULT_STATS)
    flooded = misbehaviour is Misbehaviour.FLOOD_EVENTS
    assert (len(got) - 1, link.session.events_dropped) == ((50, 950) if flooded else (0, 0))


def test_a_silent_or_noisy_agent_never_syncs() -> None:
    session = AgentSession(NONCE)
    assert FakeAgent(misbehaviour=Misbehaviour.SILENT).receive(session.open()) == b""
    noise = FakeAgent(misbehaviour=Misbehaviour.NOISE).receive(session.open())
    assert noise
    with pytest.raises(ProtocolError, match="no answer to SYNC within 4194304 bytes"):
        for _ in range(65):
            session.receive(noise, 0.0)


def test_misbehaviour_can_wait_for_its_turn() -> None:
    agent = FakeAgent(misbehaviour=Misbehaviour.BAD_CRC, honest_replies=3)
    link = running(agent)
    assert link.session.state is SessionState.READY
    with pytest.raises(ProtocolError, match="CRC"):
        link.send(link.session.stats()[1])


def test_the_answer_to_sync_can_be_dribbled() -> None:
    agent = FakeAgent(misbehaviour=Misbehaviour.DRIBBLE)
    got = agent.receive(sync_flush(NONCE))
    assert got == ANSWER_MAGIC[:1]
    assert agent.more(100) == (ANSWER_MAGIC + NONCE)[1:]
