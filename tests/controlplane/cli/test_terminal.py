"""`run -it`, `exec -it` and `attach` on a real pseudo-terminal, and signals passed on."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import signal
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from controlplane.cli.command import Stdio
from controlplane.cli.main import main, shell_for
from tests.controlplane.cli.conftest import Cli, Done
from tests.controlplane.cli.fakefabric import FakeFabric, FakeProcess, until


@dataclass
class Terminal:
    """A pseudo-terminal whose screen is read all the time; `user` acts in a thread while a command runs."""

    home: Path
    master: int
    slave: int
    screen: bytearray

    def run(self, *argv: str, user: Callable[[], None]) -> Done:
        acting = threading.Thread(target=user, daemon=True)
        acting.start()
        told = io.StringIO()
        stdio = Stdio(self.slave, self.slave, self.slave)
        with contextlib.redirect_stderr(told):
            environ = {"SANDLOOM_HOME": str(self.home)}
            ended = main(argv, environ, lambda g, e: replace(shell_for(g, e), stdio=stdio))
        acting.join(10)
        assert not acting.is_alive(), "the user is still at it"
        return Done(ended.code, bytes(self.screen).decode(), told.getvalue())

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def shows(self, text: bytes) -> None:
        until(lambda: text in self.screen)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.kill(os.getpid(), signal.SIGWINCH)


@pytest.fixture
def terminal(cli: Cli) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    terminal = Terminal(cli.home, master, slave, bytearray())

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the slave is closed
            while piece := os.read(master, 4096):
                terminal.screen += piece

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    yield terminal
    os.close(slave)
    reader.join(10)
    os.close(master)


def shell_like(process: FakeProcess) -> int:
    """Says its window's size, then echoes; `q` ends it."""
    process.out(b"size %d %d\r\n" % (process.asked.tty_rows, process.asked.tty_cols))
    while data := process.stdin.get(timeout=10):
        process.out(b"<" + data + b">")
        if b"q" in data:
            return 4
    return 0


def test_keys_go_through_raw_and_the_terminal_is_as_before(fabric: FakeFabric, terminal: Terminal) -> None:
    fabric.programs["sh"] = shell_like
    before = termios.tcgetattr(terminal.slave)

    def user() -> None:
        terminal.shows(b"size 33 101")
        terminal.type(b"\x03")  # ctrl-c is for the program, as are \r and ctrl-p alone
        terminal.shows(b"<\x03>")
        terminal.type(b"\r")
        terminal.shows(b"<\r>")
        terminal.type(b"q")

    done = terminal.run("run", "-it", "debian", "--", "sh", user=user)
    assert done.code == 4
    assert termios.tcgetattr(terminal.slave) == before


def test_a_changed_window_is_told(fabric: FakeFabric, terminal: Terminal) -> None:
    def program(process: FakeProcess) -> int:
        process.out(b"here")
        rows, columns = process.windows.get(timeout=10)
        return rows + columns

    fabric.programs["sh"] = program

    def user() -> None:
        terminal.shows(b"here")
        terminal.resize(50, 120)

    assert terminal.run("exec", "-it", fabric.add("box").name, "--", "sh", user=user).code == 170


def test_the_detach_keys_leave_it_running(fabric: FakeFabric, terminal: Terminal) -> None:
    fabric.programs["sh"] = shell_like

    def user() -> None:
        terminal.shows(b"size")
        terminal.type(b"\x10")
        terminal.type(b"\x11")

    done = terminal.run("run", "-it", "--name", "box", "debian", "--", "sh", user=user)
    assert done.code == 0
    assert "detached: box keeps running: follow it with `sandloom attach box`" in done.err

    def user_again() -> None:
        terminal.type(b"x")
        terminal.shows(b"<x>")
        terminal.type(b"q")

    assert terminal.run("attach", "box", user=user_again).code == 4


def test_a_terminal_is_taken_up_again_after_a_broken_stream(fabric: FakeFabric, terminal: Terminal) -> None:
    fabric.programs["sh"] = shell_like
    fabric.break_after = 1

    def user() -> None:
        terminal.shows(b"size 33 101")
        terminal.type(b"a")
        terminal.shows(b"<a>")
        terminal.type(b"q")

    done = terminal.run("run", "-it", "--name", "box", "debian", "--", "sh", user=user)
    assert done.code == 4
    assert done.out.count("size 33 101") == 1
    assert "the connection broke: box runs on: attaching again" in done.err


def test_t_without_a_terminal_is_refused(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("run", "-it", "debian", "--", "sh")
    assert (done.code, fabric.sandboxes) == (125, {})
    assert "-t needs a terminal" in done.err


def says_its_signal(process: FakeProcess) -> int:
    process.out(b"up")
    return 100 + process.signals.get(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["run debian -- p", "exec box -- p"])
def test_signals_are_for_the_process(
    fabric: FakeFabric, terminal: Terminal, number: signal.Signals, command: str
) -> None:
    fabric.programs["p"] = says_its_signal
    fabric.add("box")

    def user() -> None:
        terminal.shows(b"up")
        os.kill(os.getpid(), number)

    assert terminal.run(*command.split(), user=user).code == 100 + number


def test_one_that_does_not_heed_is_left_after_three(fabric: FakeFabric, terminal: Terminal) -> None:
    def deaf(process: FakeProcess) -> int:
        process.out(b"up")
        while process.stdin.get(timeout=10):
            pass
        return 0

    fabric.programs["deaf"] = deaf

    def user() -> None:
        terminal.shows(b"up")
        process = next(iter(fabric.processes.values()))
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda count=count: process.signals.qsize() == count)  # type: ignore[misc]
        os.kill(os.getpid(), signal.SIGINT)

    done = terminal.run("run", "--name", "box", "debian", "--", "deaf", user=user)
    assert done.code == 130
    assert "SIGINT: box keeps running" in done.err
    assert [box.name for box in fabric.sandboxes.values()] == ["box"]


def test_ctrl_c_before_it_started_takes_it_back(fabric: FakeFabric, cli: Cli) -> None:
    fabric.beginning.clear()
    fabric.programs["late"] = lambda process: process.signals.get(timeout=10)

    def user() -> None:
        until(lambda: any(name == "AttachSandbox" for name, _ in fabric.calls))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=user, daemon=True).start()
    done = cli("run", "--rm", "debian", "--", "late")
    assert (done.code, fabric.sandboxes) == (130, {})
