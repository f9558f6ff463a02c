"""Which system calls of a sandbox on the host's own kernel reach its supervisor: asked of the agent's own table.

`sandloom-agent --calls WHO` (guestagent/src/host.c) prints what policy.c would notify in a guest, so that the two
kinds of sandboxes cannot have different rules.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache

from controlplane.api.services import Answerer, Service, ServicePolicy
from guestagent.binary import binary_path
from guestagent.errors import AgentMissing
from hostd.errors import StartFailed
from hostd.services.syscalls import NAMES

NUMBERS = {Answerer.KERNEL: 0, Answerer.TOOL: 1, Answerer.DENY: 2}
ANY_ARGUMENT = 6
TELL_DEADLINE_S = 30.0


@dataclass(frozen=True)
class NotifiedCall:
    """A call that is served; with an `argument` (its index) only when that is `value`."""

    name: str
    argument: int | None
    value: int


def answerers_of(policy: ServicePolicy) -> tuple[int, ...]:
    """Who answers each service, in the wire's numbers and order (PROTOCOL.md, SERVICES)."""
    return tuple(NUMBERS[policy.of(service)] for service in Service)


def parse_calls(text: str) -> tuple[NotifiedCall, ...]:
    """What the agent prints. KeyError for a call that has no name here (hostd/services/syscalls.py), ValueError."""
    calls = []
    for line in text.splitlines():
        number, argument, value = map(int, line.split())
        calls.append(NotifiedCall(NAMES[number], None if argument == ANY_ARGUMENT else argument, value))
    return tuple(calls)


def notified_calls(policy: ServicePolicy) -> tuple[NotifiedCall, ...]:
    """What the filter has to notify. StartFailed. Runs a program the first time that a policy is asked for."""
    return _told("".join(map(str, answerers_of(policy))))


@cache
def _told(who: str) -> tuple[NotifiedCall, ...]:
    try:
        argv = [str(binary_path()), "--calls", who]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TELL_DEADLINE_S, check=True)
        return parse_calls(done.stdout)
    except (AgentMissing, OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
        raise StartFailed(f"the calls that services need are not known: {error}", reason="ServicesFailed") from error
