"""Real etcd for tests: one member or three, on free ports of loopback, in a folder of the test's; killed, paused,
started again at will. Ends with the block, and with the process that runs it (a parent-death signal)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

START_S = 60.0
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def require_etcd() -> str:
    """etcd's path; skips the test where Debian's etcd-server is not installed."""
    found = shutil.which("etcd")
    if found is None:
        pytest.skip("etcd is not installed: apt-get install etcd-server")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel hands out: a member that is down for a while finds its
    own free again. Each process of a test run looks in a part of its own."""
    lowest, highest = 10_000 + os.getpid() % 90 * 200, 32_000
    found: list[int] = []
    for port in range(lowest, highest):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} free ports from {lowest} to {highest}")


@dataclass
class Member:
    """One etcd. `client` is HOST:PORT as clients take it."""

    name: str
    folder: Path
    client_port: int
    peer_port: int
    arguments: Sequence[str] = ()
    scheme: str = "http"
    data: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def client(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    def start(self) -> None:
        """Starts it over what its folder has."""
        client, peer = f"{self.scheme}://{self.client}", f"http://127.0.0.1:{self.peer_port}"
        command = [
            require_etcd(), "--name", self.name, "--data-dir", str((self.data or self.folder) / self.name),
            "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--logger", "zap", *self.arguments,
        ]  # fmt: skip
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )  # fmt: skip

    def wait(self) -> None:
        """Until it takes connections."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            assert self.process is not None and self.process.poll() is None, self.tail()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.client_port), 1):
                return
            time.sleep(0.02)
        raise AssertionError(f"etcd {self.name} did not start in {START_S:g} s: {self.tail()}")

    def tail(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")[-2000:]

    def signal(self, signo: int) -> None:
        assert self.process is not None
        self.process.send_signal(signo)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def cluster(
    folder: Path, size: int = 1, *arguments: str, scheme: str = "http", on_disk: bool = False
) -> Iterator[list[Member]]:
    """So many members that know each other and take connections. Their logs are in the folder, their data too if
    `on_disk`; else in memory, where a write-ahead log does not wait for what other tests write to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        data = folder if on_disk else Path(stack.enter_context(memory_folder()))
        yield stack.enter_context(_members(folder, data, size, arguments, scheme))


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder on tmpfs, where there is one."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="sl-etcd-", dir=shm)


@contextlib.contextmanager
def _members(folder: Path, data: Path, size: int, arguments: Sequence[str], scheme: str) -> Iterator[list[Member]]:
    ports = free_ports(2 * size)
    members = [Member(f"m{i}", folder, ports[2 * i], ports[2 * i + 1], arguments, scheme, data) for i in range(size)]
    known = ",".join(f"{member.name}=http://127.0.0.1:{member.peer_port}" for member in members)
    for member in members:
        member.arguments = [*arguments, "--initial-cluster", known, "--initial-cluster-token", str(ports[0])]
    try:
        for member in members:
            member.start()
        for member in members:
            member.wait()
        yield members
    finally:
        for member in members:
            member.kill()
