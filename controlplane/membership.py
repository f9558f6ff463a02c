"""A host's standing in the fabric: the durable part, one table, and what becomes of what it has. Pure.

Liveness is the lease's matter and nobody else's; a host's standing is what operators decided, kept in members/<host>. A
host without a record is OPEN: the fabric's CA vouches for its certificate. REMOVED is kept as a tombstone, so that the
certificates it had are refused; joining again with a token makes it OPEN, with the new certificate only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from controlplane import lifecycle
from controlplane.errors import Precondition
from controlplane.model import REVISION, DesiredState, RestartPolicy, Sandbox


class Standing(Enum):
    """What operators decided of a host."""

    OPEN = "open"  # takes sandboxes while its lease holds
    CORDONED = "cordoned"  # takes none; what it has stays
    DRAINING = "draining"  # takes none; what it has is moved away
    DRAINED = "drained"  # takes none and has none
    REMOVED = "removed"  # is none of ours any more


TRANSITIONS: dict[Standing, frozenset[Standing]] = {
    Standing.OPEN: frozenset({Standing.CORDONED, Standing.DRAINING, Standing.REMOVED}),
    Standing.CORDONED: frozenset({Standing.OPEN, Standing.DRAINING, Standing.REMOVED}),
    Standing.DRAINING: frozenset({Standing.OPEN, Standing.DRAINED, Standing.REMOVED}),
    Standing.DRAINED: frozenset({Standing.OPEN, Standing.CORDONED, Standing.DRAINING, Standing.REMOVED}),
    Standing.REMOVED: frozenset({Standing.OPEN}),  # by joining anew
}


@dataclass(frozen=True)
class Member:
    """A host's record. `serials` (hex) are of the certificates it may use; empty: any that the CA signed for its name.
    `force`: a drain stops what it cannot move."""

    name: str
    standing: Standing = Standing.OPEN
    serials: tuple[str, ...] = ()
    force: bool = False
    since_s: float = 0.0
    revision: int = field(default=0, metadata=REVISION)

    @property
    def takes_new(self) -> bool:
        """Whether sandboxes may be placed there while its lease holds."""
        return self.standing is Standing.OPEN


def moved(member: Member, to: Standing, now_s: float, *, force: bool = False) -> Member:
    """The member in its new standing; itself when it is there already. Precondition when the table forbids it."""
    if member.standing is to and member.force == force:
        return member
    if to is not member.standing and to not in TRANSITIONS[member.standing]:
        text = f"host {member.name} is {member.standing.value} and cannot become {to.value}"
        raise Precondition("WrongStanding", text, host=member.name, standing=member.standing.value)
    return replace(member, standing=to, force=force, since_s=now_s)


def admits(member: Member | None, serial: str) -> bool:
    """Whether a certificate with this serial may speak for the host."""
    if member is None:
        return True
    return member.standing is not Standing.REMOVED and (not member.serials or serial in member.serials)


@dataclass(frozen=True)
class Blocker:
    """A sandbox that a drain leaves where it is."""

    sandbox: Sandbox
    reason: str


@dataclass(frozen=True)
class DrainPlan:
    """What a drain does next: what moves now, what an operator has to see to, and whether anything lives there."""

    move: tuple[Sandbox, ...]
    blockers: tuple[Blocker, ...]
    empty: bool


def plan_drain(there: Iterable[Sandbox], leaving: int, most: int, has_room: Callable[[Sandbox], bool]) -> DrainPlan:
    """`there` is assigned to the host, `leaving` of others are ending on it already; at most `most` move at a time.

    What is ending anyway is waited for. The order is that of names, so that a drain always tells the same."""
    live = sorted((s for s in there if s.status.phase not in lifecycle.ENDED), key=lambda s: (s.tenant, s.name, s.uid))
    moving: list[Sandbox] = []
    blockers: list[Blocker] = []
    for sandbox in live:
        if sandbox.desired is not DesiredState.RUNNING:
            continue
        why = unmovable(sandbox)
        if why:
            blockers.append(Blocker(sandbox, why))
        elif len(moving) + leaving >= most:
            continue
        elif has_room(sandbox):
            moving.append(sandbox)
        else:
            blockers.append(Blocker(sandbox, "no other host can take it now"))
    return DrainPlan(tuple(moving), tuple(blockers), not live and not leaving)


def unmovable(sandbox: Sandbox) -> str:
    """Why it cannot begin anew elsewhere; empty when it can."""
    if sandbox.spec.checkpoint:
        return "it goes on from a checkpoint, which is on this host"
    if sandbox.spec.restart is not RestartPolicy.ON_HOST_LOSS:
        return "its restart policy is never: it would lose what it has done"
    return ""


def begins_anew(sandbox: Sandbox) -> bool:
    """Whether a sandbox whose host is gone is to run elsewhere."""
    live = sandbox.status.phase not in lifecycle.ENDED
    return live and sandbox.desired is DesiredState.RUNNING and not unmovable(sandbox)
