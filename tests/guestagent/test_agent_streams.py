"""The real agent's streams: windows both ways, terminals, and connections that break anywhere."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import socket
import struct
import time
import zlib

import pytest

from guestagent.errors import GuestRefused
from guestagent.frames import ANSWER_MAGIC, SYNC_MAGIC, encode_frame, sync_flush
from guestagent.messages import Output, StartProcess, StdinAcked, Stream
from tests.guestagent.realagent import CONFIGURE, Link, RealAgent

WINDOW = 65536


def held_back(link: Link, proc: int) -> int:
    """How much output came while nothing was acknowledged."""
    link.wait(lambda: len(link.out(proc)) >= WINDOW)
    link.settle()
    return len(link.out(proc))


def rest_of(link: Link, proc: int) -> None:
    """From now on everything is acknowledged at once."""
    link.auto_ack = True
    for stream in Stream:
        if link.out(proc, stream):
            link.ack(proc, stream, len(link.out(proc, stream)))


def test_output_waits_for_acknowledgement(agent: RealAgent, link: Link) -> None:
    link.auto_ack = False
    link.shell(2, "head -c 3000000 /dev/zero | tr '\\0' x; echo done >&2")
    assert held_back(link, 2) == WINDOW
    assert link.out(2, Stream.STDERR) == b""  # the process itself is held up
    assert link.stats().procs >= 1  # and nothing else is
    rest_of(link, 2)
    assert link.exited(2) == (0, 0)
    assert link.out(2) == b"x" * 3_000_000
    assert link.out(2, Stream.STDERR) == b"done\n"


def test_one_stalled_stream_holds_up_no_other(link: Link) -> None:
    link.auto_ack = False
    link.shell(2, "exec cat /dev/zero")
    held_back(link, 2)
    link.shell(3, "seq 1 1000; exit 4")
    assert link.exited(3) == (4, 0)
    assert link.out(3).split()[-1] == b"1000"
    link.ask(link.session.signal(2, signal.SIGKILL))
    rest_of(link, 2)
    assert link.exited(2) == (-1, signal.SIGKILL)


def test_stdin_goes_round_whole(link: Link) -> None:
    data = random.Random(7).randbytes(1_500_000)
    link.start(2, "cat", stdin=True)
    link.feed(2, data, eof=True)
    assert link.exited(2) == (0, 0)
    assert hashlib.sha256(link.out(2)).digest() == hashlib.sha256(data).digest()
    assert [event.offset for event in link.events if isinstance(event, StdinAcked)][-1] == len(data)


def test_stdin_waits_for_a_process_that_does_not_read(link: Link) -> None:
    link.start(2, "sleep", "1000", stdin=True)
    link.send(link.session.stdin(2, b"x" * WINDOW))
    link.wait(lambda: StdinAcked(2, WINDOW) in link.events)
    link.send(link.session.stdin(2, b"x" * WINDOW))
    link.settle()
    assert link.session.stdin_room(2) == 0  # pipe and window are full
    link.ask(link.session.signal(2, signal.SIGKILL))
    link.exited(2)


def test_stdin_of_a_process_that_closed_it_is_dropped(link: Link) -> None:
    link.shell(2, "trap 'exit 5' TERM; exec <&-; echo closed; while :; do sleep 0.02; done", stdin=True)
    link.wait(lambda: link.out(2) == b"closed\n")
    link.feed(2, b"x" * 200_000)
    link.wait(lambda: StdinAcked(2, 200_000) in link.events)
    link.ask(link.session.signal(2, signal.SIGTERM))
    assert link.exited(2) == (5, 0)


def test_without_stdin_it_reads_end_of_file(link: Link) -> None:
    assert link.result(2, "wc -c") == "0"
    assert link.result(3, "wc -c", tty=True).strip() == "0"


def test_a_terminal(link: Link) -> None:
    seen = link.result(
        2, "test -t 0 && test -t 1 && test -t 2 && tty && stty size && stat -c '%u %a' $(tty)",
        tty=True, rows=33, cols=111, user=b"daemon",
    ).splitlines()  # fmt: skip
    assert re.fullmatch(r"/dev/pts/\d+", seen[0])
    assert seen[1:3] == ["33 111", "1 620"]
    assert (2, Stream.STDERR) in link.ended and link.out(2, Stream.STDERR) == b""


def test_a_terminals_size_and_keys(link: Link) -> None:
    link.shell(2, "trap 'stty size' WINCH; trap 'echo int; exit 9' INT; echo ready; while :; do sleep 0.02; done",
               tty=True, stdin=True)  # fmt: skip
    link.wait(lambda: b"ready" in link.out(2))
    link.ask(link.session.winsize(2, 50, 132))
    link.wait(lambda: b"50 132\r\n" in link.out(2))
    link.send(link.session.stdin(2, b"\x03"))
    assert link.exited(2) == (9, 0)
    assert link.out(2).endswith(b"int\r\n")


def test_a_terminals_end_of_file(link: Link) -> None:
    link.start(2, "cat", tty=True, stdin=True)
    link.feed(2, b"hello\n", eof=True)
    assert link.exited(2) == (0, 0)
    assert link.out(2) == b"hello\r\nhello\r\n"


def test_a_terminal_that_is_let_go_of_can_be_opened_again(link: Link) -> None:
    """While nobody holds it, neither is its process hung up on nor is what comes later lost."""
    link.shell(2, "exec < /dev/null > /dev/null 2>&1; sleep 0.2; echo back > /dev/tty; sleep 0.1; exit 4", tty=True)
    assert link.exited(2) == (4, 0)
    assert link.out(2) == b"back\r\n"


def test_a_terminal_hangs_up_its_session(link: Link) -> None:
    link.shell(2, "(trap 'exit 3' HUP; while :; do sleep 0.02; done) & echo $!", tty=True, stdin=True)
    assert link.exited(2) == (0, 0)
    child = int(link.out(2).split()[0])  # the shell may say "Hangup" after it: it was still there to see it
    link.shell(3, f"while kill -0 {child} 2>&1; do :; done > /dev/null")
    assert link.exited(3) == (0, 0)


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_survives_any_number_of_connections(agent: RealAgent, link: Link, seed: int) -> None:
    """Cut anywhere, acknowledged or not, the bytes of both directions are exact."""
    rng = random.Random(seed)
    total = 400_000
    link.shell(2, f"exec 3<&0; cat <&3 >&2 & seq 1 1000000 | head -c {total}; wait; exit 6", stdin=True)
    sent = 0
    given = random.Random(99).randbytes(total)
    came = {stream: bytearray() for stream in Stream}
    for _cut in range(12):
        goal = len(came[Stream.STDOUT]) + rng.randrange(1, total // 10)
        link.auto_ack = False
        for _step in range(rng.randrange(1, 30)):
            room = min(link.session.stdin_room(2), total - sent, rng.randrange(1, 9000))
            if room > 0:
                link.send(link.session.stdin(2, given[sent : sent + room]))
                sent += room
            link.turn(0.01)
            if rng.random() < 0.5:
                for stream in Stream:
                    if link.out(2, stream):
                        link.ack(2, stream, len(came[stream]) + len(link.out(2, stream)))
            if len(came[Stream.STDOUT]) + len(link.out(2)) > goal:
                break
        for stream in Stream:
            came[stream] += link.out(2, stream)
            if link.out(2, stream):
                link.session.ack(2, stream, len(came[stream]))  # what the host holds, though the agent never hears it
        link = agent.connect(link.hang_up(), auto_ack=False)
        link.send(link.session.follow(2))
    link.auto_ack = True
    for stream in Stream:
        if link.out(2, stream):
            link.ack(2, stream, len(came[stream]) + len(link.out(2, stream)))
    link.feed(2, given[sent:], eof=True)
    assert link.exited(2) == (6, 0)
    for stream in Stream:
        came[stream] += link.out(2, stream)
    assert bytes(came[Stream.STDOUT]) == b"".join(b"%d\n" % n for n in range(1, 100_000))[:total]
    assert bytes(came[Stream.STDERR]) == given


def test_the_exit_is_told_again_until_forgotten(agent: RealAgent, link: Link) -> None:
    link.shell(2, "echo kept; exit 8")
    link.exited(2)
    for _again in range(2):
        link = agent.connect(link.hang_up())
        assert link.state is not None and link.state.procs[0].exited
        link.settle(0.1)
        assert link.exits == {}  # not before it is followed
        link.send(link.session.follow(2))
        assert link.exited(2) == (8, 0)
    link.ask(link.session.forget(2))
    link = agent.connect(link.hang_up())
    assert link.state is not None and link.state.procs == ()


def test_output_is_kept_while_nobody_listens(agent: RealAgent, link: Link) -> None:
    link.shell(2, "read go; seq 1 20000; exit 1", stdin=True)
    link.send(link.session.stdin(2, b"go\n"))
    while link._unsent:
        link.turn(0.1)
    carry = link.hang_up()
    again = agent.connect(carry)
    again.send(again.session.follow(2))
    assert again.exited(2) == (1, 0)
    assert again.out(2) == b"".join(b"%d\n" % n for n in range(1, 20001))


def raw(agent: RealAgent) -> socket.socket:
    """A connection without a session."""
    if agent._sock is not None:
        agent._sock.close()
    agent._sock = socket.socket(socket.AF_UNIX)
    agent._sock.settimeout(10)
    agent._sock.connect(str(agent.path))
    return agent._sock


def answer(sock: socket.socket, nonce: bytes) -> bytes:
    """Reads up to and with the answer to SYNC; what came before it."""
    data = b""
    while ANSWER_MAGIC + nonce not in data:
        piece = sock.recv(65536)
        assert piece, data[-64:]
        data += piece
    before, _, after = data.partition(ANSWER_MAGIC + nonce)
    assert after == b""
    return before


HALVES = [
    b"\x00",
    b"\x00\x01\x00",
    b"\x00\x02\x00\x00\x00\x00\x00",
    struct.pack(">II", 131072, 0),
    struct.pack(">II", 131072, 0) + b"x" * 131071,
    struct.pack(">II", 1, 0) + b"x",
    struct.pack(">II", 0, 0),
    struct.pack(">II", 131073, 0),
    encode_frame([1, 1, 1])[:-1],
    SYNC_MAGIC + b"half",
]


@pytest.mark.parametrize("half", HALVES, ids=range(len(HALVES)))
def test_sync_is_found_after_any_half_frame(agent: RealAgent, link: Link, half: bytes) -> None:
    """On one and the same connection: what a host that restarts leaves behind."""
    sock = raw(agent)
    sock.sendall(sync_flush(b"first..."))
    assert answer(sock, b"first...") == b""
    sock.sendall(half)
    sock.sendall(sync_flush(b"second.."))
    assert answer(sock, b"second..") == b""
    sock.sendall(sync_flush(b"second..")[:160] + encode_frame([1, 1, 1]))  # its own SYNC is swallowed at a boundary
    reply = sock.recv(65536)
    assert zlib.crc32(reply[8:]) == struct.unpack_from(">I", reply, 4)[0]


def test_garbage_does_nothing(agent: RealAgent) -> None:
    rng = random.Random(3)
    for _round in range(40):
        sock = raw(agent)
        for _piece in range(rng.randrange(1, 5)):
            sock.sendall(
                rng.choice([rng.randbytes(rng.randrange(1, 5000)), SYNC_MAGIC, b"\x00\x00", encode_frame([3])])
            )
    link = agent.configured()
    assert link.result(2, "echo well") == "well"


BAD_MESSAGES = [
    [1, 5, "1"],
    [2, 5, {}],
    [3, 5, {"proc": 2, "argv": []}],
    [3, 5, {"proc": 2, "argv": [b"a\x00b"], "env": [], "cwd": b"/", "user": b"", "rows": 1, "cols": 1}],
    [6, 5, 2, 65],
    [6, 5, 2, -1],
    [7, 5, 2, 65536, 1],
    [8, 5, None],
    [10, 5, 0],
    [1, 5],
]


@pytest.mark.parametrize("message", BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_a_malformed_request_is_answered(agent: RealAgent, message: list[object]) -> None:
    link = agent.configured()
    request_id, _data = link.session.stats()
    message[1] = request_id
    link.send(encode_frame(message))
    link.wait(lambda: request_id in link.replies)
    with pytest.raises(GuestRefused) as caught:
        link.replies[request_id].result()
    assert (caught.value.errno, bool(caught.value.message)) == (errno.EINVAL, True)
    assert link.result(2, "echo well") == "well"


@pytest.mark.parametrize(
    "payload", [b"\xc1", b"\x91", b"\xdd\xff\xff\xff\xff", b"\x90" * 9, b"\x91" * 9 + b"\xc0", b"\x01"]
)
def test_a_payload_that_is_no_message_is_left_out(agent: RealAgent, payload: bytes) -> None:
    link = agent.configured()
    link.send(struct.pack(">II", len(payload), zlib.crc32(payload)) + payload)
    assert link.result(2, "echo well") == "well"


def test_notices_about_nobody_are_left_out(link: Link) -> None:
    link.send(encode_frame([5, 0, 77, 1, 10]) + encode_frame([4, 0, 77, 0, b"x", True]))
    link.shell(2, "read line; exit 3", stdin=True)
    for offset in (5, 2**64 - 1):  # gaps and overflows
        link.send(encode_frame([4, 0, 2, offset, b"x" * 10, True]) + encode_frame([5, 0, 2, 1, offset]))
    link.settle(0.1)
    assert link.exits == {}
    link.send(link.session.stdin(2, b"line\n"))
    assert link.exited(2) == (3, 0)


def test_a_host_that_does_not_read_is_not_listened_to(agent: RealAgent) -> None:
    """Requests without end from a host that takes no answer: memory stays bounded, the next host finds all well."""
    link = agent.configured()
    link.auto_ack = False
    request = encode_frame([8, 1000])
    stalled = taken = 0
    give_up = time.monotonic() + 10
    while stalled < 20 and time.monotonic() < give_up:
        try:
            taken += link.sock.send(request * 64)
            stalled = 0
        except BlockingIOError:
            stalled += 1
            time.sleep(0.005)
    assert stalled == 20
    assert taken < 1 << 20
    assert agent.connect().state is not None


def test_requests_before_hello_are_refused(agent: RealAgent) -> None:
    sock = raw(agent)
    sock.sendall(sync_flush(b"nonce..."))
    answer(sock, b"nonce...")
    sock.sendall(encode_frame([8, 1]))
    assert b"HELLO comes first" in sock.recv(4096)


def test_versions_must_agree(agent: RealAgent) -> None:
    sock = raw(agent)
    sock.sendall(sync_flush(b"nonce..."))
    answer(sock, b"nonce...")
    sock.sendall(encode_frame([1, 1, 2]))
    assert b"version 1" in sock.recv(4096)


def test_everything_at_once(agent: RealAgent, link: Link) -> None:
    """Thirty talkers, listeners and terminals together; every byte arrives."""
    expected = b"".join(b"%d\n" % n for n in range(1, 5001))
    for proc in range(2, 32):
        argv = [(b"seq", b"1", b"5000"), (b"cat",), (b"sh", b"-c", b"stty -onlcr; seq 1 5000")][proc % 3]
        start = StartProcess(proc, argv, (b"PATH=/usr/bin:/bin",), stdin=proc % 3 == 1, tty=proc % 3 == 2)
        link.send(link.session.start(start)[1])
    for proc in range(4, 32, 3):
        link.feed(proc, expected, eof=True)
    link.wait(lambda: len(link.exits) == 30, 60)
    for proc in range(2, 32):
        assert link.out(proc) == expected, proc
        link.ask(link.session.forget(proc))
    assert not [event for event in link.events if isinstance(event, Output) and len(event.data) > 32768]
    assert len(os.listdir(f"/proc/{agent.process.pid}/fd")) < 20  # noqa: PTH208


def test_configure_can_be_asked_again_by_the_next_host(agent: RealAgent) -> None:
    link = agent.connect()
    carry = link.hang_up()
    link = agent.connect(carry)
    assert link.ask(link.session.configure(CONFIGURE)) is None
