"""The values of the agent protocol: what the host asks for, what a guest tells, and the events of a session.

All are frozen. What the host builds is checked when it is built (BadRequest names the field); what a guest
sent was checked by `guestagent.wire` before it became one of these. Offsets count bytes from 0 a stream.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum

from guestagent.errors import BadRequest, GuestRefused

PROTOCOL_VERSION = 1
U16_MAX = 2**16 - 1
U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1
MAIN_PROC = 1
VOLUME_UUID_BYTES = 16
MAX_LAYERS = 128
MIN_ENTROPY_BYTES = 32
MAX_ENTROPY_BYTES = 4096
MAX_SIGNAL = 64
MAX_VCPUS = 256
MAX_BLOCKS = 1 << 25
"""The balloon counts in blocks of 2 MiB of guest-physical memory; so many address 64 TiB."""

RUN = struct.Struct("<QQ")
"""A run of the balloon's blocks: the first and how many."""

RUNS_AT_ONCE = 1024
SERVICES = 7
SERVICES_NONCE_BYTES = 16
_HOSTNAME = re.compile(rb"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_MACHINE_ID = re.compile(rb"[0-9a-f]{32}")


class Kind(IntEnum):
    """The first field of every message. Below 64 the host says it, from 64 on the agent."""

    HELLO = 1
    CONFIGURE = 2
    START = 3
    STDIN = 4
    ACK = 5
    SIGNAL = 6
    WINSIZE = 7
    STATS = 8
    SHUTDOWN = 9
    FORGET = 10
    PREPARE = 11
    RENEW = 12
    FREEZE = 13
    THAW = 14
    BALLOON = 15
    BALLOON_RUNS = 16
    BALLOON_DONE = 17
    CPUS = 18
    SERVICES = 20
    CLOCK = 21
    REHEARSE = 30
    REPLY = 64
    OUTPUT = 65
    EXITED = 66
    STDIN_ACK = 67
    EVENT = 68


class Stream(IntEnum):
    """An output stream of a process. STDOUT is also the one stream of a process on a tty."""

    STDOUT = 1
    STDERR = 2


def require(condition: bool, problem: str) -> None:
    """BadRequest(problem) unless `condition`."""
    if not condition:
        raise BadRequest(problem)


def require_uint(value: int, name: str, maximum: int, minimum: int = 0) -> None:
    """BadRequest unless minimum ≤ value ≤ maximum."""
    require(minimum <= value <= maximum, f"{name} = {value} is outside {minimum} … {maximum}")


def require_layers(layers: tuple[bytes, ...]) -> None:
    """BadRequest unless they are 1 … MAX_LAYERS different volume uuids."""
    require(1 <= len(layers) <= MAX_LAYERS, f"{len(layers)} layers, need 1 … {MAX_LAYERS}")
    for uuid in layers:
        require(len(uuid) == VOLUME_UUID_BYTES, f"layer uuid {uuid.hex()} is not 16 bytes")
    require(len(set(layers)) == len(layers), "two layers have the same uuid")


def require_identity(given: Configure | Renew) -> None:
    """BadRequest unless hostname, entropy, machine_id and time_unix_ns are fit."""
    require(bool(_HOSTNAME.fullmatch(given.hostname)), f"hostname {given.hostname!r} is not a host name")
    require_uint(len(given.entropy), "bytes of entropy", MAX_ENTROPY_BYTES, MIN_ENTROPY_BYTES)
    require(bool(_MACHINE_ID.fullmatch(given.machine_id)), "machine_id is not 32 lower-case hex digits")
    require_uint(given.time_unix_ns, "time_unix_ns", U64_MAX, 1)


@dataclass(frozen=True)
class Prepare:
    """An image for a guest that is to be a template: `layers` as in Configure. Before CONFIGURE, once per boot."""

    layers: tuple[bytes, ...]
    deadline_ms: int

    def __post_init__(self) -> None:
        require_layers(self.layers)
        require_uint(self.deadline_ms, "deadline_ms", U32_MAX, 1)


@dataclass(frozen=True)
class Configure:
    """What makes a booted guest one particular sandbox. Given once per boot (a second time is EALREADY).

    Also what a prepared guest rehearses it with, any number of times before: that identity is thrown away.

    `layers` are EROFS volume uuids (16 bytes each), lowest first. `upper_mib` bounds the writable layer.
    `entropy` is at least 32 fresh random bytes; never use the same twice. `machine_id` is 32 hex digits.
    `deadline_ms` is how long the guest may wait for its layers' devices.
    """

    hostname: bytes
    layers: tuple[bytes, ...]
    upper_mib: int
    entropy: bytes
    machine_id: bytes
    time_unix_ns: int
    deadline_ms: int

    def __post_init__(self) -> None:
        require_identity(self)
        require_layers(self.layers)
        require_uint(self.upper_mib, "upper_mib", U32_MAX, 1)
        require_uint(self.deadline_ms, "deadline_ms", U32_MAX, 1)


@dataclass(frozen=True)
class Renew:
    """What makes the frozen copy of a guest a sandbox of its own, before its workload goes on; as in Configure."""

    hostname: bytes
    entropy: bytes
    machine_id: bytes
    time_unix_ns: int

    def __post_init__(self) -> None:
        require_identity(self)


@dataclass(frozen=True)
class Services:
    """Who answers the sandbox's calls: by service, in the order of PROTOCOL.md, 0 the kernel, 1 a tool, 2 nobody.

    `nonce` is 16 random bytes, new for each session of the services port. After CONFIGURE and before the first START;
    again, with the same answerers, for each new session."""

    who: tuple[int, ...]
    nonce: bytes

    def __post_init__(self) -> None:
        require(len(self.who) == SERVICES, f"{len(self.who)} answerers, need {SERVICES}")
        for answerer in self.who:
            require_uint(answerer, "an answerer", 2)
        require(len(self.nonce) == SERVICES_NONCE_BYTES, f"a nonce of {len(self.nonce)} bytes, need 16")


@dataclass(frozen=True)
class StartProcess:
    """A process to start. `proc` is the host's number for it, never used twice in a guest; 1 is main.

    `env` holds `K=V` each. `user` is empty (root), `uid[:gid]`, or a name of the guest's own /etc/passwd.
    `rows` and `cols` count characters and matter with `tty` only. Without `stdin` it reads end of file.
    """

    proc: int
    argv: tuple[bytes, ...]
    env: tuple[bytes, ...] = ()
    cwd: bytes = b"/"
    user: bytes = b""
    tty: bool = False
    rows: int = 24
    cols: int = 80
    stdin: bool = False

    def __post_init__(self) -> None:
        require_uint(self.proc, "proc", U32_MAX, 1)
        require(bool(self.argv) and bool(self.argv[0]), "argv is empty")
        for name, items in (("argv", self.argv), ("env", self.env)):
            require(len(items) <= 4096, f"{name} has {len(items)} entries, at most 4096")
            require(not any(b"\x00" in item for item in items), f"{name} has a NUL byte in it")
        require(all(b"=" in item[1:] for item in self.env), "env has an entry that is not K=V")
        require(self.cwd.startswith(b"/") and b"\x00" not in self.cwd, f"cwd {self.cwd!r} is not absolute")
        require(b"\x00" not in self.user, "user has a NUL byte in it")
        require_uint(self.rows, "rows", U16_MAX)
        require_uint(self.cols, "cols", U16_MAX)


@dataclass(frozen=True)
class ProcState:
    """A process as the guest's HELLO tells it. Claims of a guest: true as far as the guest is honest.

    `stdin_offset` is the next byte of stdin the agent takes; `out_offset` and `err_offset` are the oldest
    bytes of output it still holds.
    """

    proc: int
    pid: int
    exited: bool
    stdin_offset: int
    out_offset: int
    err_offset: int


@dataclass(frozen=True)
class GuestState:
    """The guest's answer to HELLO. `boot_id` tells one boot from the next (claimed, safe to show)."""

    version: int
    agent: str
    boot_id: str
    configured: bool
    procs: tuple[ProcState, ...]


@dataclass(frozen=True)
class GuestStats:
    """The guest's own counters, units in the names (psi_*_us: total stalled time). Claims of a guest."""

    mem_total_kib: int
    mem_free_kib: int
    mem_available_kib: int
    cached_kib: int
    shmem_kib: int
    anon_kib: int
    psi_mem_some_us: int
    psi_mem_full_us: int
    psi_cpu_some_us: int
    psi_io_some_us: int
    cpu_user_us: int
    cpu_system_us: int
    uptime_ms: int
    procs: int
    oom_kills: int
    pgfault: int
    refault: int
    agent_rss_kib: int
    cpus_online: int
    active_kib: int = 0  # these four came later: an agent may not tell them
    inactive_kib: int = 0
    swapped_kib: int = 0
    balloon_kib: int = 0


@dataclass(frozen=True)
class BalloonReport:
    """What a guest says of its balloon: `blocks` it holds in all, and a part of the runs they are in, RUN each, any
    bytes as far as it is hostile. `next_block` is where the rest begins, 0 for none."""

    blocks: int
    runs: bytes
    next_block: int


@dataclass(frozen=True)
class Reply:
    """A REPLY as it came, before it is matched with its request. `body` is still untyped."""

    request_id: int
    errno: int
    body: object


@dataclass(frozen=True)
class Synced:
    """The agent answered SYNC: send `AgentSession.hello()`."""


@dataclass(frozen=True)
class HelloReceived:
    """The session is ready. `rebooted`: the guest is not in the boot that the carry came from."""

    state: GuestState
    rebooted: bool = False


@dataclass(frozen=True)
class ReplyReceived:
    """The one answer to a request: `refused`, or `body` (START: guest pid, CPUS: how many, STATS, BALLOON and
    BALLOON_RUNS: what they are called, else None)."""

    request_id: int
    kind: Kind
    body: ReplyBody = None
    refused: GuestRefused | None = None

    def result(self) -> ReplyBody:
        """The body; raises GuestRefused when the guest refused."""
        if self.refused is not None:
            raise self.refused
        return self.body


@dataclass(frozen=True)
class Output:
    """`data` of a stream, exactly after what came before. `AgentSession.ack` it once it is held safely."""

    proc: int
    stream: Stream
    offset: int
    data: bytes


@dataclass(frozen=True)
class OutputEnded:
    """The stream is complete: `offset` bytes in all. Told once a session."""

    proc: int
    stream: Stream
    offset: int


@dataclass(frozen=True)
class Exited:
    """The process is gone and all its output has come. `code` is -1 when `signal` (else 0) ended it."""

    proc: int
    code: int
    signal: int
    core: bool


@dataclass(frozen=True)
class StdinAcked:
    """Bytes of stdin before `offset` reached the process, or were dropped because it closed its end."""

    proc: int
    offset: int


@dataclass(frozen=True)
class GuestEvent:
    """Something the guest says happened ("oom_kill", "psi_memory"). Names are safe to show."""

    name: str
    values: tuple[tuple[str, int], ...]


ReplyBody = int | GuestStats | BalloonReport | None
AgentEvent = Synced | HelloReceived | ReplyReceived | Output | OutputEnded | Exited | StdinAcked | GuestEvent
