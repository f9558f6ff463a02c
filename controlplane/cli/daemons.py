"""Daemons of `dev up`: started in a session of their own, known by pid and start time, ended through a pidfd.

HOME/pids/NAME.json: {"pid", "start_ticks", "boot_id", "address"}. A process is ours only when pid, start time
(field 22 of /proc/PID/stat, clock ticks since boot) and boot all match, so that a reused pid is never signalled.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import controlplane
from controlplane.cli.errors import DaemonFailed
from controlplane.cli.home import Home, replace_file

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOG_KEEP_BYTES = 8 << 20
TAIL_LINES = 15
POLL_S = 0.05


@dataclass(frozen=True)
class Daemon:
    """A started daemon as its pid file has it; `address` is what its ready line said."""

    pid: int
    start_ticks: int
    boot_id: str
    address: str


def boot_id() -> str:
    return BOOT_ID.read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = stat.rpartition(b")")[2].split()  # the name may hold blanks and parentheses (proc(5))
    return None if after_name[0] in (b"Z", b"X") else int(after_name[19])


def pid_file(home: Home, name: str) -> Path:
    return home.pids / f"{name}.json"


def recorded(home: Home, name: str) -> Daemon | None:
    """What the pid file says, alive or not; None without one or when it is not readable as one."""
    try:
        raw = json.loads(pid_file(home, name).read_bytes())
        daemon = Daemon(int(raw["pid"]), int(raw["start_ticks"]), str(raw["boot_id"]), str(raw["address"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return daemon if daemon.pid > 1 else None


def is_alive(daemon: Daemon) -> bool:
    return daemon.boot_id == boot_id() and start_ticks(daemon.pid) == daemon.start_ticks


def running(home: Home, name: str) -> Daemon | None:
    """The recorded daemon when it is alive."""
    daemon = recorded(home, name)
    return daemon if daemon is not None and is_alive(daemon) else None


def uptime_s(daemon: Daemon) -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - daemon.start_ticks / os.sysconf("SC_CLK_TCK")


def forget(home: Home, name: str) -> None:
    pid_file(home, name).unlink(missing_ok=True)


def ready_address(line: bytes) -> str | None:
    """The address in a ready line, `{"ready": true, "address": …}`; None for any other line."""
    if not line.startswith(b"{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("ready") is not True or not isinstance(value.get("address"), str):
        return None
    return str(value["address"])


def tail(log: Path, offset: int = 0, lines: int = TAIL_LINES) -> tuple[str, ...]:
    """The last lines of a log from `offset` on, at most 64 KiB of them; () when it cannot be read."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(offset, end - (64 << 10)))
            return tuple(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ()


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, plus the folder that this package was imported from, since the daemon runs in /."""
    folder = str(Path(controlplane.__file__).resolve().parent.parent)
    path = os.pathsep.join([folder, *filter(None, [environ.get("PYTHONPATH")])])
    return {**environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _spawn(argv: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The process and the log's offset at which its output begins."""
    if log.exists() and log.stat().st_size > LOG_KEEP_BYTES:
        log.replace(log.with_suffix(".log.1"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        offset = os.fstat(descriptor).st_size
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, cwd="/",
            env=environment(os.environ), start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(descriptor)
    return process, offset


def start(
    home: Home, name: str, argv: Sequence[str], *, deadline_s: float, waiting: Callable[[float], None] = lambda _: None
) -> Daemon:
    """Starts a daemon and waits for its ready line; `waiting` is told the seconds waited so far.

    Afterwards it runs and its pid file is written. DaemonFailed, and the process is ended, when it ends first or
    is not ready in time.
    """
    log = home.log / f"{name}.log"
    try:
        process, offset = _spawn(argv, log)
    except OSError as error:
        raise DaemonFailed(f"{name} cannot be started", f"{argv[0]} ({error.strerror})") from error
    ticks = start_ticks(process.pid) or 0
    try:
        address = _await_ready(process, log, offset, name, deadline_s, waiting)
        daemon = Daemon(process.pid, ticks, boot_id(), address)
        replace_file(pid_file(home, name), json.dumps(asdict(daemon)) + "\n")
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = 0  # it is not ours to wait for any more: silences Popen's warning
    return daemon


def _await_ready(
    process: subprocess.Popen[bytes], log: Path, offset: int, name: str, deadline_s: float,
    waiting: Callable[[float], None],
) -> str:  # fmt: skip
    begun_s = time.monotonic()
    with log.open("rb") as file:
        file.seek(offset)
        pending = b""
        while True:
            ended = process.poll() is not None  # before reading: what it wrote last is then read too
            pending += file.read(1 << 20)
            *lines, pending = pending.split(b"\n")
            for line in lines:
                if (address := ready_address(line)) is not None:
                    return address
            waited_s = time.monotonic() - begun_s
            if ended:
                raise DaemonFailed(
                    f"{name} ended before it was ready", f"exit code {process.returncode}", f"its log is {log}",
                    log_tail=tail(log, offset),
                )  # fmt: skip
            if waited_s > deadline_s:
                raise DaemonFailed(
                    f"{name} was not ready after {deadline_s:g} s", "", f"its log is {log}", log_tail=tail(log, offset)
                )
            waiting(waited_s)
            time.sleep(POLL_S)


def stop(daemon: Daemon, *, grace_s: float, kill_s: float = 10.0) -> bool:
    """Ends a daemon: SIGTERM, SIGKILL after `grace_s`. True when it is gone, also when it was before.

    The pidfd is opened before the start time is compared, so the process signalled is the one recorded.
    """
    try:
        descriptor = os.pidfd_open(daemon.pid)
    except ProcessLookupError:
        return True
    try:
        if not is_alive(daemon):
            return True
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, kill_s)):
            try:
                signal.pidfd_send_signal(descriptor, number)
            except ProcessLookupError:
                return True
            if select.select([descriptor], [], [], patience_s)[0]:
                return True
        return False
    finally:
        os.close(descriptor)
