"""The journal: what this host has promised and made, on disk before it acts, so that a restart can take over.

    STATE/sandboxes/<uid>/record.json     one Record, replaced atomically (write, fsync, rename, fsync dir)
    STATE/sandboxes/<uid>/log[.1]         the main process's output (hostd/logs.py)

A record is written before the thing it names is made and after it is gone. Values are plain JSON, schema 1.
`outcome` is written before the engine is ended, so that a crash in between does not lose how the sandbox ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.api.errors import PolicyError
from controlplane.api.policies import parse_policy, render_policy
from controlplane.api.v1 import sandboxes_pb2
from hostd.errors import InvalidSpec, JournalError
from hostd.lifecycle import Phase
from hostd.removal import remove_folder
from hostd.resize import Cause, ResizeProgress, ResizeState
from hostd.spec import Allowed, Command, DesiredState, Network, ProcessSpec, Resources, SandboxClass, SandboxSpec

SCHEMA = 1


@dataclass(frozen=True)
class Handle:
    """What finds a running engine again: pid with its start time (clock ticks since boot), and what it was given."""

    pid: int
    start_ticks: int
    vm_uid: int
    accel: str
    base_mib: int
    elastic_mib: int
    vcpus: int
    template: str = ""  # the key of what it was cloned from
    checkpoint: str = ""  # the id of what it was restored from
    device_mib: int = 0  # the elastic device's size, of which elastic_mib may be used; 0: not known
    plugged: bool = False  # its layers came by hot-plug
    address: str = ""  # IPv4, of its network
    member: str = ""  # the pool member that it was claimed as: its cgroup and directory go by that name
    init_on_alloc: bool = True  # its kernel clears each page that it gives out
    max_vcpus: int = 0  # so many vCPUs it can be given at most; 0: none beyond those it has

    @property
    def ceiling_vcpus(self) -> int:
        """The most vCPUs it can have."""
        return max(self.vcpus, self.max_vcpus)


@dataclass(frozen=True)
class Outcome:
    """How a sandbox ends: the phase to come (EXITED or FAILED) and what is told with it."""

    phase: Phase
    reason: str
    message: str
    exit_code: int | None = None


@dataclass(frozen=True)
class Record:
    """All this host knows of one sandbox."""

    spec: SandboxSpec
    phase: Phase = Phase.ASSIGNED
    command: Command | None = None  # the main process, as started
    outcome: Outcome | None = None  # decided, but the engine may not be gone yet
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    handle: Handle | None = None
    vm_uid: int | None = None
    started_at_s: float | None = None
    finished_at_s: float | None = None
    start_phases: tuple[tuple[str, float], ...] = ()
    origin: str = ""  # how its engine came up
    adoptions: int = 0
    resize: ResizeProgress | None = None  # how far the last resize got
    uncooperative: bool = False
    parked: str = ""  # the id of the checkpoint that it is, or is about to go on from


def encode(record: Record) -> bytes:
    """A record as JSON."""
    values = dataclasses.asdict(record)
    values["phase"] = record.phase.value
    values["spec"]["desired"] = record.spec.desired.value
    values["spec"]["sandbox_class"] = record.spec.sandbox_class.value
    values["spec"]["services"] = render_policy(record.spec.services).SerializeToString().hex()
    if record.resize is not None:
        values["resize"] |= {"state": record.resize.state.value, "cause": record.resize.cause.value}
    if record.outcome is not None:
        values["outcome"]["phase"] = record.outcome.phase.value
    return json.dumps({"schema": SCHEMA, "record": values}, sort_keys=True).encode()


def decode(data: bytes, source: str) -> Record:
    """The record in `data`. JournalError names `source` when it is not one."""
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, this hostd reads {SCHEMA}")
        return _record(document["record"])
    except (ValueError, KeyError, TypeError, AttributeError, InvalidSpec, PolicyError) as error:
        raise JournalError(f"{source}: not a sandbox record ({error}); move it away to go on without it") from error


def _record(values: dict[str, Any]) -> Record:
    handle, command, outcome = values.pop("handle"), values.pop("command"), values.pop("outcome")
    if outcome is not None:
        outcome = Outcome(Phase(outcome.pop("phase")), **outcome)
    return Record(
        spec=_spec(values.pop("spec")),
        phase=Phase(values.pop("phase")),
        handle=Handle(**handle) if handle else None,
        command=Command(**_tuples(command)) if command else None,
        outcome=outcome,
        resize=_resize(values.pop("resize", None)),
        start_phases=tuple((n, s) for n, s in values.pop("start_phases")),
        **values,
    )


def _resize(values: dict[str, Any] | None) -> ResizeProgress | None:
    if values is None:
        return None
    return ResizeProgress(state=ResizeState(values.pop("state")), cause=Cause(values.pop("cause")), **values)


def _spec(values: dict[str, Any]) -> SandboxSpec:
    return SandboxSpec(
        resources=Resources(**values.pop("resources")),
        process=ProcessSpec(**_tuples(values.pop("process"))),
        desired=DesiredState(values.pop("desired")),
        sandbox_class=SandboxClass(values.pop("sandbox_class", SandboxClass.GUEST_KERNEL.value)),
        network=_network(values.pop("network", None)),
        services=parse_policy(_message(values.pop("services", ""))),
        **values,
    )


def _network(values: dict[str, Any] | None) -> Network:
    if values is None:
        return Network()
    return Network(values["veth"], tuple(Allowed(**rule) for rule in values["allow"]))


def _message(text: str) -> sandboxes_pb2.ServicePolicy:
    return sandboxes_pb2.ServicePolicy.FromString(bytes.fromhex(text))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where our values have tuples."""
    return {**values, "argv": tuple(values["argv"]), "env": tuple((k, v) for k, v in values["env"])}


class Journal:
    """The folder of records. One hostd at a time (the state directory's lock guards it)."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "sandboxes"
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder(self, uid: str) -> Path:
        """Where one sandbox's record and log live."""
        return self.root / uid

    def write(self, record: Record) -> None:
        """Makes `record` durable: afterwards it, or a later one, is what a restart finds."""
        folder = self.folder(record.spec.uid)
        if not folder.exists():
            folder.mkdir(mode=0o700)
            _sync(self.root)
        temporary = folder / "record.tmp"
        with temporary.open("wb") as file:
            file.write(encode(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / "record.json")
        _sync(folder)

    def records(self) -> Iterator[Record]:
        """All records; a folder without one (a crash before its first write) is removed."""
        for folder in sorted(self.root.iterdir()):
            path = folder / "record.json"
            if path.exists():
                yield decode(path.read_bytes(), str(path))
            elif folder.is_dir():
                remove_folder(folder)

    def remove(self, uid: str) -> None:
        """Forgets a sandbox, record last, so that a crash half way is finished after a restart."""
        folder = self.folder(uid)
        if not folder.exists():
            return
        for path in folder.iterdir():
            if path.name != "record.json":
                path.unlink()
        (folder / "record.json").unlink(missing_ok=True)
        folder.rmdir()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
