"""Processes that outlive hostd: found again by pid and start time, watched by pidfd, never mistaken for another."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time in clock ticks since boot (fields 3 and 22 of /proc/PID/stat, proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; None when it is gone (also while nobody has reaped it)."""
    found = _stat(pid)
    return None if found is None or found[0] in "ZX" else found[1]


def open_same(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that had this pid and start time; None when it is gone, whoever has the pid now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_ticks(pid) != ticks:  # checked after opening: the pidfd pins the identity
        os.close(descriptor)
        return None
    return descriptor


def reap(pid: int) -> None:
    """Takes an ended child's status, so that no zombie stays. Nothing happens when it is no child or not ended.

    Only for a pid that is known to be ours still: a child's pid is not given to another before it is reaped."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        pass


def is_zombie(pid: int, ticks: int) -> bool:
    """Whether the process of this pid and start time has ended and waits to be reaped."""
    found = _stat(pid)
    return found is not None and found[0] == "Z" and found[1] == ticks


def describe_end(code: int, status: int) -> str:
    """What waitid(2) says, in words."""
    if code == os.CLD_EXITED:
        return f"it exited with status {status}"
    try:
        return f"signal {signal.Signals(status).name} ended it"
    except ValueError:  # a real-time signal
        return f"signal {status} ended it"


class WatchedProcess:
    """A pidfd with its end awaited. Our own children are reaped; adopted ones have init to do it."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(descriptor, self._ended)

    def _ended(self) -> None:
        self._loop.remove_reader(self._descriptor)
        how = "it ended"
        try:
            info = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
            if info is not None:
                how = describe_end(info.si_code, info.si_status)
        except ChildProcessError:
            pass  # adopted: not ours to reap
        if not self.gone.done():
            self.gone.set_result(how)

    def kill(self, signo: int = signal.SIGKILL) -> None:
        """Signals exactly this process; nothing happens when it is gone."""
        try:
            signal.pidfd_send_signal(self._descriptor, signo)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Stops watching. Idempotent; the process is left as it is."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        if not self.gone.done():
            self.gone.cancel()
