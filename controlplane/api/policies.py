"""Between sandloom.v1's ServicePolicy and the value, for control plane and hosts; and which class can serve what. Pure.

`SERVABLE` is the one table of it: a service that a class cannot have answered so is refused by name when a sandbox is
created, never left out in silence.
"""

from __future__ import annotations

from dataclasses import replace

from controlplane.api.errors import PolicyError
from controlplane.api.servicechange import ServiceChange
from controlplane.api.services import (
    ALL_KERNEL,
    SERVICE_NAMES,
    Answerer,
    Service,
    ServicePolicy,
    parse_allow,
    parse_publish,
)
from controlplane.api.v1 import sandboxes_pb2

ANSWERERS = {
    Answerer.KERNEL: sandboxes_pb2.ANSWER_KERNEL,
    Answerer.TOOL: sandboxes_pb2.ANSWER_TOOL,
    Answerer.DENY: sandboxes_pb2.ANSWER_DENY,
}
_ANSWERERS_IN = {number: answerer for answerer, number in ANSWERERS.items()}
_KERNEL_ONLY = (Answerer.KERNEL,)
_ALL = (Answerer.KERNEL, Answerer.TOOL, Answerer.DENY)

SERVABLE: dict[str, dict[Service, tuple[Answerer, ...]]] = {
    "guest-kernel": {Service.SOCKETS: _ALL, Service.DNS: _ALL, Service.TIME: _ALL, Service.SYSVIEW: _ALL},
    "user-kernel": {},
    "host-kernel": {Service.SOCKETS: _ALL, Service.DNS: _ALL},
}
"""By class and service; what is not named is the kernel's only."""


def require_servable(class_name: str, policy: ServicePolicy, *, veth: bool = False) -> None:
    """PolicyError that names the first service which a sandbox of this class cannot have answered so, and who can;
    or which a link of its own (`veth`) would go around."""
    around = [one for one in policy.answered if one[0] in (Service.SOCKETS, Service.DNS)] if veth else []
    if around:
        service, answerer = around[0]
        raise PolicyError(
            f"{service.value}: {answerer.value} is for a sandbox without a network: leave out one of the two"
        )
    if policy.dns is Answerer.DENY and policy.sockets is Answerer.KERNEL:
        raise PolicyError("dns: deny holds for sockets that are not the kernel's: add sockets: tool, or sockets: deny")
    for service, answerer in policy.answered:
        if answerer in SERVABLE[class_name].get(service, _KERNEL_ONLY):
            continue
        able = [name for name, can in SERVABLE.items() if answerer in can.get(service, _KERNEL_ONLY)]
        remedy = f"classes that can: {', '.join(able)}" if able else f"leave {service.value} to the kernel"
        raise PolicyError(f"{service.value}: {answerer.value} is not to be had with class {class_name}: {remedy}")


def parse_policy(message: sandboxes_pb2.ServicePolicy, default: ServicePolicy = ALL_KERNEL) -> ServicePolicy:
    """The policy; what the message leaves open is as in `default`, its rules too when sockets are left open, its clock
    when time is.

    PolicyError says what is wrong."""
    policy = default
    if message.sockets:
        policy = replace(default, sockets=Answerer.KERNEL, dns=Answerer.KERNEL, allow=(), publish=())
    rules = tuple(map(parse_allow, message.allow)) or policy.allow
    published = tuple(map(parse_publish, message.publish)) or policy.publish
    if message.time:
        policy = replace(policy, time=Answerer.KERNEL, time_offset_ms=0)
    offset_ms = message.time_offset_ms or policy.time_offset_ms
    answerers = {service.value: _answerer(service, message, policy) for service in Service}
    withdrawn = tuple(_service(name) for name in message.withdrawn) or policy.withdrawn
    return ServicePolicy(**answerers, allow=rules, publish=published, withdrawn=withdrawn, time_offset_ms=offset_ms)


def parse_change(message: sandboxes_pb2.ServicePolicy, *, replace_allow: bool) -> ServiceChange:
    """What SetServices asks for. PolicyError."""
    if message.publish:
        raise PolicyError("published ports cannot change while it runs: create it anew with other ones")
    if message.time_offset_ms:
        raise PolicyError("a clock's offset cannot change while it runs: create it anew with another one")
    if message.allow and not replace_allow:
        raise PolicyError("rules are replaced, never added to: set replace_allow, and give all of them")
    wished = [(service, getattr(message, service.value)) for service in Service]
    answerers = tuple((one, _answerer(one, message, ALL_KERNEL)) for one, number in wished if number)
    return ServiceChange(answerers, tuple(map(parse_allow, message.allow)) if replace_allow else None)


def _service(name: str) -> Service:
    if name not in SERVICE_NAMES:
        raise PolicyError(f"{name!r} is no service that this version knows")
    return Service(name)


def _answerer(service: Service, message: sandboxes_pb2.ServicePolicy, default: ServicePolicy) -> Answerer:
    number = getattr(message, service.value)
    if number == sandboxes_pb2.ANSWERER_UNSPECIFIED:
        return default.of(service)
    if number not in _ANSWERERS_IN:
        raise PolicyError(f"{service.value}: {number} is no answerer that this version knows")
    return _ANSWERERS_IN[number]


def render_policy(policy: ServicePolicy) -> sandboxes_pb2.ServicePolicy:
    """The message; every service is named, so that nothing is left to a default of somebody else's."""
    return sandboxes_pb2.ServicePolicy(
        sockets=ANSWERERS[policy.sockets],
        dns=ANSWERERS[policy.dns],
        files=ANSWERERS[policy.files],
        secrets=ANSWERERS[policy.secrets],
        time=ANSWERERS[policy.time],
        sysview=ANSWERERS[policy.sysview],
        devices=ANSWERERS[policy.devices],
        withdrawn=[service.value for service in policy.withdrawn],
        allow=[str(rule) for rule in policy.allow],
        publish=[str(port) for port in policy.publish],
        time_offset_ms=policy.time_offset_ms,
    )
