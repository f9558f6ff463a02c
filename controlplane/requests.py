"""What callers ask for, parsed: the values that go from the edge to the operations. Frozen."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.api.servicechange import ServiceChange
from controlplane.model import PoolSpec, SandboxSpec, SandboxStatus


@dataclass(frozen=True)
class Creation:
    """CreateSandbox. An empty name is to be made up; an empty request_id is never looked up."""

    name: str
    spec: SandboxSpec
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True)
class Restoration:
    """RestoreCheckpoint; `checkpoint` is a name or an id."""

    checkpoint: str
    name: str = ""
    remove_on_exit: bool = False
    request_id: str = ""


@dataclass(frozen=True)
class Forking:
    """ForkSandbox: `count` copies of `sandbox`, named `prefix`-1 and so on."""

    sandbox: str
    count: int
    prefix: str = ""
    remove_on_exit: bool = False


@dataclass(frozen=True)
class PoolCreation:
    """CreatePool; an empty request_id is never looked up."""

    name: str
    spec: PoolSpec
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True)
class ResizeWish:
    """ResizeSandbox; 0 leaves a size as it is, an empty etag matches everything."""

    memory_mib: int = 0
    memory_min_mib: int = 0
    cpu_milli: int = 0
    etag: str = ""


@dataclass(frozen=True)
class ServiceWish:
    """SetServices; an empty etag matches everything."""

    change: ServiceChange
    etag: str = ""


@dataclass(frozen=True)
class Report:
    """ReportSandbox: what `host` observed of `uid` under `epoch`."""

    uid: str
    host: str
    epoch: int
    status: SandboxStatus
    removed: bool = False


@dataclass(frozen=True)
class UsedRequest:
    """What a request_id was first used for: the sandbox's key, a digest of what was asked, and when."""

    sandbox_key: str
    asked: str
    used_at_s: float
