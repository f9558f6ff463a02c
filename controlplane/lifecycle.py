"""The life of a sandbox as the control plane sees it: one table. Pure.

Hosts report only the newest status, so steps between two reports may be left out; going back is a fault. The table is
that of one epoch: a sandbox that begins anew elsewhere (transitions.replaced, transitions.moved) is PENDING again.
"""

from __future__ import annotations

from controlplane.model import DesiredState, Phase, Sandbox

ENDED = frozenset({Phase.EXITED, Phase.FAILED})
"""The workload is over: the name is free again and nothing of it runs."""

UNBEGUN = frozenset({Phase.PENDING, Phase.SCHEDULED})
"""No host has done anything for it yet."""

_AHEAD = {
    Phase.PENDING: {Phase.SCHEDULED},
    Phase.SCHEDULED: {Phase.PENDING, Phase.STARTING, Phase.RUNNING, Phase.PARKED, Phase.STOPPING},
    Phase.STARTING: {Phase.RUNNING, Phase.PARKED, Phase.STOPPING},
    Phase.RUNNING: {Phase.PARKED, Phase.STOPPING},
    Phase.PARKED: {Phase.RUNNING, Phase.STOPPING},
    Phase.STOPPING: set[Phase](),
}
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    **{phase: frozenset(ahead | ENDED) for phase, ahead in _AHEAD.items()},
    Phase.EXITED: frozenset(),
    Phase.FAILED: frozenset(),
}


def allowed(now: Phase, to: Phase) -> bool:
    """Whether a sandbox may be reported as `to` when it is known as `now`. Staying is always allowed."""
    return to is now or to in TRANSITIONS[now]


def is_open_ended(sandbox: Sandbox) -> bool:
    """Whether the control plane itself has to see to it: it waits for a host, or for its removal."""
    ended = sandbox.status.phase in ENDED
    left_over = ended and not sandbox.host and sandbox.spec.remove_on_exit
    return sandbox.status.phase is Phase.PENDING or sandbox.desired is DesiredState.REMOVED or left_over
