"""The host's end of a session: its life, its windows, what it resumes, and every breach it ends at."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import pytest

from guestagent.errors import BadRequest, GuestRefused, ProtocolError, SessionClosed, WindowFull
from guestagent.fake import DEFAULT_STATS, FakeAgent
from guestagent.frames import ANSWER_MAGIC, SYNC_MAGIC, Limits, sync_flush
from guestagent.lifecycle import TRANSITIONS, SessionState, Trigger
from guestagent.messages import (
    AgentEvent,
    Exited,
    GuestEvent,
    HelloReceived,
    Kind,
    Output,
    OutputEnded,
    ProcState,
    ReplyReceived,
    StartProcess,
    StdinAcked,
    Stream,
    Synced,
)
from guestagent.protocol import AgentSession, ProcCarry, SessionCarry
from guestagent.wire import encode_stats
from tests.guestagent.sessions import (
    CONFIGURE,
    MAIN,
    NONCE,
    Link,
    frame,
    hello_reply,
    ready,
    resumed,
    started,
    unframed,
)

ANSWER = ANSWER_MAGIC + NONCE


def breach(session: AgentSession, data: bytes, problem: str) -> ProtocolError:
    """`data` ends the session with an error that names `problem`."""
    with pytest.raises(ProtocolError, match=re.escape(problem)) as caught:
        session.receive(data, 0.0)
    assert session.state is SessionState.FAILED
    with pytest.raises(SessionClosed, match=re.escape(caught.value.what)):
        session.receive(b"", 0.0)
    return caught.value


# Life


def test_the_table_lets_every_open_state_end_and_no_ended_one_reopen() -> None:
    ended = {SessionState.CLOSED, SessionState.FAILED}
    for state in SessionState:
        assert TRANSITIONS[state, Trigger.CLOSE] in ended
        if state not in ended:
            assert TRANSITIONS[state, Trigger.BREACH] is SessionState.FAILED
    assert all(after in ended for (state, _), after in TRANSITIONS.items() if state in ended)


def test_a_session_opens_step_by_step() -> None:
    session = AgentSession(NONCE)
    assert session.state.name == "UNSYNCED"
    assert session.open() == sync_flush(NONCE)
    assert session.receive(b"old bytes" + ANSWER[:9], 0.0) == []
    assert session.receive(ANSWER[9:], 0.0) == [Synced()]
    assert session.state.name == "SYNCED"
    assert unframed(session.hello()) == [[1, 1, 1]]
    assert list(session.outstanding) == [1]
    [event] = session.receive(hello_reply(), 0.0)
    assert isinstance(event, HelloReceived)
    assert event.state == session.guest
    assert session.state.name == "READY"
    assert list(session.outstanding) == []
    session.close()
    session.close()
    assert session.state.name == "CLOSED"


def test_one_sync_is_enough_for_an_agent_that_stands_between_frames() -> None:
    agent = FakeAgent()
    link = Link.connect(agent)
    link.session.close()
    agent.hang_up()
    session = AgentSession(b"another!")
    flush = session.open(at_boundary=True)
    assert flush == SYNC_MAGIC + b"another!"
    assert session.receive(agent.receive(flush), 0.0) == [Synced()]
    session.receive(agent.receive(session.hello()), 0.0)
    assert session.state.name == "READY"


def test_calls_out_of_turn_are_the_callers_fault_and_change_nothing() -> None:
    session = AgentSession(NONCE)
    for call in (session.hello, session.stats, lambda: session.follow(1), lambda: session.stdin(1, b"")):
        with pytest.raises(BadRequest, match="UNSYNCED"):
            call()
    session.receive(ANSWER, 0.0)
    with pytest.raises(BadRequest, match="SYNCED"):
        session.open()
    session.hello()
    with pytest.raises(BadRequest, match="HELLO_SENT"):
        session.hello()
    with pytest.raises(BadRequest, match="HELLO_SENT"):
        session.start(MAIN)
    assert session.procs == ()
    session.receive(hello_reply(), 0.0)
    assert session.state is SessionState.READY


def test_after_the_end_every_call_says_so() -> None:
    session = started()
    session.close()
    for call in (session.open, session.hello, session.stats, lambda: session.ack(1, Stream.STDOUT, 0)):
        with pytest.raises(SessionClosed, match="CLOSED"):
            call()
    with pytest.raises(SessionClosed, match="CLOSED"):
        session.receive(b"x", 0.0)


# Requests


@pytest.mark.parametrize(
    ("ask", "sent", "body", "result"),
    [
        (lambda s: s.signal(1, 15), [6, 3, 1, 15], None, None),
        (lambda s: s.winsize(1, 40, 120), [7, 3, 1, 40, 120], None, None),
        (lambda s: s.stats(), [8, 3], encode_stats(DEFAULT_STATS), DEFAULT_STATS),
        (lambda s: s.shutdown(500), [9, 3, 500], None, None),
        (lambda s: s.forget(1), [10, 3, 1], None, None),
        (lambda s: s.start(StartProcess(2, (b"ls",))), None, 101, 101),
        (lambda s: s.configure(CONFIGURE), None, None, None),
    ],
)
def test_a_request_gets_its_one_reply(
    ask: Callable[[AgentSession], tuple[int, bytes]], sent: list[object] | None, body: object, result: object
) -> None:
    session = started()
    request_id, data = ask(session)
    [message] = unframed(data)
    assert message[1] == request_id == 3
    assert sent is None or message == sent
    kind = Kind(int(str(message[0])))
    reply = frame(64, request_id, 0, body)
    assert session.receive(reply, 0.0) == [ReplyReceived(3, kind, result)]  # type: ignore[arg-type]
    breach(session, reply, "REPLY to 3, which is not outstanding")


def test_a_refusal_keeps_the_errno_and_the_session() -> None:
    session = ready()
    request_id, _ = session.start(MAIN)
    [event] = session.receive(frame(64, request_id, errno.ENOENT, "cat:\x1b not found"), 0.0)
    assert isinstance(event, ReplyReceived)
    with pytest.raises(GuestRefused, match="refused START: ENOENT: cat: not found") as caught:
        event.result()
    assert caught.value.errno == errno.ENOENT
    assert session.procs == ()
    assert session.start(MAIN)[0] == request_id + 1


def test_replies_come_in_any_order() -> None:
    session = started()
    first, _ = session.signal(1, 1)
    second, _ = session.signal(1, 2)
    events = session.receive(frame(64, second, 0, None) + frame(64, first, errno.ESRCH, ""), 0.0)
    assert [event.request_id for event in events if isinstance(event, ReplyReceived)] == [second, first]


def test_requests_without_replies_are_bounded() -> None:
    session = ready(limits=Limits(max_outstanding=3))
    for _ in range(3):
        session.stats()
    with pytest.raises(WindowFull, match="3 requests have no reply"):
        session.stats()
    session.receive(frame(64, 2, 0, encode_stats(DEFAULT_STATS)), 0.0)
    assert session.stats()[0] == 5


def test_a_process_number_is_used_once_and_must_be_known() -> None:
    session = started()
    with pytest.raises(BadRequest, match="process 1 exists"):
        session.start(MAIN)
    with pytest.raises(BadRequest, match="process 2 is not known"):
        session.signal(2, 9)
    with pytest.raises(BadRequest, match="signo = 65"):
        session.signal(1, 65)
    with pytest.raises(BadRequest, match="rows = 70000"):
        session.winsize(1, 70000, 1)
    with pytest.raises(BadRequest, match="grace_ms"):
        session.shutdown(-1)
    assert session.outstanding == ()


def test_a_start_too_large_for_a_frame_leaves_nothing_behind() -> None:
    session = ready()
    with pytest.raises(BadRequest, match="a frame holds 131072"):
        session.start(StartProcess(1, (b"echo", b"x" * 131072)))
    assert session.procs == ()
    assert session.outstanding == ()


def test_forget_frees_the_process_here_too() -> None:
    session = started()
    session.receive(frame(66, 0, 1, 0, 0, False), 0.0)
    request_id, _ = session.forget(1)
    assert list(session.procs) == [1]
    session.receive(frame(64, request_id, 0, None), 0.0)
    assert list(session.procs) == []
    breach(session, frame(65, 0, 1, 1, 0, b"late"), "process 1, not started by the host")


# Output


def test_output_comes_in_order_and_ends() -> None:
    session = started()
    events = session.receive(
        frame(65, 0, 1, 1, 0, b"out") + frame(65, 0, 1, 2, 0, b"er") + frame(65, 0, 1, 1, 3, b"!"), 0.0
    )
    assert events == [
        Output(1, Stream.STDOUT, 0, b"out"),
        Output(1, Stream.STDERR, 0, b"er"),
        Output(1, Stream.STDOUT, 3, b"!"),
    ]
    ends = frame(65, 0, 1, 1, 4, b"") + frame(65, 0, 1, 2, 2, b"") + frame(66, 0, 1, -1, 9, False)
    assert session.receive(ends, 0.0) == [
        OutputEnded(1, Stream.STDOUT, 4),
        OutputEnded(1, Stream.STDERR, 2),
        Exited(1, -1, 9, False),
    ]


def fill(session: AgentSession, start: int) -> None:
    session.receive(frame(65, 0, 1, 1, start, bytes(32768)) + frame(65, 0, 1, 1, start + 32768, bytes(32768)), 0.0)


def test_the_window_holds_64_kib_past_the_last_ack() -> None:
    session = started()
    fill(session, 0)
    assert unframed(session.ack(1, Stream.STDOUT, 10)) == [[5, 0, 1, 1, 10]]
    assert len(session.receive(frame(65, 0, 1, 1, 65536, bytes(10)), 0.0)) == 1
    breach(session, frame(65, 0, 1, 1, 65546, b"x"), "process 1 stdout goes over the window of 65536")


def test_the_end_needs_no_room() -> None:
    session = started()
    fill(session, 0)
    assert session.receive(frame(65, 0, 1, 1, 65536, b""), 0.0) == [OutputEnded(1, Stream.STDOUT, 65536)]


def test_an_ack_says_what_came_and_never_less_than_before() -> None:
    session = started()
    session.receive(frame(65, 0, 1, 1, 0, b"abc"), 0.0)
    with pytest.raises(BadRequest, match=re.escape("ACK 4 is outside 0 … 3")):
        session.ack(1, Stream.STDOUT, 4)
    session.ack(1, Stream.STDOUT, 3)
    with pytest.raises(BadRequest, match=re.escape("ACK 2 is outside 3 … 3")):
        session.ack(1, Stream.STDOUT, 2)


# Stdin


def test_stdin_is_cut_counted_and_bounded() -> None:
    session = started()
    assert session.stdin_room(1) == 65536
    sent = unframed(session.stdin(1, b"x" * 40000))
    assert [(message[3], len(bytes(message[4])), message[5]) for message in sent] == [  # type: ignore[call-overload]
        (0, 32768, False),
        (32768, 7232, False),
    ]
    assert session.stdin_room(1) == 25536
    with pytest.raises(WindowFull, match="room for 25536 bytes, not 25537"):
        session.stdin(1, bytes(25537))
    assert session.held_bytes == 40000
    assert session.receive(frame(67, 0, 1, 30000), 0.0) == [StdinAcked(1, 30000)]
    assert session.stdin_room(1) == 55536
    assert unframed(session.stdin(1, b"end", eof=True)) == [[4, 0, 1, 40000, b"end", True]]
    assert session.stdin_room(1) == 0
    with pytest.raises(BadRequest, match="ended before"):
        session.stdin(1, b"more")


def test_an_eof_alone_is_sent_and_nothing_at_all_is_not() -> None:
    session = started()
    assert session.stdin(1, b"") == b""
    assert unframed(session.stdin(1, b"", eof=True)) == [[4, 0, 1, 0, b"", True]]


def test_the_eof_comes_with_the_last_piece_only() -> None:
    sent = unframed(started().stdin(1, bytes(65536), eof=True))
    assert [message[5] for message in sent] == [False, True]


def test_a_process_without_stdin_takes_none() -> None:
    session = ready()
    session.start(StartProcess(1, (b"ls",)))
    assert session.stdin_room(1) == 0
    with pytest.raises(BadRequest, match="started without stdin"):
        session.stdin(1, b"x")


def test_dribbled_stdin_acks_keep_what_is_left() -> None:
    session = started()
    session.stdin(1, bytes(range(256)) * 4)
    for offset in range(1, 1001):
        session.receive(frame(67, 0, 1, offset), 0.0)
    assert session.carry().procs[0].stdin_unacked == (bytes(range(256)) * 4)[1000:]


# Events of the guest


def test_guest_events_are_capped_counted_and_allowed_again() -> None:
    session = AgentSession(NONCE, Limits(event_rate_per_s=10.0, event_burst=5))
    session.receive(ANSWER, 0.0)
    event = frame(68, 0, "oom_kill\x07", {"pid": 4})
    assert session.receive(event * 8, 100.0) == [GuestEvent("oom_kill", (("pid", 4),))] * 5
    assert session.events_dropped == 3
    assert len(session.receive(event * 4, 100.25)) == 2
    assert session.receive(event, 50.0) == []
    assert session.receive(event, 100.26) == []
    assert len(session.receive(event * 100, 1000.0)) == 5


# Breaches


OUT = (65, 0, 1, 1)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (frame(*OUT, 1, b"x"), "OUTPUT of process 1 stdout at offset 1, 0 is next"),
        (frame(*OUT, 0, b"a") + frame(*OUT, 0, b"a"), "at offset 0, 1 is next"),
        (frame(*OUT, 0, bytes(32769)), "has 32769 bytes, at most 32768"),
        (frame(*OUT, 2**64 - 1, b"x"), "0 is next"),
        (frame(*OUT, 0, b"") * 2, "OUTPUT of process 1 stdout after its end"),
        (frame(*OUT, 0, b"") + frame(*OUT, 0, b"x"), "after its end"),
        (frame(66, 0, 1, 0, 0, False) * 2, "Exited of process 1 after its EXITED"),
        (frame(66, 0, 1, 0, 0, False) + frame(*OUT, 0, b"x"), "Output of process 1 after its EXITED"),
        (frame(65, 0, 2, 1, 0, b"x"), "Output of process 2, not started by the host"),
        (frame(66, 0, 2, 0, 0, False), "Exited of process 2, not started"),
        (frame(67, 0, 2, 0), "StdinAcked of process 2, not started"),
        (frame(67, 0, 1, 1), "STDIN_ACK of process 1 at 1, outside 0 … 0"),
        (frame(64, 2, 0, 100), "REPLY to 2, which is not outstanding"),
        (frame(64, 77, 0, None), "REPLY to 77, which is not outstanding"),
        (frame(1, 1, 1), "HELLO came from the agent"),
        (frame(99, 0), "kind 99 is not in the protocol"),
        (frame(), "message kind"),
        (bytes(8), "frame length 0"),
        (ANSWER, "frame length 1397511001"),
    ],
)
def test_a_breach_ends_the_session_and_is_named(data: bytes, problem: str) -> None:
    breach(started(), data, problem)


@pytest.mark.parametrize(
    ("ask", "body", "problem"),
    [
        (lambda s: s.start(StartProcess(2, (b"a",))), None, "guest pid is a NoneType"),
        (lambda s: s.start(StartProcess(2, (b"a",))), 0, "guest pid = 0"),
        (lambda s: s.stats(), {}, "mem_total_kib is a NoneType"),
        (lambda s: s.signal(1, 9), 5, "reply to SIGNAL has a int where nil belongs"),
        (lambda s: s.configure(CONFIGURE), "ok", "reply to CONFIGURE has a str"),
    ],
)
def test_a_reply_of_the_wrong_form_is_a_breach(
    ask: Callable[[AgentSession], tuple[int, bytes]], body: object, problem: str
) -> None:
    session = started()
    request_id, _ = ask(session)
    breach(session, frame(64, request_id, 0, body), problem)


def test_a_refusal_without_text_is_a_breach() -> None:
    session = started()
    request_id, _ = session.stats()
    breach(session, frame(64, request_id, 5, None), "error message is a NoneType")


@pytest.mark.parametrize("data", [frame(*OUT, 0, b"x"), frame(66, 0, 1, 0, 0, False), frame(67, 0, 1, 0)])
def test_nothing_of_a_process_before_ready(data: bytes) -> None:
    session = AgentSession(NONCE, carry=SessionCarry("boot-1", (ProcCarry(1),)))
    breach(session, ANSWER + data, "process 1, not started by the host")


def test_a_guest_that_refuses_hello_or_speaks_another_version_is_done_with() -> None:
    for reply, problem in (
        (frame(64, 1, 71, "no version 1"), "agent refused HELLO: no version 1"),
        (frame(64, 1, 0, {"version": 3}), "agent speaks version 3"),
    ):
        session = AgentSession(NONCE)
        session.receive(ANSWER, 0.0)
        session.hello()
        breach(session, reply, problem)


def test_events_before_a_breach_in_the_same_read_are_not_lost() -> None:
    error = breach(started(), frame(*OUT, 0, b"last words") + bytes(8), "frame length 0")
    assert error.events == (Output(1, Stream.STDOUT, 0, b"last words"),)


# Resumption


def proc_state(stdin: int = 0, out: int = 0, err: int = 0, exited: bool = False) -> ProcState:
    return ProcState(1, 100, exited, stdin, out, err)


def test_the_carry_is_what_was_acknowledged() -> None:
    session = started()
    session.receive(frame(*OUT, 0, b"abcdef"), 0.0)
    session.ack(1, Stream.STDOUT, 4)
    session.stdin(1, b"hello", eof=True)
    session.receive(frame(67, 0, 1, 2), 0.0)
    session.close()
    assert session.carry() == SessionCarry("boot-1", (ProcCarry(1, 4, 0, 2, b"llo", True, True),))


def test_a_session_that_never_got_ready_hands_its_carry_on() -> None:
    carry = SessionCarry("boot-1", (ProcCarry(1, 5, 6),))
    session = AgentSession(NONCE, carry=carry)
    session.close()
    assert session.carry() == carry


def test_following_acks_what_the_host_has_and_sends_stdin_again() -> None:
    known = ProcCarry(1, 10, 20, 2, b"llo", True)
    session, said = resumed(proc_state(stdin=3, out=8, err=20), known)
    assert said == [[5, 0, 1, 1, 10], [5, 0, 1, 2, 20], [4, 0, 1, 3, b"lo", True]]
    assert session.receive(frame(*OUT, 10, b"new"), 0.0) == [Output(1, Stream.STDOUT, 10, b"new")]
    assert session.receive(frame(67, 0, 1, 5), 0.0) == [StdinAcked(1, 5)]


def test_without_knowledge_the_guests_oldest_byte_is_taken() -> None:
    session, said = resumed(proc_state(stdin=7, out=100, err=3))
    assert said == [[5, 0, 1, 1, 100], [5, 0, 1, 2, 3]]
    assert session.receive(frame(*OUT, 100, b"x"), 0.0) == [Output(1, Stream.STDOUT, 100, b"x")]
    assert unframed(session.stdin(1, b"in")) == [[4, 0, 1, 7, b"in", False]]


def test_acks_of_stdin_sent_by_a_host_that_forgot_it_change_nothing() -> None:
    session, _ = resumed(proc_state(stdin=70000))
    session.stdin(1, b"abc")
    for offset in (69000, 70000, 70001):
        assert session.receive(frame(67, 0, 1, offset), 0.0) == [StdinAcked(1, offset)]
    assert session.carry().procs[0].stdin_unacked == b"bc"
    breach(session, frame(67, 0, 1, 70000), "STDIN_ACK of process 1 at 70000, outside 70001 … 70003")
    session, _ = resumed(proc_state(stdin=70000))
    breach(session, frame(67, 0, 1, 4463), "outside 4464 … 70000")


def test_bytes_sent_again_before_the_ack_was_read_are_dropped_exactly() -> None:
    session, _ = resumed(proc_state(out=4), ProcCarry(1, 10))
    assert session.receive(frame(*OUT, 4, b"abc") + frame(*OUT, 7, b"def"), 0.0) == []
    assert session.receive(frame(*OUT, 10, b"new"), 0.0) == [Output(1, Stream.STDOUT, 10, b"new")]
    breach(session, frame(*OUT, 4, b"abc"), "13 is next")


def test_bytes_sent_again_may_run_over_into_new_ones() -> None:
    session, _ = resumed(proc_state(out=4), ProcCarry(1, 10))
    assert session.receive(frame(*OUT, 4, b"abcdefNEW"), 0.0) == [Output(1, Stream.STDOUT, 10, b"NEW")]
    assert session.receive(frame(*OUT, 13, b"!"), 0.0) == [Output(1, Stream.STDOUT, 13, b"!")]


def test_an_agent_that_reads_the_ack_midway_jumps_to_it_once() -> None:
    session, _ = resumed(proc_state(out=4), ProcCarry(1, 10))
    assert session.receive(frame(*OUT, 4, b"abc") + frame(*OUT, 10, b"new"), 0.0) == [
        Output(1, Stream.STDOUT, 10, b"new")
    ]
    breach(session, frame(*OUT, 7, b"def"), "13 is next")


@pytest.mark.parametrize("offset", [3, 5, 9, 11])
def test_no_other_offset_is_taken_after_a_resume(offset: int) -> None:
    session, _ = resumed(proc_state(out=4), ProcCarry(1, 10))
    breach(session, frame(*OUT, offset, b"abc"), f"at offset {offset}, 10 is next")


def test_an_end_is_not_taken_early() -> None:
    session, _ = resumed(proc_state(out=4), ProcCarry(1, 10))
    breach(session, frame(*OUT, 4, b""), "at offset 4, 10 is next")


@pytest.mark.parametrize(
    ("state", "known", "problem"),
    [
        (proc_state(out=11), ProcCarry(1, 10), "process 1 stdout lost bytes 10 … 11"),
        (proc_state(err=1), ProcCarry(1, 0, 0), "process 1 stderr lost bytes 0 … 1"),
        (proc_state(out=0), ProcCarry(1, 65537), "process 1 stdout is held from 0 on, 65537 is next"),
        (proc_state(stdin=6), ProcCarry(1, 0, 0, 2, b"llo"), "stdin of process 1 stands at 6, outside 2 … 5"),
        (proc_state(stdin=1), ProcCarry(1, 0, 0, 2, b"llo"), "stands at 1, outside 2 … 5"),
    ],
)
def test_a_guest_that_lost_or_made_up_bytes_is_a_breach(state: ProcState, known: ProcCarry, problem: str) -> None:
    session = AgentSession(NONCE, carry=SessionCarry("boot-1", (known,)))
    session.receive(ANSWER, 0.0)
    session.hello()
    breach(session, hello_reply(state), problem)


def test_nothing_of_a_process_before_it_is_followed() -> None:
    for data in (frame(*OUT, 0, b"x"), frame(66, 0, 1, 0, 0, False)):
        breach(ready(proc_state()), data, "of process 1 before the host followed it")


def test_a_request_before_following_is_refused_since_it_would_start_the_output() -> None:
    session = ready(proc_state())
    calls: list[Callable[[], object]] = [
        lambda: session.signal(1, 9),
        lambda: session.winsize(1, 1, 1),
        lambda: session.forget(1),
        lambda: session.stdin(1, b"x"),
        lambda: session.ack(1, Stream.STDOUT, 0),
    ]
    for call in calls:
        with pytest.raises(BadRequest, match="follow it before"):
            call()
    session.follow(1)
    with pytest.raises(BadRequest, match="followed already"):
        session.follow(1)
    for call in calls:
        call()


def test_a_rebooted_guest_voids_the_carry() -> None:
    carry = SessionCarry("boot-0", (ProcCarry(1, 500, 500, 9, b"zzz"),))
    session = ready(proc_state(), carry=carry)
    assert session.carry() == SessionCarry("boot-1", (ProcCarry(1, 0, 0, 0),))
    events: list[AgentEvent] = []
    session = AgentSession(NONCE, carry=carry)
    events += session.receive(ANSWER, 0.0)
    session.hello()
    events += session.receive(hello_reply(), 0.0)
    assert isinstance(events[1], HelloReceived)
    assert events[1].rebooted
    assert session.procs == ()
