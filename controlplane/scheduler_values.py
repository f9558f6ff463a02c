"""The values that placement is decided on and told with: demands, hosts, policies, decisions. Frozen, pure.

Memory is counted in whole MiB. What a host has promised is of two kinds: what belongs to one sandbox (its charge and
the overhead of its guest), and what sandboxes of one sharing domain map together (layers, templates), counted once.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from controlplane.model import Capacity, HostPool, LayerSize, Sandbox, SandboxClass
from controlplane.rules import GROUP_LABEL, NO_RULES, Pair, Rules

MIB = 1 << 20
Group = tuple[str, str]
"""(tenant, name): the sandboxes that are spread among each other."""


@dataclass(frozen=True)
class Level:
    """How strained a host may be after a placement. A lower level is always preferred to a higher one."""

    cpu_overcommit: float
    ceilings: bool = False  # the ceilings of all there fit into memory at once

    @property
    def text(self) -> str:
        """For people."""
        room = "every ceiling fits into memory" if self.ceilings else "every charge fits into memory"
        return f"CPU asked up to {self.cpu_overcommit:g} times what there is, {room}"


@dataclass(frozen=True)
class Policy:
    """What an operator may choose. CPU is shared by time, so far more may be asked for than there is; the last level
    bounds how slow it can get. `share` off: every sandbox pays its layers itself, as a scheduler that is blind to
    sharing would have it. `quantile`: of a workload's measured use, what is charged when it is above the guarantee."""

    levels: tuple[Level, ...] = (Level(1.0, ceilings=True), Level(4.0), Level(16.0))
    share: bool = True
    quantile: float = 0.95

    @property
    def cpu_overcommit(self) -> float:
        """The most of CPU that may be asked for, over what there is."""
        return self.levels[-1].cpu_overcommit


DEFAULT_POLICY = Policy()


GUEST_TAKES = {"pids": 6, "file_descriptors": 64, "disk_mib": 16}
"""What an idle guest takes of a host's counted things, its vCPUs' threads apart: as measured by `plan calibrate`."""


@dataclass(frozen=True)
class Demand:
    """What a sandbox asks of a host. Sizes in MiB, CPU in thousandths. `layers` are what it maps and may share: an
    image's layers, a template. `expected_mib`: the quantile of what its workload was measured to use, 0 when
    unknown."""

    tenant: str
    sandbox_class: SandboxClass
    memory_min_mib: int
    cpu_milli: int
    image_digest: str
    layers: tuple[LayerSize, ...]
    memory_max_mib: int = 0
    vcpus: int = 1
    cold: bool = False  # it boots, or goes on from a checkpoint: no pool is of any use to it
    rules: Rules = NO_RULES
    group: str = ""
    expected_mib: int = 0
    extra_mib: int = 0  # what it costs beside charge and overhead: page tables of what it maps
    extras: tuple[tuple[str, int], ...] = ()  # of the host's counted things (files, pids), how many it takes
    guest_needs: tuple[tuple[str, int], ...] = ()  # of what one guest can have on the host, how much it needs
    share_domain: str = ""  # empty: its tenant's own
    fetchable: bool = False  # a host without the image may get it from elsewhere, or its checkpoint kept the layers

    @staticmethod
    def of(sandbox: Sandbox, expected_mib: int = 0) -> Demand:
        """What a recorded sandbox asks."""
        spec = sandbox.spec
        sizes = spec.resources
        return Demand(
            sandbox.tenant, spec.sandbox_class, sizes.memory_min_mib, sizes.cpu_milli, spec.image_digest,
            sandbox.layers, sizes.memory_max_mib, sizes.vcpus, spec.cold or bool(spec.checkpoint),
            spec.rules, group_of(sandbox), expected_mib,
            extras=tuple((name, most + (sizes.vcpus if name == "pids" else 0)) for name, most in GUEST_TAKES.items()),
            guest_needs=(("pmem_slots", len(sandbox.layers)),), fetchable=bool(spec.checkpoint),
        )  # fmt: skip

    @property
    def domain(self) -> str:
        """Whose pages it may share."""
        return self.share_domain or self.tenant

    @property
    def charge_mib(self) -> int:
        """What is promised to it: the guarantee, or what it is expected to use, up to its ceiling."""
        expected = min(self.expected_mib, self.memory_max_mib) if self.memory_max_mib else self.expected_mib
        return max(self.memory_min_mib, expected)

    @property
    def ceiling_mib(self) -> int:
        """The most it can ever use of its own."""
        return max(self.memory_max_mib, self.charge_mib)


def group_of(sandbox: Sandbox) -> str:
    """What it is spread among: see controlplane/rules.py."""
    return dict(sandbox.spec.labels).get(GROUP_LABEL) or sandbox.spec.image_digest


def layer_mib(layer: LayerSize) -> int:
    """A layer's memory once all of it is touched; a part of a MiB counts whole."""
    return -(-layer.size_bytes // MIB)


@dataclass(frozen=True)
class Traits:
    """What of a host decides whether it is of any use to a demand, whatever runs there. Hashable: hosts with equal
    traits are judged once."""

    ready: bool
    cordoned: bool
    classes: frozenset[SandboxClass]
    labels: tuple[Pair, ...]
    taints: tuple[Pair, ...]
    accel: str
    smt: bool
    dedicated_to: str
    guest_limits: tuple[tuple[str, int], ...] = ()

    @property
    def takes_new(self) -> bool:
        """READY, and not cordoned."""
        return self.ready and not self.cordoned


class HostFacts(Protocol):
    """What the rules read of a host, be it a frozen HostState or a row of an index."""

    @property
    def name(self) -> str: ...
    @property
    def capacity(self) -> Capacity: ...
    @property
    def traits(self) -> Traits: ...
    @property
    def images(self) -> Container[tuple[str, str]]: ...
    @property
    def mapped_layers(self) -> Container[tuple[str, str]]: ...
    @property
    def unpromised_mib(self) -> int: ...
    @property
    def usable_mib(self) -> int: ...
    @property
    def uncommitted_mib(self) -> int: ...
    @property
    def cpu_asked_milli(self) -> int: ...
    @property
    def pools(self) -> tuple[HostPool, ...]: ...
    @property
    def settling(self) -> int: ...
    @property
    def limits(self) -> Mapping[str, int]: ...
    @property
    def groups(self) -> Mapping[Group, int]: ...
    @property
    def crowded_for(self) -> str | None: ...


@dataclass(frozen=True)
class HostState:
    """A host as the scheduler sees it. `promised_mib`: charges and overhead of all live sandboxes and pool members
    there; `mapped_mib`: the layers they map, each once; `unsettled_mib`: what the host's last report of available
    memory cannot know yet; `settling`: how many sandboxes that are, any of which may have claimed a member that the
    report still calls ready; `ceilings_mib`: ceilings and overhead; `limits`: what is left of things that are
    counted; `guest_limits`: how much of a thing one guest can have."""

    name: str
    ready: bool
    capacity: Capacity
    classes: frozenset[SandboxClass]
    images: frozenset[tuple[str, str]]  # (tenant, digest) in its store
    mapped_layers: frozenset[tuple[str, str]]  # (domain, layer digest) in its memory
    promised_mib: int = 0
    unsettled_mib: int = 0
    cpu_asked_milli: int = 0
    pools: tuple[HostPool, ...] = ()
    settling: int = 0
    mapped_mib: int = 0
    ceilings_mib: int = 0
    labels: tuple[Pair, ...] = ()
    taints: tuple[Pair, ...] = ()
    accel: str = ""
    smt: bool = False
    cordoned: bool = False
    dedicated_to: str = ""
    groups: Mapping[Group, int] = field(default_factory=dict)
    tenants: frozenset[str] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)
    guest_limits: tuple[tuple[str, int], ...] = ()

    @property
    def traits(self) -> Traits:
        """See Traits."""
        return Traits(
            self.ready, self.cordoned, self.classes, self.labels, self.taints, self.accel, self.smt, self.dedicated_to,
            self.guest_limits,
        )  # fmt: skip

    @property
    def crowded_for(self) -> str | None:
        """The only tenant who has anything there, "" when nobody has, None when several have."""
        return None if len(self.tenants) > 1 else next(iter(self.tenants), "")

    @property
    def unpromised_mib(self) -> int:
        """What may still be guaranteed there."""
        sizes = self.capacity
        return sizes.memory_mib - sizes.system_reserve_mib - self.promised_mib - self.mapped_mib

    @property
    def usable_mib(self) -> int:
        """What is available there now, above the reserve."""
        return self.capacity.memory_available_mib - self.capacity.system_reserve_mib - self.unsettled_mib

    @property
    def uncommitted_mib(self) -> int:
        """What would be left if everything there used its ceiling."""
        sizes = self.capacity
        return sizes.memory_mib - sizes.system_reserve_mib - self.ceilings_mib - self.mapped_mib

    @property
    def room_mib(self) -> int:
        """The smaller of what may be guaranteed and what is available: the next sandbox must fit into it."""
        return min(self.unpromised_mib, self.usable_mib)


@dataclass(frozen=True)
class Refusal:
    """Why a host cannot take a demand. `for_now`: it could, were it only READY and not cordoned. `lacking`: how much is
    missing, of what `reason` names, where it can be counted."""

    host: str
    reason: str  # HostLost, Cordoned, ClassNotOffered, …, ShortOfMemory: see controlplane/scheduler_filters.py
    message: str
    for_now: bool = False
    lacking: int = 0


@dataclass(frozen=True, order=True)
class Score:
    """Why one host is better than another, the most important first; lower is better throughout."""

    spread: int  # how many of its group are in the same domain of its spread already
    cold: bool  # no ready member of a warm pool is there for it
    level: int  # how strained the host would be (Policy.levels)
    marginal_mib: int  # what it adds to the host's memory
    fetch: bool  # the image has to be brought there first
    room_mib: int  # what the host has left before: the tightest fit keeps large rooms whole
    host: str

    def parts(self, policy: Policy, *, spread: bool) -> tuple[tuple[str, str], ...]:
        """Each part for people; whether it is spread at all only the demand knows."""
        told = [("spread", f"{self.spread} of its group in the same part of its spread")] if spread else []
        return (
            *told,
            ("start", "a cold start or a clone" if self.cold else "a ready member of a warm pool"),
            ("strain", policy.levels[self.level].text),
            ("memory", f"it adds {self.marginal_mib} MiB there"),
            ("image", "has to be fetched first" if self.fetch else "is there"),
            ("fit", f"{self.room_mib} MiB free there before it"),
        )


@dataclass(frozen=True)
class Placement:
    """The chosen host, how much memory the sandbox adds there, the pool (its name) that has a member for it, and its
    score; `shared_mib`: what it maps there without adding it."""

    host: str
    marginal_mib: int
    pool: str = ""
    score: Score | None = None
    shared_mib: int = 0


@dataclass(frozen=True)
class Decision:
    """Either a placement, or why every host refused (empty when there are none)."""

    placement: Placement | None
    refusals: tuple[Refusal, ...] = ()

    @property
    def may_wait(self) -> bool:
        """Nothing fits now, but a host that is away could take it, or no host is known yet."""
        return self.placement is None and (not self.refusals or any(refusal.for_now for refusal in self.refusals))
