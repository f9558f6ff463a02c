"""A sandbox as the present view places it: on a host and why, PENDING when it may wait, or Exhausted. No I/O."""

from __future__ import annotations

from dataclasses import replace

from controlplane import keys, scheduler, transitions
from controlplane.errors import Exhausted
from controlplane.model import Placed, Sandbox, SandboxStatus
from controlplane.scheduler import Decision, Demand, Placement
from controlplane.store.contract import Expect
from controlplane.view import View


def placed(view: View, sandbox: Sandbox, *, only: str = "") -> tuple[Sandbox, list[Expect]]:
    """The sandbox placed, with the guards of what was decided on; PENDING when it may wait. Exhausted with numbers. On
    host `only` or nowhere, when that is given: then it does not wait."""
    demand = scheduler.demand_of(sandbox)
    decision = _decide(view, demand, only)
    if decision.placement is not None:
        return assigned(view, sandbox, demand, decision.placement)
    if decision.may_wait and not only:
        why = scheduler.summary(decision.refusals) or "no host has registered yet"
        return replace(sandbox, status=SandboxStatus(reason="NoHost", message=f"waiting for a host: {why}")), []
    states = [state for state in view.survey() if only in ("", state.name)]
    room = max((state.room_mib for state in states if state.ready), default=0)
    raise Exhausted(
        "NoHostHasRoom",
        f"no host can take sandbox {sandbox.name}: {scheduler.summary(decision.refusals)}",
        needed_mib=sandbox.spec.resources.memory_min_mib,
        most_room_mib=max(0, room),
        **{f"hosts_{reason}": count for reason, count in scheduler.by_reason(decision.refusals).items()},
    )


def _decide(view: View, demand: Demand, only: str) -> Decision:
    if only:
        return scheduler.place(demand, [state for state in view.survey() if state.name == only])
    return view.census.index().decide(demand)


def assigned(view: View, sandbox: Sandbox, demand: Demand, chosen: Placement) -> tuple[Sandbox, list[Expect]]:
    """The sandbox on its host under a new epoch, with what spoke for it, and the guard of the host's placements."""
    policy, score = scheduler.DEFAULT_POLICY, chosen.score
    because = Placed(
        chosen.host, view.revision, len(view.hosts), chosen.marginal_mib, chosen.shared_mib, demand.charge_mib,
        chosen.pool, score.parts(policy) if score else (),
    )  # fmt: skip
    why = f"it has a ready member of pool {chosen.pool}" if chosen.pool else ""
    after = transitions.scheduled(sandbox, chosen.host, max(view.revision, sandbox.epoch + 1), why=why)
    guard = Expect(keys.placement(chosen.host), view.placements.get(chosen.host, 0))
    return replace(after, placed=because), [guard]


def still_hopeless(view: View, sandbox: Sandbox) -> bool:
    """Whether a PENDING sandbox that was told why has nowhere to go still: cheap, for it does not ask every host."""
    return bool(sandbox.status.reason) and view.census.index().place(scheduler.demand_of(sandbox)) is None
