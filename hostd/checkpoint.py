"""What a checkpoint is of: the values that stand in its blob, so that it can be restored wherever the blob is.

JSON, schema 1: {"schema", "id", "name", "record": the source's journal record, "layers": [[digest, volume uuid,
bytes], …], "form": the driver's, "offsets": {"1": n, "2": n}, "pause_s", "created_at_s", "image": as its user calls
it, "ephemeral": whether it is only of a fork}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hostd import journal
from hostd.drivers.byclass import lacking
from hostd.errors import CannotCheckpoint, CheckpointUnusable, InvalidSpec, JournalError, NotRunning
from hostd.journal import Record
from hostd.lifecycle import Phase
from hostd.spec import Command, SandboxClass, SandboxSpec

SCHEMA = 1
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class LayerName:
    """A layer of the image that the guest has: its blob's digest and its volume."""

    digest: str
    volume_uuid: str  # hex
    size_bytes: int


def require_names(key: str, name: str) -> None:
    """InvalidSpec unless they can be a checkpoint's id and name."""
    if not _ID.fullmatch(key):
        raise InvalidSpec(f"checkpoint id {key!r} is not 1-64 of [A-Za-z0-9_-]")
    if not _NAME.fullmatch(name):
        raise InvalidSpec(f"checkpoint name {name!r} is not 1-63 of [a-z0-9-], the ends without a dash")


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint shall be called. Of a fork (`ephemeral`) nobody keeps it."""

    id: str
    name: str
    image: str = ""
    ephemeral: bool = False

    def __post_init__(self) -> None:
        require_names(self.id, self.name)


@dataclass(frozen=True)
class CheckpointAbout:
    """All that is known of a checkpoint besides its memory."""

    id: str
    name: str
    spec: SandboxSpec  # the source's at that time
    command: Command  # its main process
    layers: tuple[LayerName, ...]  # lowest first
    form: Mapping[str, object]
    offsets: Mapping[int, int]
    pause_s: float
    created_at_s: float
    image: str = ""  # what its user calls it
    ephemeral: bool = False  # of a fork: nobody keeps it

    def __post_init__(self) -> None:
        require_names(self.id, self.name)

    def encode(self) -> bytes:
        """As it stands in the blob."""
        record = Record(self.spec, Phase.RUNNING, self.command)
        values = {
            "schema": SCHEMA,
            "id": self.id,
            "name": self.name,
            "record": json.loads(journal.encode(record)),
            "layers": [[layer.digest, layer.volume_uuid, layer.size_bytes] for layer in self.layers],
            "form": dict(self.form),
            "offsets": {str(stream): offset for stream, offset in self.offsets.items()},
            "pause_s": self.pause_s,
            "created_at_s": self.created_at_s,
            "image": self.image,
            "ephemeral": self.ephemeral,
        }
        return json.dumps(values, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, source: str) -> CheckpointAbout:
        """CheckpointUnusable names `source` when it is not one."""
        try:
            values = json.loads(data)
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}, this hostd reads {SCHEMA}")
            record = journal.decode(json.dumps(values["record"]).encode(), source)
            if record.command is None:
                raise ValueError("no command")
            return cls(
                id=values["id"],
                name=values["name"],
                spec=record.spec,
                command=record.command,
                layers=tuple(LayerName(str(digest), str(uuid), int(size)) for digest, uuid, size in values["layers"]),
                form=dict(values["form"]),
                offsets={int(stream): int(offset) for stream, offset in values["offsets"].items()},
                pause_s=float(values["pause_s"]),
                created_at_s=float(values["created_at_s"]),
                image=str(values["image"]),
                ephemeral=bool(values["ephemeral"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, InvalidSpec, JournalError) as error:
            raise CheckpointUnusable(
                f"{source}: does not say what it is a checkpoint of ({error}); make it anew"
            ) from error


def require_able(spec: SandboxSpec, phase: Phase, sessions: Sequence[str], *, able: tuple[SandboxClass, ...]) -> None:
    """Whether a sandbox can be checkpointed now. `sessions` are those that clients type into, `able` are the classes
    that can be on this host. InvalidSpec for its class, NotRunning, CannotCheckpoint."""
    if spec.sandbox_class not in able:
        raise lacking("checkpoints", spec.sandbox_class, able)
    if phase is not Phase.RUNNING:
        raise NotRunning(f"sandbox {spec.name} is {phase.value}, not running: there is nothing to go on from")
    if sessions:
        raise CannotCheckpoint(
            f"sandbox {spec.name} has a session that no copy of it can have: {', '.join(sessions)};"
            " end it and try again",
            reason="InteractiveSession",
        )


def fitted(about: CheckpointAbout, spec: SandboxSpec) -> SandboxSpec:
    """`spec` as it can be restored from the checkpoint: what a copy of a guest has cannot be chosen. InvalidSpec."""
    source = about.spec
    if (spec.tenant, spec.sandbox_class) != (source.tenant, source.sandbox_class):
        raise InvalidSpec(f"checkpoint {about.name} is another tenant's or class's than sandbox {spec.name}")
    asked, had = spec.resources, source.resources
    if (asked.memory_max_mib, asked.vcpus) != (had.memory_max_mib, had.vcpus):
        raise InvalidSpec(
            f"checkpoint {about.name} has a ceiling of {had.memory_max_mib} MiB and {had.vcpus} vCPU;"
            f" sandbox {spec.name} asks for {asked.memory_max_mib} MiB and {asked.vcpus}"
        )
    return replace(spec, image_digest=source.image_digest, process=source.process)
