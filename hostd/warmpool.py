"""Warm pools as values: what one is on a host, a member's life, which sandboxes a member can become. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from hostd.admission import GUEST_OVERHEAD_MIB
from hostd.drivers.qemu.template import SMALLEST_BUCKET_MIB, ceiling_bucket_mib
from hostd.errors import HostdError, InvalidSpec
from hostd.spec import ProcessSpec, Resources, SandboxClass, SandboxSpec

MOST_WANTED = 1000
MEMBER_PREFIX = "pool-"
"""Begins the names of members' cgroups and directories; a sandbox's uid has no dash."""

_POOL_UID = re.compile(r"[a-z0-9]{1,16}")


@dataclass(frozen=True)
class PoolSpec:
    """One pool's share of this host: `wanted` guests kept ready for sandboxes of this tenant, image and size."""

    uid: str
    name: str
    tenant: str
    image_digest: str
    resources: Resources
    wanted: int
    sandbox_class: SandboxClass = SandboxClass.GUEST_KERNEL

    def __post_init__(self) -> None:
        if not _POOL_UID.fullmatch(self.uid):
            raise InvalidSpec(f"pool uid {self.uid!r} is not 1-16 of [a-z0-9]")
        if not 0 <= self.wanted <= MOST_WANTED:
            raise InvalidSpec(f"pool {self.name}: {self.wanted} members are outside 0..{MOST_WANTED}")

    @property
    def need_mib(self) -> int:
        """What a member is charged at admission."""
        return self.resources.memory_min_mib + GUEST_OVERHEAD_MIB

    @property
    def ceiling_mib(self) -> int:
        """The largest ceiling that a member can serve: the top of its bucket."""
        return ceiling_bucket_mib(self.resources.memory_max_mib)

    @property
    def floor_mib(self) -> int:
        """A member serves ceilings above this."""
        return 0 if self.ceiling_mib == SMALLEST_BUCKET_MIB else self.ceiling_mib // 2

    def same_members(self, other: PoolSpec) -> bool:
        """Whether members made for one do for the other: only how many are wanted may differ."""
        return replace(self, wanted=0, name="") == replace(other, wanted=0, name="")

    def member_spec(self, uid: str) -> SandboxSpec:
        """What member `uid` is made with. Its process is never run, its hostname never set."""
        spec = SandboxSpec(uid, self.name, self.tenant, self.image_digest, "warm", self.resources, ProcessSpec(), 0)
        return replace(spec, sandbox_class=self.sandbox_class)


def fits(pool: PoolSpec, spec: SandboxSpec) -> bool:
    """Whether a member of `pool` can become the sandbox `spec`."""
    return (
        not spec.cold
        and not spec.checkpoint
        and spec.sandbox_class is pool.sandbox_class
        and not spec.network.veth
        and not (spec.services.answered and spec.sandbox_class is SandboxClass.HOST_KERNEL)  # its filter is made first
        and (pool.tenant, pool.image_digest) == (spec.tenant, spec.image_digest)
        and pool.resources.vcpus == spec.resources.vcpus
        and pool.ceiling_mib == ceiling_bucket_mib(spec.resources.memory_max_mib)
    )


class MemberState(Enum):
    """Where a member stands."""

    MAKING = "making"  # is cloned, prepared, rehearsed, paused
    READY = "ready"  # stands still and waits
    CLAIMED = "claimed"  # is a sandbox now, and that sandbox's alone
    ENDING = "ending"  # nothing of it will be left


TRANSITIONS: dict[MemberState, frozenset[MemberState]] = {
    MemberState.MAKING: frozenset({MemberState.READY, MemberState.ENDING}),
    MemberState.READY: frozenset({MemberState.CLAIMED, MemberState.ENDING}),
    MemberState.CLAIMED: frozenset(),
    MemberState.ENDING: frozenset(),
}


def move(now: MemberState, to: MemberState) -> MemberState:
    """`to`, if the table allows it from `now`; else HostdError (a bug)."""
    if to not in TRANSITIONS[now]:
        raise HostdError(f"a pool's member cannot go from {now.value} to {to.value}", reason="BadTransition")
    return to
