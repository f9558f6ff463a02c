"""What of a sandbox's services can change while it runs, as a function of the policy and the wish. Pure.

Which calls leave the sandbox's kernel is settled by the filters that its processes run under, and a filter cannot be
changed. So what can change is what the tool at the other end says: its rules; and whether it says yes to anything
(`tool` to `deny`, and back for what began as `tool`). A denied tool differs from `deny` at create in one thing: socket
itself is not refused, connect and datagrams are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.api.errors import PolicyError
from controlplane.api.services import AllowRule, Answerer, Service, ServicePolicy

CHANGEABLE = (Service.SOCKETS, Service.DNS)


@dataclass(frozen=True)
class ServiceChange:
    """What is wished: `answerers` of some services, and another list of rules (None: leave it)."""

    answerers: tuple[tuple[Service, Answerer], ...] = ()
    allow: tuple[AllowRule, ...] | None = None


def changed(policy: ServicePolicy, wish: ServiceChange) -> ServicePolicy:
    """The policy afterwards. PolicyError names what cannot change while the sandbox runs, and why."""
    withdrawn = set(policy.withdrawn)
    for service, answerer in wish.answerers:
        if answerer is policy.now(service):
            continue
        _require_changeable(policy, service, answerer)
        withdrawn ^= {service}
    after = replace(policy, withdrawn=tuple(one for one in Service if one in withdrawn))
    if wish.allow is None or wish.allow == policy.allow:
        return after
    if policy.sockets is not Answerer.TOOL:
        raise PolicyError(f"rules need sockets: tool, and it has sockets: {policy.sockets.value} since it was created")
    return replace(after, allow=wish.allow)


def _require_changeable(policy: ServicePolicy, service: Service, answerer: Answerer) -> None:
    began = policy.of(service)
    text = f"{service.value}: {policy.now(service).value} cannot become {answerer.value} while it runs"
    if service not in CHANGEABLE:
        raise PolicyError(f"{text}: only {' and '.join(one.value for one in CHANGEABLE)} can change")
    if began is not Answerer.TOOL:
        raise PolicyError(f"{text}: it began as {began.value}, and its processes' filter stays: create it anew")
    if answerer is Answerer.KERNEL:
        raise PolicyError(f"{text}: its kernel has no network, and its processes' filter stays: create it anew")
