"""The life of a sandbox on its host: one enum, one transition table. Pure."""

from __future__ import annotations

from enum import Enum

from hostd.errors import HostdError


class Phase(Enum):
    """Where a sandbox stands. EXITED and FAILED are terminal for the workload; GONE for the host."""

    ASSIGNED = "assigned"  # journaled, nothing made yet
    STARTING = "starting"  # directory, cgroup, VMM, kernel, agent, command
    RUNNING = "running"  # the main process was started
    STOPPING = "stopping"  # asked to end
    PARKED = "parked"  # a checkpoint on this host's disk, and nothing runs
    EXITED = "exited"  # the main process ended and everything but record and log is gone
    FAILED = "failed"  # ended for another reason, which the record names
    GONE = "gone"  # nothing of it is left here


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.ASSIGNED: frozenset({Phase.STARTING, Phase.FAILED, Phase.EXITED, Phase.GONE}),
    Phase.STARTING: frozenset({Phase.RUNNING, Phase.FAILED, Phase.EXITED, Phase.STOPPING}),
    Phase.RUNNING: frozenset({Phase.STOPPING, Phase.PARKED, Phase.EXITED, Phase.FAILED}),
    Phase.PARKED: frozenset({Phase.RUNNING, Phase.EXITED, Phase.FAILED}),
    Phase.STOPPING: frozenset({Phase.EXITED, Phase.FAILED}),
    Phase.EXITED: frozenset({Phase.GONE}),
    Phase.FAILED: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}

ENDED = frozenset({Phase.EXITED, Phase.FAILED, Phase.GONE})


def move(now: Phase, to: Phase) -> Phase:
    """`to`, if the table allows it from `now`; else HostdError (a bug, not an operator's mistake)."""
    if to not in TRANSITIONS[now]:
        raise HostdError(f"a sandbox cannot go from {now.value} to {to.value}", reason="BadTransition")
    return to
