"""Processes that are scripts: what the fake agent runs in place of programs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from guestagent.messages import GuestStats, StartProcess, Stream

WINDOW_BYTES = 65536
OUTPUT_BYTES = 32768
SIGNAL_EXIT_CODE = -1


DEFAULT_STATS = GuestStats(
    mem_total_kib=262144,
    mem_free_kib=131072,
    mem_available_kib=196608,
    cached_kib=12288,
    shmem_kib=1024,
    anon_kib=8192,
    psi_mem_some_us=0,
    psi_mem_full_us=0,
    psi_cpu_some_us=1000,
    psi_io_some_us=2000,
    cpu_user_us=500000,
    cpu_system_us=300000,
    uptime_ms=5000,
    procs=1,
    oom_kills=0,
    pgfault=1000,
    refault=0,
    agent_rss_kib=900,
    cpus_online=1,
)
"""What a small idle guest says."""


@dataclass(frozen=True)
class Script:
    """What a process does. It writes `stdout` and `stderr`, then ends with `exit_code` (or by `signal`).

    `exit_code` None: it runs until a signal (1, 2, 3, 9, 15 end it) or, with `echo_stdin`, its stdin's end.
    `echo_stdin` copies stdin to stdout. `refuse` is an errno that START fails with.
    """

    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int | None = 0
    signal: int = 0
    echo_stdin: bool = False
    refuse: int = 0
    message: str = ""


def default_script(start: StartProcess) -> Script:
    """Of the name in argv[0]: true, false, echo, cat, sleep (until killed), exit N, fault (SIGSEGV)."""
    name, arguments = start.argv[0].rsplit(b"/", 1)[-1], start.argv[1:]
    scripts: dict[bytes, Callable[[], Script]] = {
        b"true": Script,
        b"false": lambda: Script(exit_code=1),
        b"echo": lambda: Script(stdout=b" ".join(arguments) + b"\n"),
        b"cat": lambda: Script(exit_code=None, echo_stdin=True),
        b"sleep": lambda: Script(exit_code=None),
        b"exit": lambda: Script(exit_code=int(arguments[0])),
        b"fault": lambda: Script(signal=11),
    }
    if name not in scripts:
        return Script(refuse=errno.ENOENT, message=f"{name.decode(errors='replace')}: command not found")
    return scripts[name]()


@dataclass
class ScriptedOutput:
    """Bytes not acknowledged: `held` begins at offset `base`; those before `sent` were written."""

    base: int = 0
    held: bytearray = field(default_factory=bytearray)
    waiting: bytearray = field(default_factory=bytearray)  # what the "pipe" still holds
    sent: int = 0
    closed: bool = False
    end_sent: bool = False

    def refill(self, window_bytes: int) -> None:
        room = max(0, window_bytes - len(self.held))
        self.held += self.waiting[:room]
        del self.waiting[:room]


@dataclass
class ScriptedProcess:
    start: StartProcess
    script: Script
    pid: int
    outputs: dict[Stream, ScriptedOutput]
    followed: bool = True
    stdin_offset: int = 0
    exit: tuple[int, int] | None = None
    exit_sent: bool = False
