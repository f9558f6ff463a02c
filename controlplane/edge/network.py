"""Between sandloom.v1's network messages and values: parse once, strictly, and render. Pure."""

from __future__ import annotations

import ipaddress

from controlplane.api.v1 import sandboxes_pb2
from controlplane.errors import Invalid
from controlplane.model import Network, NetworkRule, SandboxClass

MAX_RULES = 64
MAX_PORT = 65535
PROTOCOLS = ("", "tcp", "udp")


def parse_network(network: sandboxes_pb2.Network, sandbox_class: SandboxClass, field: str) -> Network:
    """What a sandbox may talk to. Invalid names the field, and the classes that have such a network."""
    known = (sandboxes_pb2.NETWORK_MODE_UNSPECIFIED, sandboxes_pb2.NETWORK_NONE, sandboxes_pb2.NETWORK_VETH)
    if network.mode not in known:
        raise Invalid(f"{field}.mode", f"{network.mode} is no network mode: use NETWORK_NONE or NETWORK_VETH")
    veth = network.mode == sandboxes_pb2.NETWORK_VETH
    if veth and sandbox_class is SandboxClass.GUEST_KERNEL:
        raise Invalid(f"{field}.mode", "class guest-kernel has no veth; classes that have it: user-kernel, host-kernel")
    if network.allow and not veth:
        raise Invalid(f"{field}.allow", "there is nothing to allow without a network: use NETWORK_VETH, too")
    if len(network.allow) > MAX_RULES:
        raise Invalid(f"{field}.allow", f"{len(network.allow)} rules, {MAX_RULES} is the most")
    return Network(veth, tuple(_rule(rule, f"{field}.allow[{at}]") for at, rule in enumerate(network.allow)))


def _rule(rule: sandboxes_pb2.NetworkRule, field: str) -> NetworkRule:
    try:
        cidr = ipaddress.IPv4Network(rule.cidr)
    except ValueError as error:
        raise Invalid(f"{field}.cidr", f"{rule.cidr!r} is no IPv4 network, 192.0.2.0/24 say: {error}") from error
    if rule.protocol not in PROTOCOLS:
        raise Invalid(f"{field}.protocol", f"{rule.protocol!r} is none of tcp, udp")
    first, last = rule.first_port, rule.last_port or rule.first_port
    if first and not rule.protocol:
        raise Invalid(f"{field}.protocol", "ports are of tcp or of udp: say which")
    if (last and not first) or not first <= last <= MAX_PORT:
        raise Invalid(f"{field}.first_port", f"{first} to {last} are no ports")
    return NetworkRule(str(cidr), rule.protocol, first, last)


def render_network(network: Network) -> sandboxes_pb2.Network:
    """What was asked for."""
    return sandboxes_pb2.Network(
        mode=sandboxes_pb2.NETWORK_VETH if network.veth else sandboxes_pb2.NETWORK_NONE,
        allow=[
            sandboxes_pb2.NetworkRule(
                cidr=rule.cidr, protocol=rule.protocol, first_port=rule.first_port, last_port=rule.last_port
            )
            for rule in network.allow
        ],
    )
