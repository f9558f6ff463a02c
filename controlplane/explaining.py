"""Why a sandbox is where it is, or what every host lacks for it. Pure.

Why it was placed there is read from its record (model.Placed): it was decided on hosts as they were then, which nobody
can find out later. What hosts could do for it now is worked out anew, by the scheduler's own functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from controlplane import scheduler, scheduler_filters
from controlplane.model import DesiredState, Phase, Sandbox
from controlplane.scheduler import DEFAULT_POLICY, HostState, Policy, Refusal
from controlplane.scheduler_values import Score

HOST_PARTS = frozenset({"strain", "fit"})
"""Which parts of a score tell how much of a host is promised to others (scheduler_values.Score.parts)."""


@dataclass(frozen=True)
class Verdict:
    """What one host could do for the sandbox now: its score when it fits, else what stands against it."""

    host: str
    score: Score | None
    refusal: Refusal | None


@dataclass(frozen=True)
class Explanation:
    """`verdicts`: hosts that fit, the best first, then the others, those that lack least first; `refused`: how many
    hosts for each reason."""

    sandbox: Sandbox
    message: str
    verdicts: tuple[Verdict, ...] = ()
    refused: tuple[tuple[str, int], ...] = ()
    fitting: int = 0
    policy: Policy = DEFAULT_POLICY


def explain(
    sandbox: Sandbox, states: Sequence[HostState], *, most: int, policy: Policy = DEFAULT_POLICY,
    expected: scheduler.Expected = scheduler.NOTHING_MEASURED,
) -> Explanation:  # fmt: skip
    """Everything there is to say; at most `most` hosts by name."""
    others = states
    if sandbox.host:  # what it takes itself must not stand in its own way
        others = [state for state in states if state.name != sandbox.host]
    demand = scheduler.demand_of(sandbox, expected)
    wanted = (demand.tenant, demand.image_digest)
    held = not sandbox.only_host and any(state.ready and wanted in state.images for state in states)
    verdicts = verdicts_of(replace(demand, fetchable=demand.fetchable or held), others, policy)
    refusals = [verdict.refusal for verdict in verdicts if verdict.refusal is not None]
    fitting = len(verdicts) - len(refusals)
    refused = tuple(sorted(scheduler.by_reason(refusals).items(), key=lambda item: (-item[1], item[0])))
    return Explanation(
        sandbox, _message(sandbox, fitting, len(verdicts)), tuple(verdicts[:most]), refused, fitting, policy
    )


def verdicts_of(demand: scheduler.Demand, states: Iterable[HostState], policy: Policy) -> list[Verdict]:
    """Every host's, in the order of Explanation."""
    states = list(states)
    spread = scheduler_filters.counted(demand, states)
    told: list[Verdict] = []
    for state in states:
        refused = scheduler.refusal(demand, state, policy, spread)
        score = scheduler.score(demand, state, policy, spread) if refused is None else None
        told.append(Verdict(state.name, score, refused))
    fit = sorted((one.score, one) for one in told if one.score is not None)  # no two scores are equal
    unfit = (one for one in told if one.refusal is not None)
    return [one for _, one in fit] + sorted(unfit, key=_nearness)


def _nearness(verdict: Verdict) -> tuple[bool, bool, int, str]:
    refusal = verdict.refusal
    assert refusal is not None
    return not refusal.for_now, not refusal.lacking, refusal.lacking, verdict.host


def _message(sandbox: Sandbox, fitting: int, hosts: int) -> str:
    status, placed = sandbox.status, sandbox.placed
    if sandbox.host and placed is not None and placed.host == sandbox.host:
        pool = f", from a ready member of pool {placed.pool}" if placed.pool else ""
        return f"placed on {placed.host}{pool}, the best of {placed.hosts} hosts then"
    if sandbox.host:
        return f"placed on {sandbox.host}; why was not recorded"
    if status.phase is Phase.PENDING and sandbox.desired is DesiredState.RUNNING:
        if not hosts:
            return "no host has registered yet"
        return f"{fitting} of {hosts} hosts could take it now" if fitting else f"none of {hosts} hosts can take it now"
    return f"it is {status.phase.name} and on no host: {status.message or status.reason or 'nothing more is known'}"


def for_tenant(explained: Explanation) -> Explanation:
    """The same without other hosts by name, and without what its own had left."""
    sandbox = explained.sandbox
    if sandbox.placed is not None:
        parts = tuple(part for part in sandbox.placed.parts if part[0] not in HOST_PARTS)
        sandbox = replace(sandbox, placed=replace(sandbox.placed, parts=parts))
    return replace(explained, sandbox=sandbox, verdicts=())
