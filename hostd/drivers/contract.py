"""What every engine offers hostd: start, adopt, talk to processes, resize, measure, end. One contract for all.

A driver makes an `Engine` (a running kernel with its agent); the sandbox's owner (hostd/sandbox.py) drives it. Every
implementation passes tests/contract/driver_suite.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from controlplane.api.services import ServicePolicy
from hostd.journal import Handle
from hostd.memory.values import MemoryEvent, MemoryNow, Resized
from hostd.services.account import ServiceUsage
from hostd.spec import Command, Resources, SandboxClass, SandboxSpec


@dataclass(frozen=True)
class LayerFile:
    """One image layer on this host: a read-only EROFS blob."""

    path: Path
    size_bytes: int
    volume_uuid: bytes
    gid: int  # the group that may read it: its sharing domain's


@dataclass(frozen=True)
class StartPlan:
    """All an engine needs to start one sandbox. For adopt `layers` is empty: what runs has them."""

    spec: SandboxSpec
    layers: tuple[LayerFile, ...]  # lowest first
    vm_uid: int
    folder: Path  # absolute; private, made by the engine, goes with it
    tell: Callable[[str, str], None] = lambda reason, message: None  # puts it into the sandbox's event log

    def __post_init__(self) -> None:
        if not self.folder.is_absolute():
            raise ValueError(f"folder {str(self.folder)!r} is not absolute: it would be removed with the engine")


@dataclass(frozen=True)
class Exit:
    """How a process ended. `code` is 128+signal when a signal did it."""

    code: int
    signal: int = 0


@dataclass(frozen=True)
class OutputPiece:
    """Bytes of a process's stream 1 (stdout, tty) or 2 (stderr)."""

    stream: int
    data: bytes


@dataclass(frozen=True)
class Loss:
    """Why an engine is lost: `reason` is VmmExited or AgentLost, `message` is for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class Region:
    """A part of an engine's address space, for the ledger: kind is "ram", "layer" or "vmm"."""

    kind: str
    pid: int
    start: int
    end: int
    resident_kib: int


class ProcessLink(Protocol):
    """A process in a sandbox, as hostd holds it. One consumer of output(), one writer."""

    def output(self) -> AsyncIterator[OutputPiece]:
        """Its output, once, each stream in order; a piece counts as held by the host when the next one is asked
        for. Ends with the process, or when the engine is lost."""
        ...

    async def wait(self) -> Exit:
        """How it ended; SandboxGone or AgentLost when that can no longer be learnt."""
        ...

    async def write(self, data: bytes) -> None:
        """Sends standard input; returns when all is sent. Bytes to a closed stdin are dropped."""
        ...

    async def close_stdin(self) -> None:
        """End of standard input."""
        ...

    async def signal(self, signo: int) -> None:
        """Delivers a signal; nothing happens when the process has ended. InvalidSpec for no signal's number."""
        ...

    async def resize_tty(self, rows: int, cols: int) -> None:
        """Tells its terminal's size."""
        ...

    async def release(self) -> None:
        """Frees what the engine keeps for an ended process."""
        ...


class Engine(Protocol):
    """A running kernel with its agent, and one sandbox in it."""

    handle: Handle
    start_phases: tuple[tuple[str, float], ...]  # (name, seconds) of vmm, kernel, agent
    origin: str  # how it came up, for people; "" when there is but one way

    async def wait_gone(self) -> Loss:
        """Returns as soon as the engine's process is gone or its agent lost."""
        ...

    async def spawn(self, command: Command, *, main: bool) -> ProcessLink:
        """Starts a process; exactly one is main. CommandFailed when it cannot be run, InvalidSpec when it is asked
        for in a way that no engine could serve. Cancelled: whatever may have been started is ended."""
        ...

    def resume(self) -> ProcessLink | None:
        """After adopt: the main process, its output going on from the offsets given there; None when there is none.
        Every other process is ended: whoever had started it is gone."""
        ...

    async def resize(self, resources: Resources, *, deadline_s: float = 0.0) -> Resized:
        """Sets targets for memory and CPU, and waits up to `deadline_s` for them to be reached. What is short then says
        why; the engine goes on towards them until the next resize. Never below the guarantee. Idempotent: it starts
        from what is there. One at a time: cancel the former, which undoes nothing. ControlLost when the engine does
        not take them."""
        ...

    def serve_as(self, policy: ServicePolicy) -> None:
        """Goes by the policy's rules from now on; who answers what is as at the start. Idempotent."""
        ...

    def service_usage(self) -> ServiceUsage | None:
        """What its services did since this engine was started or adopted; None when its kernel answers all."""
        ...

    def memory_events(self) -> AsyncIterator[MemoryEvent]:
        """What the guest tells of its memory by itself, from now on; one consumer: the last to ask, and what those
        before have ends. A few are kept while nobody reads, the oldest go first. Ends when the engine is lost or let go
        of."""
        ...

    async def memory(self) -> MemoryNow:
        """Asks the engine and its guest."""
        ...

    async def regions(self) -> list[Region]:
        """Its address space now, from the host's page tables."""
        ...

    async def detach(self) -> None:
        """Lets go of a running engine without ending it (hostd stops)."""
        ...


class WarmGuest(Protocol):
    """A guest that is nobody's yet and stands still, ready to become a sandbox. Its handle names it (`member`)."""

    handle: Handle
    unrehearsed: str  # why no program of the image could run in it, so that its claim will be slower; "" when one did

    async def wait_gone(self) -> Loss:
        """Returns as soon as its process is gone or its agent lost."""
        ...

    async def regions(self) -> list[Region]:
        """Its address space now, from the host's page tables."""
        ...

    def current(self) -> bool:
        """Whether what it was made from is still there; else it had better be ended and made anew."""
        ...

    async def detach(self) -> None:
        """Lets go of it without ending it (Driver.destroy does that). Idempotent."""
        ...


class Warming(Protocol):
    """What a driver has on top that can keep guests warm: made before anybody asks, claimed in milliseconds."""

    async def prewarm(self, plan: StartPlan, made: Callable[[Handle], None]) -> WarmGuest:
        """Makes a guest that any sandbox of the plan's image, vCPUs and ceiling bucket can become, and pauses it.

        The plan's spec says sizes and image; its uid is the member's. Programs of the image may run in it, with
        nothing of a sandbox's, bounded in time, and without leaving anything. On any error nothing of it is left;
        StartFailed, TemplateUnusable, InvalidSpec."""
        ...

    async def claim(self, guest: WarmGuest, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """Makes `guest`, one of this driver's, the sandbox of `plan`, with identity, randomness, clock, limits and
        memory of its own; uid, directory and cgroup stay the member's (`handle.member`). `made` is called before
        anything is done. On any error nothing of the guest is left."""
        ...


class CheckpointMemory(Protocol):
    """A checkpoint's memory, open on this host. Who got it closes it; what was restored from it lives on."""

    def held_bytes(self) -> int:
        """How much of the host's memory it takes, whether anything was restored from it or not."""
        ...

    def write(self, about: bytes, out: BinaryIO) -> None:
        """Writes the whole checkpoint to `out`, a new file at its start, `about` among it. Blocks."""
        ...

    def close(self) -> None:
        """Lets go of it, once."""
        ...


@dataclass(frozen=True)
class TakenCheckpoint:
    """A checkpoint that is in memory only. `form` is what an engine must be restored as, plain JSON, the driver's own;
    `offsets` how much of each stream of main this host had recorded; `pause_s` how long the workload stood still."""

    memory: CheckpointMemory
    form: Mapping[str, object]
    offsets: Mapping[int, int]
    pause_s: float


class Checkpointing(Protocol):
    """What a driver has on top that can copy a running engine and go on from the copy."""

    @property
    def classes(self) -> tuple[SandboxClass, ...]:
        """Of which classes sandboxes can be checkpointed."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether the checkpoint in file `path` is of this driver's form. OSError. Blocks."""
        ...

    async def checkpoint(
        self, engine: Engine, offsets: Callable[[], dict[int, int]], *, go_on: bool = True
    ) -> TakenCheckpoint:
        """Copies a running engine, which goes on; without `go_on` it stands still once there is a copy.
        CheckpointFailed (a user-space kernel that could not save itself has ended, and the message says so); NotRunning
        or CannotCheckpoint when it is in no state for it. `offsets` is asked while it stands still."""
        ...

    async def go_on(self, engine: Engine) -> None:
        """Lets an engine go on that stands still. Idempotent. ControlLost, AgentLost."""
        ...

    def read_about(self, path: Path) -> bytes:
        """What was given to CheckpointMemory.write with the checkpoint in file `path`. CheckpointUnusable. Blocks."""
        ...

    def load(self, path: Path) -> Any:
        """The CheckpointMemory in file `path`, for restore. CheckpointUnusable. Blocks."""
        ...

    def load_of(self, path: Path, pid: int) -> Any:
        """The same, taken from a running engine that was restored from it, so that the next shares memory with it.
        CheckpointUnusable, OSError. Blocks."""
        ...

    async def restore(
        self,
        plan: StartPlan,
        memory: Any,
        form: Mapping[str, object],
        offsets: Mapping[int, int],
        made: Callable[[Handle], None],
    ) -> Engine:
        """An engine that goes on from a checkpoint as sandbox `plan`, with identity, clock and randomness of its own
        before any process in it runs. resume() gives its main process; other processes are ended. `memory` is the
        driver's own and may be closed afterwards; the plan's spec names it. `made` as in start. On any error nothing of
        it is left."""
        ...


class Driver(Protocol):
    """Makes engines, and cleans up after them."""

    @property
    def checkpointing(self) -> Checkpointing | None:
        """None: engines of this driver cannot be checkpointed."""
        ...

    @property
    def warming(self) -> Warming | None:
        """None: guests of this driver cannot be kept warm."""
        ...

    async def start(self, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """Boots a kernel and its agent up to CONFIGURE. `made` is called as soon as a process exists, before it
        can matter. On any error nothing of it is left."""
        ...

    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None:
        """Takes over a running engine after hostd's restart; None when it is gone. `offsets` is how much of each
        stream of the main process this host has recorded."""
        ...

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        """Ends whatever runs for sandbox `uid` and removes directory, sockets and cgroup; also without a handle.
        Idempotent. HostdError when something of it stays; call again."""
        ...
