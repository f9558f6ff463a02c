"""Daemons by pid file: started and awaited, never mistaken for another process, ended for certain."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.cli import daemons
from controlplane.cli.errors import DaemonFailed
from controlplane.cli.home import Home
from tests.controlplane.cli.fakefabric import until

READY = 'print(\'{"ready": true, "address": "127.0.0.1:1"}\', flush=True)'
WAITS = f"import signal, os; print('hello', flush=True); {READY}; signal.pause()"
DEAF = f"import signal, os; signal.signal(15, signal.SIG_IGN); {READY}\nwhile True: signal.pause()"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    home.prepare()
    yield home
    for file in home.pids.iterdir():
        daemon = daemons.recorded(home, file.stem)
        if daemon is not None:
            daemons.stop(daemon, grace_s=0.0)


def start(home: Home, program: str, deadline_s: float = 20.0) -> daemons.Daemon:
    return daemons.start(home, "d", [sys.executable, "-c", program], deadline_s=deadline_s)


def test_a_daemon_is_started_known_and_ended(home: Home) -> None:
    daemon = start(home, WAITS)
    assert daemon.address == "127.0.0.1:1"
    assert daemons.running(home, "d") == daemon
    assert os.getsid(daemon.pid) == daemon.pid  # a terminal's signals do not reach it
    assert daemons.uptime_s(daemon) < 60
    assert daemons.stop(daemon, grace_s=10.0)
    assert daemons.running(home, "d") is None
    assert daemons.stop(daemon, grace_s=0.0)  # also when it is gone
    assert daemons.tail(home.log / "d.log")[0] == "hello"


def test_one_that_does_not_listen_is_killed(home: Home) -> None:
    daemon = start(home, DEAF)
    assert daemons.stop(daemon, grace_s=0.1)
    assert not daemons.is_alive(daemon)


def test_a_pid_that_is_another_process_now_is_never_signalled(home: Home) -> None:
    daemon = start(home, WAITS)
    for other in (replace(daemon, start_ticks=daemon.start_ticks - 1), replace(daemon, boot_id="another")):
        assert not daemons.is_alive(other)
        assert daemons.stop(other, grace_s=0.0)
    assert daemons.is_alive(daemon)


def test_one_that_ends_first_shows_the_end_of_its_log(home: Home) -> None:
    with pytest.raises(DaemonFailed) as caught:
        start(home, "print('why', flush=True); raise SystemExit(3)")
    assert (caught.value.on, caught.value.log_tail) == ("exit code 3", ("why",))
    assert daemons.recorded(home, "d") is None


def test_one_that_is_never_ready_is_ended(home: Home) -> None:
    waited: list[float] = []
    program = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with pytest.raises(DaemonFailed, match=r"not ready after 0\.5 s") as caught:
        daemons.start(home, "d", [sys.executable, "-c", program], deadline_s=0.5, waiting=waited.append)
    assert waited
    pid = int((home.log / "d.log").read_text().split()[0])
    assert pid > 1
    assert daemons.start_ticks(pid) is None
    assert caught.value.log_tail == (str(pid),)


def test_what_cannot_be_started_is_named(home: Home) -> None:
    with pytest.raises(DaemonFailed, match="d cannot be started: /no/such"):
        daemons.start(home, "d", ["/no/such"], deadline_s=1.0)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": 1, "start_ticks": 1, "boot_id": "", "address": ""}'])
def test_a_pid_file_that_is_none_counts_as_missing(home: Home, text: str) -> None:
    daemons.pid_file(home, "d").write_text(text)
    assert daemons.recorded(home, "d") is None


@pytest.mark.parametrize(
    ("line", "address"),
    [
        (b'{"ready": true, "address": "a:1"}', "a:1"),
        (b'{"ready": false, "address": "a:1"}', None),
        (b'{"ready": true}', None),
        (b"{", None),
        (b"[1]", None),
        (b"ready", None),
    ],
)
def test_ready_lines(line: bytes, address: str | None) -> None:
    assert daemons.ready_address(line) == address


def test_a_zombie_is_not_alive(home: Home) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    until(lambda: daemons.start_ticks(pid) is None)
    assert Path(f"/proc/{pid}").exists()
    os.waitpid(pid, 0)


def test_a_large_log_is_turned_over(home: Home) -> None:
    log = home.log / "d.log"
    with log.open("wb") as file:
        file.truncate(daemons.LOG_KEEP_BYTES + 1)
    daemon = start(home, WAITS)
    assert (home.log / "d.log.1").stat().st_size > daemons.LOG_KEEP_BYTES
    assert json.loads(daemons.pid_file(home, "d").read_text())["pid"] == daemon.pid
    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: not daemons.is_alive(daemon))
