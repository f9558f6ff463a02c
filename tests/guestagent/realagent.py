"""The real in-guest program on this machine: built with ASan and UBSan, spoken to by the real host's end.

`sandloom-agent --port FD --root /` is the guest's PID 1 without what only a fresh guest may do (see main.c). FD is
a listening socket here, so that connections follow each other like hosts on one port.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from guestagent.messages import (
    AgentEvent,
    Configure,
    Exited,
    GuestState,
    GuestStats,
    HelloReceived,
    Output,
    OutputEnded,
    ReplyBody,
    ReplyReceived,
    StartProcess,
    Stream,
    Synced,
)
from guestagent.protocol import AgentSession, SessionCarry
from tests.once import one_at_a_time

SOURCE = Path(__file__).parents[2] / "guestagent" / "src"
DEADLINE_S = 20.0
PATH = b"PATH=/usr/local/bin:/usr/bin:/bin"
CONFIGURE = Configure(b"web-1", (b"a" * 16,), 64, b"e" * 32, b"0123456789abcdef" * 2, 1, 5000)
# A fork of a sanitized program leaves by exec or _exit; only the agent's own leaks count.
SANITIZER = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1"}


def why_not_here() -> str:
    """Why the program cannot run on this machine; empty when it can."""
    if os.geteuid() != 0:
        return "needs root: the agent makes PID and mount namespaces"
    missing = [tool for tool in ("make", "gcc", "pkg-config") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (deploy/install-packages.sh)" if missing else ""


def built(target: str) -> Path:
    """A target of the agent's Makefile, brought up to date. Fails with the compiler's words."""
    path = SOURCE.parent / "_build" / target
    path.parent.mkdir(exist_ok=True)
    with one_at_a_time(path.parent / ".making"):
        done = subprocess.run(
            ["make", "-s", "-C", str(SOURCE), f"../_build/{target}"], capture_output=True, text=True, timeout=240
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


class Timeout(AssertionError):
    """What a test waited for did not come."""


@dataclass
class Link:
    """One connection to an agent: everything that came, sorted. `auto_ack` acknowledges output at once."""

    sock: socket.socket
    session: AgentSession
    auto_ack: bool = True
    events: list[AgentEvent] = field(default_factory=list)
    replies: dict[int, ReplyReceived] = field(default_factory=dict)
    output: dict[tuple[int, Stream], bytearray] = field(default_factory=dict)
    ended: set[tuple[int, Stream]] = field(default_factory=set)
    exits: dict[int, Exited] = field(default_factory=dict)
    state: GuestState | None = None
    _unsent: bytearray = field(default_factory=bytearray)

    @classmethod
    def greet(
        cls,
        sock: socket.socket,
        carry: SessionCarry | None = None,
        *,
        auto_ack: bool = True,
        deadline_s: float = DEADLINE_S,
    ) -> Link:
        """SYNC and HELLO over `sock`; returns when the agent answered."""
        sock.setblocking(False)
        link = cls(sock, AgentSession(os.urandom(8), carry=carry), auto_ack)
        link.send(link.session.open())
        link.wait(lambda: link.state is not None, deadline_s)
        return link

    def send(self, data: bytes) -> None:
        self._unsent += data

    def _take(self, event: AgentEvent) -> None:
        self.events.append(event)
        if isinstance(event, Synced):
            self.send(self.session.hello())
        elif isinstance(event, HelloReceived):
            self.state = event.state
        elif isinstance(event, ReplyReceived):
            self.replies[event.request_id] = event
        elif isinstance(event, Output):
            self.output.setdefault((event.proc, event.stream), bytearray()).extend(event.data)
            if self.auto_ack:
                self.ack(event.proc, event.stream, event.offset + len(event.data))
        elif isinstance(event, OutputEnded):
            self.ended.add((event.proc, event.stream))
        elif isinstance(event, Exited):
            self.exits[event.proc] = event

    def turn(self, timeout_s: float) -> bool:
        """One wait for the socket; whether anything came. ConnectionError when the agent is gone."""
        readable, writable, _ = select.select([self.sock], [self.sock] if self._unsent else [], [], timeout_s)
        if writable:
            del self._unsent[: self.sock.send(self._unsent[:65536])]
        if not readable:
            return False
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the agent closed the connection")
        for event in self.session.receive(data, time.monotonic()):
            self._take(event)
        return True

    def wait(self, done: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Returns once `done()` holds."""
        give_up = time.monotonic() + deadline_s
        while not done():
            left = give_up - time.monotonic()
            if left <= 0:
                raise Timeout(f"not within {deadline_s} s; the last events: {self.events[-5:]}")
            self.turn(min(left, 0.5))

    def settle(self, quiet_s: float = 0.3) -> None:
        """Returns when nothing came for `quiet_s`: for what must not come."""
        while self._unsent or self.turn(quiet_s):
            if self._unsent:
                self.turn(quiet_s)

    def ask(self, sent: tuple[int, bytes]) -> ReplyBody:
        """Sends a request; the reply's body. GuestRefused when the agent refuses."""
        request_id, data = sent
        self.send(data)
        self.wait(lambda: request_id in self.replies)
        return self.replies[request_id].result()

    def ack(self, proc: int, stream: Stream, offset: int) -> None:
        self.send(self.session.ack(proc, stream, offset))

    def start(self, proc: int, *argv: str | bytes, **fields: object) -> int:
        """START; the pid in the workload's namespace."""
        words = tuple(word.encode() if isinstance(word, str) else word for word in argv)
        values: dict[str, object] = {"env": (PATH,), **fields}
        if self.exits.pop(proc, None):  # of an earlier process with this number
            for stream in Stream:
                self.output.pop((proc, stream), None)
        pid = self.ask(self.session.start(StartProcess(proc, words, **values)))  # type: ignore[arg-type]
        assert isinstance(pid, int)
        return pid

    def shell(self, proc: int, script: str, **fields: object) -> int:
        return self.start(proc, "/bin/sh", "-c", script, **fields)

    def exited(self, proc: int, deadline_s: float = DEADLINE_S) -> tuple[int, int]:
        """Waits for EXITED; (code, signal)."""
        self.wait(lambda: proc in self.exits, deadline_s)
        return self.exits[proc].code, self.exits[proc].signal

    def out(self, proc: int, stream: Stream = Stream.STDOUT) -> bytes:
        return bytes(self.output.get((proc, stream), b""))

    def result(self, proc: int, script: str, **fields: object) -> str:
        """Runs a script to its end and gives what it printed, without the last newline."""
        self.shell(proc, script, **fields)
        assert self.exited(proc) == (0, 0), (self.out(proc), self.out(proc, Stream.STDERR))
        return self.out(proc).decode().rstrip("\n")

    def feed(self, proc: int, data: bytes, *, eof: bool = False) -> None:
        """All of `data` to a process's stdin, as its window allows."""
        view = memoryview(data)
        while view:
            self.wait(lambda: self.session.stdin_room(proc) > 0)
            piece = bytes(view[: min(self.session.stdin_room(proc), 16384)])
            self.send(self.session.stdin(proc, piece))
            view = view[len(piece) :]
        if eof:
            self.send(self.session.stdin(proc, b"", eof=True))

    def stats(self) -> GuestStats:
        answer = self.ask(self.session.stats())
        assert isinstance(answer, GuestStats)
        return answer

    def hang_up(self) -> SessionCarry:
        """Closes the connection, whatever is under way; what the next one needs."""
        carry = self.session.carry()
        self.session.close()
        self.sock.close()
        return carry


class RealAgent:
    """One run of the program, listening at `path`."""

    def __init__(self, binary: Path, folder: Path, root: str = "/") -> None:
        self.path = folder / "agent.sock"
        self._log = folder / "agent.log"
        self._sock: socket.socket | None = None
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(str(self.path))
            listener.listen(128)
            listener.set_inheritable(True)
            self.process = subprocess.Popen(
                [str(binary), "--port", str(listener.fileno()), "--root", root],
                pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **SANITIZER},
            )  # fmt: skip

    def connect(self, carry: SessionCarry | None = None, *, auto_ack: bool = True) -> Link:
        """A new connection; the one before it ends, as a port has one host at a time."""
        if self._sock is not None:
            self._sock.close()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(self.path))
        return Link.greet(self._sock, carry, auto_ack=auto_ack)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def configured(self) -> Link:
        link = self.connect()
        assert link.ask(link.session.configure(CONFIGURE)) is None
        return link

    def close(self) -> None:
        """Ends it in the proper way, so that leaks are looked for, and fails when a sanitizer spoke."""
        try:
            if self.process.poll() is None:
                link = self.connect()
                link.ask(link.session.shutdown(0))
                self.process.wait(10)
        finally:
            if self._sock is not None:
                self._sock.close()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        assert self.process.returncode == 0, self.log
        assert "ERROR: AddressSanitizer" not in self.log and "runtime error" not in self.log, self.log
