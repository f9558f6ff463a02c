"""A sandbox as the present view places it: on a host and why, PENDING when it may wait, or HostsFull. No I/O."""

from __future__ import annotations

from dataclasses import replace

from controlplane import scheduler, transitions
from controlplane.errors import HostsFull
from controlplane.model import Placed, Sandbox, SandboxStatus
from controlplane.scheduler import Decision, Demand, Placement
from controlplane.view import View


def demand_on(view: View, sandbox: Sandbox) -> Demand:
    """What a sandbox asks of the hosts that there are: one that lacks its image may fetch it from one that has it."""
    demand = scheduler.demand_of(sandbox, view.measured.expected)
    if demand.fetchable or sandbox.only_host:  # a checkpoint kept the layers it goes on with
        return demand
    return replace(demand, fetchable=view.is_held(demand.tenant, demand.image_digest))


def placed(view: View, sandbox: Sandbox) -> Sandbox:
    """The sandbox placed; PENDING when it may wait. HostsFull with numbers. One that has an `only_host` goes there or
    nowhere, and does not wait."""
    only = sandbox.only_host
    demand = demand_on(view, sandbox)
    decision = _decide(view, demand, only)
    if decision.placement is not None:
        return assigned(view, sandbox, demand, decision.placement)
    if decision.may_wait and not only:
        why = scheduler.counts(decision.refusals) or "no host has registered yet"
        text = f"waiting for a host: {why} (`sandloom explain {sandbox.name}` says what there is to say)"
        return replace(sandbox, status=SandboxStatus(reason="NoHost", message=text))
    states = [state for state in view.survey() if only in ("", state.name)]
    room = max((state.room_mib for state in states if state.ready), default=0)
    text, sizes = f"no host can take sandbox {sandbox.name}", sandbox.spec.resources
    raise HostsFull(
        f"{text} ({sizes.memory_min_mib} MiB guaranteed, {sizes.cpu_milli / 1000:g} CPUs):"
        f" {scheduler.counts(decision.refusals) or 'no host has registered yet'}",
        f"{text}: {scheduler.summary(decision.refusals) or 'no host has registered yet'}",
        {"most_room_mib": max(0, room)},
        needed_mib=sizes.memory_min_mib,
        **{f"hosts_{reason}": count for reason, count in scheduler.by_reason(decision.refusals).items()},
    )


def _decide(view: View, demand: Demand, only: str) -> Decision:
    if only:
        return scheduler.place(demand, [state for state in view.survey() if state.name == only])
    return view.census.index().decide(demand)


def assigned(view: View, sandbox: Sandbox, demand: Demand, chosen: Placement) -> Sandbox:
    """The sandbox on its host under a new epoch, with what spoke for it."""
    policy, score = scheduler.DEFAULT_POLICY, chosen.score
    because = Placed(
        chosen.host, view.revision, len(view.hosts), chosen.marginal_mib, chosen.shared_mib, demand.charge_mib,
        chosen.pool, score.parts(policy, spread=demand.rules.spread is not None) if score else (),
    )  # fmt: skip
    why = f"it has a ready member of pool {chosen.pool}" if chosen.pool else ""
    after = transitions.scheduled(sandbox, chosen.host, max(view.revision, sandbox.epoch + 1), why=why)
    return replace(after, placed=because)


def still_hopeless(view: View, sandbox: Sandbox) -> bool:
    """Whether a PENDING sandbox that was told why has nowhere to go still: cheap, for it does not ask every host."""
    if sandbox.only_host:
        return False
    return bool(sandbox.status.reason) and view.census.index().place(demand_on(view, sandbox)) is None
