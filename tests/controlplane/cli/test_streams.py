"""`exec`, `attach`, `logs` and `wait` over a real connection; and where a reader takes up a replayed output."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import attachment, lookup
from controlplane.cli.logs import Stamper
from controlplane.cli.resume import Position
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric, FakeProcess, until

Output = sandboxes_pb2.StreamOutput


def talk(process: FakeProcess) -> int:
    for i in range(1, 4):
        process.out(b"line %d\n" % i)
    process.err(b"e\n")
    return 0


def test_exec_gives_output_and_exit_code(fabric: FakeFabric, cli: Cli) -> None:
    def program(process: FakeProcess) -> int:
        process.out(b"|".join(word.encode() for word in [*process.asked.argv, process.asked.workdir]))
        process.err(process.asked.env["A"].encode())
        return 9

    fabric.programs["p"] = program
    fabric.add("box")
    done = cli("exec", "-e", "A=1", "-w", "/tmp", "box", "--", "p", "-a", "--", "b")
    assert (done.code, done.out, done.err) == (9, "p|-a|--|b|/tmp", "1")


def test_exec_by_a_prefix_of_the_uid(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["p"] = lambda process: 0
    box, other = fabric.add("box"), fabric.add("other")
    assert cli("exec", box.uid[:-1], "--", "p").err.startswith("sandloom: several sandboxes' uids begin with")
    del fabric.sandboxes[other.uid]
    assert cli("exec", box.uid[:5], "--", "p").code == 0


def test_a_name_that_is_nearly_right_is_suggested(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("webserver")
    done = cli("exec", "webservr", "--", "p")
    assert (done.code, "did you mean webserver?" in done.err) == (125, True)


def test_exec_in_one_that_ended_says_so(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("box", sandboxes_pb2.EXITED)
    done = cli("exec", "box", "--", "p")
    assert (done.code, "it has ended (EXITED)" in done.err) == (125, True)


def test_exec_without_a_command_says_how(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("exec", "box", "ls")
    how = "a program to run stands after --: `sandloom exec … -- ls`"
    assert (done.code, done.err) == (125, f"sandloom: too many words: ls: {how}\n")
    assert "sandloom exec box -- ls /" in cli("exec", "box").err


def test_logs_keep_streams_apart_and_cut_the_tail(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["talk"] = talk
    cli.ok("run", "-d", "--name", "box", "debian", "--", "talk")
    assert cli("wait", "box").out == "0\n"
    done = cli("logs", "box")
    assert (done.out, done.err) == ("line 1\nline 2\nline 3\n", "e\n")
    tail = cli("logs", "--tail", "2", "box")
    assert (tail.out, tail.err) == ("line 3\n", "e\n")
    stamped = cli.ok("logs", "--timestamps", "box")
    assert stamped.splitlines()[0] == "2023-11-14T22:13:20.000000000Z line 1"


def test_followed_logs_survive_a_broken_stream(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["talk"] = talk
    cli.ok("run", "-d", "--name", "box", "debian", "--", "talk")
    fabric.break_after = 2
    done = cli("logs", "-f", "box")
    assert (done.code, done.out, done.err) == (0, "line 1\nline 2\nline 3\n", "e\n")


def test_wait_gives_the_exit_code(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["seven"] = lambda process: 7
    cli.ok("run", "-d", "--name", "box", "debian", "--", "seven")
    done = cli("wait", "box")
    assert (done.code, done.out) == (7, "7\n")
    fabric.add("broken", sandboxes_pb2.FAILED, reason="VmmExited", message="QEMU ended")
    assert cli("wait", "broken").code == 125


def test_attach_from_the_start_and_of_an_ended_one(fabric: FakeFabric, cli: Cli) -> None:
    def program(process: FakeProcess) -> int:
        process.out(b"early\n")
        until(lambda: any(name == "AttachSandbox" for name, _ in fabric.calls))
        process.err(b"late\n")
        return 6

    fabric.programs["p"] = program
    cli.ok("run", "-d", "--name", "box", "debian", "--", "p")
    done = cli("attach", "--from-start", "box")
    assert (done.code, done.out, done.err) == (6, "early\n", "late\n")
    assert cli("attach", "box").err.startswith("sandloom: cannot attach to box: it has ended: ")


def test_attach_to_a_host_that_does_not_answer_ends(
    fabric: FakeFabric, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try takes longer than a moment: that is no sign that it got through."""
    monkeypatch.setattr(attachment, "RETRY_S", 0.01)
    monkeypatch.setattr(lookup, "PATIENCE_S", 0.5)
    fabric.add("box")
    fabric.unreachable_s = 0.1
    done = cli("attach", "box")
    assert (done.code, "the connection to box is lost: host loom does not answer" in done.err) == (125, True), done
    assert "the connection broke: box runs on: attaching again" in done.err
    done = cli("logs", "-f", "box")
    assert (done.code, "host loom does not answer" in done.err) == (1, True), done


def test_a_signal_ends_an_attach_that_has_nobody_to_give_it_to(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("box", sandboxes_pb2.PENDING, message="waiting for a host: HostLost on 1 host")
    fabric.unreachable_s = 60.0

    def interrupt() -> None:
        until(lambda: any(name == "AttachSandbox" for name, _ in fabric.calls), 60.0)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=interrupt)
    killer.start()
    done = cli("attach", "box")
    killer.join()
    assert (done.code, "SIGTERM: box keeps running" in done.err) == (128 + signal.SIGTERM, True), done
    assert "box is pending: waiting for a host: HostLost on 1 host" in done.err


def test_followed_logs_say_what_they_wait_for(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["talk"] = talk
    cli.ok("run", "-d", "--name", "box", "debian", "--", "talk")
    (box,) = fabric.sandboxes.values()
    box.status.phase, box.status.message = sandboxes_pb2.PENDING, "waiting for a host: no host has registered yet"
    done = cli("logs", "-f", "box")
    assert done.out == "line 1\nline 2\nline 3\n"
    assert "box is pending: waiting for a host: no host has registered yet" in done.err


def replay(position: Position, pieces: list[tuple[str, bytes, int]]) -> bytes:
    position.replayed()
    return b"".join(position.fresh(Output(**{stream: data, "time_unix_ns": at})) for stream, data, at in pieces)  # type: ignore[arg-type]


PIECES = [("stdout", b"ab", 5), ("stderr", b"x", 5), ("stdout", b"cd", 5), ("stdout", b"ef", 9)]


@pytest.mark.parametrize("seen", range(len(PIECES) + 1))
def test_a_replay_adds_exactly_what_is_new(seen: int) -> None:
    position = Position(complete=True)
    first = replay(position, PIECES[:seen])
    assert first + replay(position, PIECES) in (b"abxcdef", b"abxcdef")
    assert replay(position, [*PIECES, ("stderr", b"!", 9)]) == b"!"


@pytest.mark.parametrize("seen", range(1, len(PIECES) + 1))
def test_a_record_that_was_turned_over_is_taken_up_by_time(seen: int) -> None:
    """The oldest pieces are gone: what is replayed begins later than what was first seen."""
    position = Position(complete=True)
    pieces = [("stdout", b"old", 1), *PIECES]
    first = replay(position, pieces[: seen + 1])
    assert first + replay(position, PIECES) == b"oldabxcdef"


def test_a_reader_of_the_end_only_goes_on_from_there() -> None:
    position = Position(complete=False)
    assert replay(position, PIECES[3:]) == b"ef"
    assert replay(position, [*PIECES, ("stdout", b"gh", 10)]) == b"gh"


def test_stamps_mark_lines_and_not_pieces() -> None:
    stamper = Stamper()
    first = stamper.stamped("stdout", b"a\r\nb", 1_000_000_001)
    assert first == b"1970-01-01T00:00:01.000000001Z a\r\n1970-01-01T00:00:01.000000001Z b"
    assert stamper.stamped("stderr", b"e\n", 0) == b"1970-01-01T00:00:00.000000000Z e\n"
    assert stamper.stamped("stdout", b"c\n", 2_000_000_000) == b"c\n"
