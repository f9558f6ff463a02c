"""What a host is asked to run: frozen, validated values. Parsed from the API at the edge (hostd/edge.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network

from controlplane.api.services import ALL_KERNEL, ServicePolicy
from hostd.errors import InvalidSpec

MIN_BASE_RAM_MIB = 128
"""Below this Debian's cloud kernel with our initramfs does not boot reliably."""

MEMMAP_DIVISOR = 64
"""The guest kernel needs a 64-byte struct page for each 4 KiB page of DAX layers and hot-plugged memory, and
takes it from base RAM (Documentation/mm/memory-model.rst): 1/64 of their size."""

BLOCK_MIB = 2
"""virtio-mem's block: elastic sizes are multiples of it."""

MEMORY_BLOCK_MIB = 128
"""x86-64 Linux onlines hot-plugged memory in blocks of this size (arch/x86/mm/init_64.c), and virtio-mem does not
touch a block that its region holds only in part: the region is rounded up, so that the ceiling can be reached."""

_UID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")


MAX_GRACE_S = 86_400.0
MAX_PRIORITY, MAX_WEIGHT = 1000, 10_000


class SandboxClass(Enum):
    """Which kernel serves a sandbox's system calls: one of its own, one in user space, or the host's."""

    GUEST_KERNEL = "guest-kernel"
    USER_KERNEL = "user-kernel"
    HOST_KERNEL = "host-kernel"


class DesiredState(Enum):
    """What the control plane wants of a sandbox."""

    RUNNING = "running"
    STOPPED = "stopped"
    REMOVED = "removed"


@dataclass(frozen=True)
class Resources:
    """Memory between a guarantee and a ceiling, and CPU in thousandths."""

    memory_min_mib: int
    memory_max_mib: int
    memory_mib: int
    cpu_milli: int

    def __post_init__(self) -> None:
        if not 0 < self.memory_min_mib <= self.memory_mib <= self.memory_max_mib:
            raise InvalidSpec(
                f"memory {self.memory_min_mib} <= {self.memory_mib} <= {self.memory_max_mib} MiB does not hold:"
                " give min, current and max in this order"
            )
        if not 0 < self.cpu_milli <= 64_000:
            raise InvalidSpec(f"cpu {self.cpu_milli} is outside 1..64000 thousandths of a CPU")

    @property
    def vcpus(self) -> int:
        """Whole vCPUs that hold `cpu_milli`."""
        return -(-self.cpu_milli // 1000)


@dataclass(frozen=True)
class ProcessSpec:
    """A program to run. Empty argv, workdir and user mean the image's own."""

    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = ""
    user: str = ""
    tty: bool = False
    stdin: bool = False
    rows: int = 24
    cols: int = 80


@dataclass(frozen=True)
class Command:
    """A program to run, resolved against its image: nothing is left to default."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    workdir: str
    user: str
    tty: bool
    stdin: bool
    rows: int
    cols: int


@dataclass(frozen=True)
class Allowed:
    """An IPv4 network that a sandbox may talk to; protocol "" is any, ports 0 to 0 are all."""

    cidr: str
    protocol: str = ""
    first_port: int = 0
    last_port: int = 0

    def __post_init__(self) -> None:
        try:
            IPv4Network(self.cidr)
        except ValueError as error:
            raise InvalidSpec(f"network {self.cidr!r}: {error}") from error
        if self.protocol not in ("", "tcp", "udp") or not 0 <= self.first_port <= self.last_port <= 65535:
            raise InvalidSpec(f"{self.protocol!r} {self.first_port}-{self.last_port} are no protocol and ports")
        if self.first_port and not self.protocol:
            raise InvalidSpec(f"ports {self.first_port}-{self.last_port} are of no protocol: say tcp or udp")


@dataclass(frozen=True)
class Network:
    """A link to the host and what may be talked to over it, or none but its own loopback."""

    veth: bool = False
    allow: tuple[Allowed, ...] = ()


@dataclass(frozen=True)
class SandboxSpec:
    """One sandbox as assigned to this host."""

    uid: str
    name: str
    tenant: str
    image_digest: str
    hostname: str
    resources: Resources
    process: ProcessSpec
    epoch: int
    desired: DesiredState = DesiredState.RUNNING
    stop_grace_s: float = 10.0
    remove_on_exit: bool = False
    cold: bool = False  # boot, even where a template could be cloned
    checkpoint: str = ""  # go on from this one instead of starting
    sandbox_class: SandboxClass = SandboxClass.GUEST_KERNEL
    network: Network = Network()
    services: ServicePolicy = ALL_KERNEL
    priority: int = 0  # who loses what is above its minimum first when the host is short: the lower
    weight: int = 100  # its share, among equals, of what nobody is guaranteed

    def __post_init__(self) -> None:
        if not _UID.fullmatch(self.uid):
            raise InvalidSpec(f"sandbox uid {self.uid!r} is not 1-64 of [A-Za-z0-9_-]")
        if not _HOSTNAME.fullmatch(self.hostname):
            raise InvalidSpec(f"hostname {self.hostname!r} is not 1-64 of [A-Za-z0-9.-]: choose another one")
        if not 0 <= self.stop_grace_s <= MAX_GRACE_S:
            raise InvalidSpec(f"a grace of {self.stop_grace_s:g} s is outside 0..{MAX_GRACE_S:g}")
        if abs(self.priority) > MAX_PRIORITY:
            raise InvalidSpec(f"priority {self.priority} is outside {-MAX_PRIORITY}..{MAX_PRIORITY}")
        if not 1 <= self.weight <= MAX_WEIGHT:
            raise InvalidSpec(f"weight {self.weight} is outside 1..{MAX_WEIGHT}")


@dataclass(frozen=True)
class MemoryShape:
    """How a guest's memory is made up: `base_mib` of boot RAM and `elastic_mib` of virtio-mem at most."""

    base_mib: int
    elastic_mib: int

    def requested_mib(self, memory_mib: int) -> int:
        """How much of the elastic region makes `memory_mib` in all (rounded down to a block)."""
        return max(0, min(self.elastic_mib, memory_mib - self.base_mib)) // BLOCK_MIB * BLOCK_MIB

    @property
    def region_mib(self) -> int:
        """The virtio-mem device's size: whole memory blocks that hold `elastic_mib`. Never all asked for."""
        return -(-self.elastic_mib // MEMORY_BLOCK_MIB) * MEMORY_BLOCK_MIB

    @property
    def ceiling_mib(self) -> int:
        """The most that the guest can ever have."""
        return self.base_mib + self.elastic_mib


def base_ram_mib(plugged_mib: int) -> int:
    """Boot RAM for a guest into which `plugged_mib` of memory and layers can be plugged."""
    base = MIN_BASE_RAM_MIB + -(-plugged_mib // MEMMAP_DIVISOR)
    return base + -base % BLOCK_MIB


def memory_shape(resources: Resources, layers_bytes: int) -> MemoryShape:
    """Base RAM as small as the guest kernel can live with, the rest elastic.

    Base also has to hold the page structs of all that can be plugged. InvalidSpec when the guarantee is below it."""
    base = base_ram_mib(resources.memory_max_mib + -(-layers_bytes >> 20))
    if resources.memory_min_mib < base:
        raise InvalidSpec(
            f"a guaranteed {resources.memory_min_mib} MiB is too little for a guest with a ceiling of "
            f"{resources.memory_max_mib} MiB and {layers_bytes >> 20} MiB of layers: it needs at least {base} MiB",
            reason="MemoryTooSmall",
        )
    elastic = (resources.memory_max_mib - base) // BLOCK_MIB * BLOCK_MIB
    return MemoryShape(base, elastic)
