"""The control plane's values: what is asked, what is assigned, what hosts said. Frozen, and free of protobuf.

Promise: a value that exists is well formed (controlplane/edge checks what comes from outside, controlplane/codec what
comes from the store). `revision` is the store's mod_revision of the record a value was read from; it is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from controlplane.api.services import ALL_KERNEL, ServicePolicy
from controlplane.rules import NO_RULES, Pair, Rules

REVISION = {"stored": False}
"""Marks a field that the store's codec leaves out."""


class Phase(Enum):
    """Where a sandbox stands, as the control plane sees it (the table is in lifecycle.py)."""

    PENDING = "pending"  # recorded, no host yet
    SCHEDULED = "scheduled"  # a host is chosen and has not begun
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    FAILED = "failed"
    PARKED = "parked"  # on its host's disk; the next exec, attach or resize unparks it


class DesiredState(Enum):
    """What the user wants of a sandbox."""

    RUNNING = "running"
    STOPPED = "stopped"
    REMOVED = "removed"


class SandboxClass(Enum):
    """Whose kernel serves the sandbox."""

    GUEST_KERNEL = "guest-kernel"
    USER_KERNEL = "user-kernel"
    HOST_KERNEL = "host-kernel"


class RestartPolicy(Enum):
    """What becomes of a sandbox whose host is lost, removed or drained."""

    NEVER = "never"
    ON_HOST_LOSS = "on-host-loss"


class ResizeState(Enum):
    """How far the last resize got."""

    DONE = "done"
    IN_PROGRESS = "in-progress"
    DEFERRED = "deferred"
    INFEASIBLE = "infeasible"
    ERROR = "error"


@dataclass(frozen=True)
class Resources:
    """min <= memory <= max in MiB; CPU in thousandths of one."""

    memory_min_mib: int
    memory_max_mib: int
    memory_mib: int
    cpu_milli: int

    @property
    def vcpus(self) -> int:
        """Whole CPUs that hold `cpu_milli`."""
        return -(-self.cpu_milli // 1000)


@dataclass(frozen=True)
class Process:
    """A program to run. Empty argv, workdir and user mean the image's own."""

    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = ""
    user: str = ""
    tty: bool = False
    stdin: bool = False
    tty_rows: int = 0
    tty_cols: int = 0


@dataclass(frozen=True)
class NetworkRule:
    """Who a sandbox may talk to: an IPv4 network; `protocol` "" is any, ports 0 to 0 are all."""

    cidr: str
    protocol: str = ""
    first_port: int = 0
    last_port: int = 0


@dataclass(frozen=True)
class Network:
    """A sandbox's network: `veth`, or none but its own loopback."""

    veth: bool = False
    allow: tuple[NetworkRule, ...] = ()


@dataclass(frozen=True)
class SandboxSpec:
    """What was asked for. `image_digest` is what `image` meant at that time."""

    image: str
    resources: Resources
    process: Process = Process()
    image_digest: str = ""
    sandbox_class: SandboxClass = SandboxClass.GUEST_KERNEL
    remove_on_exit: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    hostname: str = ""
    cold: bool = False
    checkpoint: str = ""  # the id of what it goes on from
    restart: RestartPolicy = RestartPolicy.NEVER
    rules: Rules = NO_RULES
    network: Network = Network()
    services: ServicePolicy = ALL_KERNEL
    priority: int = 0
    weight: int = 100


@dataclass(frozen=True)
class Resize:
    """Desired, allocated, actual, and what stands between them."""

    state: ResizeState
    desired_memory_mib: int
    allocated_memory_mib: int = 0
    actual_memory_mib: int = 0
    cpu_milli: int = 0
    message: str = ""
    desired_cpu_milli: int = 0
    shortfall_mib: int = 0
    cause: str = ""
    deadline_s: float | None = None
    attempts: int = 0


@dataclass(frozen=True)
class SandboxStatus:
    """What is: observed by the host, or by the control plane while there is none. Times are seconds since 1970."""

    phase: Phase = Phase.PENDING
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    resize: Resize | None = None
    started_at_s: float | None = None
    finished_at_s: float | None = None
    start_phases: tuple[tuple[str, float], ...] = ()
    accel: str = ""
    origin: str = ""
    host_pid: int = 0
    observed_epoch: int = 0
    restarts_of_host: int = 0
    address: str = ""
    vcpus: int = 0
    vcpus_max: int = 0
    uncooperative: bool = False


@dataclass(frozen=True)
class LayerSize:
    """A layer of an image and how large its blob is."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Placed:
    """Why a sandbox is where it is: what spoke for its host when it was placed, which nobody can find out later.
    `revision` is the store's at the time; `hosts` how many there were; `parts` are (what, why) for people."""

    host: str
    revision: int
    hosts: int
    marginal_mib: int
    shared_mib: int
    charge_mib: int
    pool: str = ""
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Sandbox:
    """The record of one sandbox. `host` is empty while it has none; `vcpus` is the ceiling of its CPU. `leaving`: the
    host that has to end it at `leaving_epoch` before it may begin anew elsewhere."""

    name: str
    uid: str
    tenant: str
    spec: SandboxSpec
    created_at_s: float
    vcpus: int
    layers: tuple[LayerSize, ...] = ()
    desired: DesiredState = DesiredState.RUNNING
    host: str = ""
    epoch: int = 0
    status: SandboxStatus = SandboxStatus()
    stop_grace_s: int = 10
    leaving: str = ""
    leaving_epoch: int = 0
    placed: Placed | None = None
    only_host: str = ""  # the only one that can run it: the checkpoint that it goes on from is there
    revision: int = field(default=0, metadata=REVISION)


@dataclass(frozen=True)
class Layer:
    """A published layer blob, see images.proto."""

    digest: str
    size_bytes: int
    source_digest: str = ""
    volume_uuid: str = ""


@dataclass(frozen=True)
class ImageConfig:
    """What an image says about its process."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = ""
    user: str = ""


@dataclass(frozen=True)
class Image:
    """A tenant's name bound to a digest."""

    name: str
    tenant: str
    digest: str
    layers: tuple[Layer, ...]
    config: ImageConfig
    size_bytes: int
    created_at_s: float
    format: str = ""
    revision: int = field(default=0, metadata=REVISION)


@dataclass(frozen=True)
class Residency:
    """A host holds an image in a tenant's sharing domain, since `recorded_at_s`."""

    tenant: str
    digest: str
    host: str
    recorded_at_s: float


@dataclass(frozen=True)
class Checkpoint:
    """A running sandbox's copy, as the host that has it tells of it. `spec` is what a restored sandbox gets."""

    id: str
    name: str
    tenant: str
    host: str
    sandbox: str
    sandbox_uid: str
    spec: SandboxSpec
    layers: tuple[LayerSize, ...]
    size_bytes: int
    pause_s: float
    created_at_s: float
    ephemeral: bool = False


@dataclass(frozen=True)
class Capacity:
    """A host's sizes, as it reported them."""

    memory_mib: int = 0
    memory_available_mib: int = 0
    memory_reserved_mib: int = 0
    cpu_milli: int = 0
    disk_free_mib: int = 0
    system_reserve_mib: int = 0
    vm_overhead_mib: int = 0


@dataclass(frozen=True)
class PoolSpec:
    """What a warm pool keeps ready: `size` guests of these resources. `image_digest` is what `image` meant then."""

    image: str
    resources: Resources
    size: int
    image_digest: str = ""
    sandbox_class: SandboxClass = SandboxClass.GUEST_KERNEL


@dataclass(frozen=True)
class Pool:
    """The record of one warm pool. How far the hosts are with it is in their reports."""

    name: str
    uid: str
    tenant: str
    spec: PoolSpec
    created_at_s: float
    revision: int = field(default=0, metadata=REVISION)


@dataclass(frozen=True)
class HostPool:
    """A host's share of a pool, as it reported it. Members serve ceilings above `fits_above_mib` to `fits_to_mib`."""

    uid: str
    name: str
    tenant: str
    image_digest: str
    ready: int = 0
    making: int = 0
    message: str = ""
    vcpus: int = 1
    memory_min_mib: int = 0
    fits_above_mib: int = 0
    fits_to_mib: int = 0
    sandbox_class: SandboxClass = SandboxClass.GUEST_KERNEL


@dataclass(frozen=True)
class Resident:
    """How much of one kind a host's store holds."""

    kind: str
    count: int
    size_bytes: int


@dataclass(frozen=True)
class CountedLimit:
    """How many of a thing are left on a host, or how many one guest can have there."""

    name: str
    left: int
    of_a_guest: bool = False


@dataclass(frozen=True)
class Host:
    """A host's last report. Whether it is READY is its lease's matter, not this record's."""

    name: str
    capacity: Capacity
    runtime_address: str
    last_seen_s: float
    classes: tuple[SandboxClass, ...] = ()
    accel: str = ""
    isolation_note: str = ""
    kernel_version: str = ""
    guest_kernel_version: str = ""
    qemu_version: str = ""
    cgroup_version: str = ""
    elastic_memory: str = ""
    image_digests: tuple[str, ...] = ()
    sandboxes: int = 0
    pools: tuple[HostPool, ...] = ()
    kernel_features: tuple[str, ...] = ()
    resident: tuple[Resident, ...] = ()
    labels: tuple[Pair, ...] = ()
    taints: tuple[Pair, ...] = ()
    smt: bool = False  # two tenants may share a core by hyperthreads
    admission_closed: str = ""
    limits: tuple[CountedLimit, ...] = ()
    revision: int = field(default=0, metadata=REVISION)


@dataclass(frozen=True)
class Event:
    """Something that happened. `tenant` is empty for what concerns the fabric as a whole: operators see it."""

    time_s: float
    kind: str
    subject: str
    reason: str
    message: str
    host: str = ""
    tenant: str = ""
    revision: int = field(default=0, metadata=REVISION)
