"""What a sandbox with a link to its host may send and get: names, addresses and nftables rules, as pure functions.

A sandbox's link is a veth pair: `eth0` in a network namespace of its own, with one address of the fabric's range and a
gateway that every such link has (169.254.1.1, link-local as RFC 3927 has it), so that links need no networks of
their own. One nftables table a sandbox, which goes with it. Whatever begins in the sandbox is dropped, unless a rule
of its spec allows it; whatever begins outside of it is dropped, except from its host itself. So are, whatever the
rules say: its host, other addresses than its own, IPv6, and link-local networks that no rule names as such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from ipaddress import IPv4Network

from hostd.spec import Allowed, Network

GATEWAY = "169.254.1.1"
LINK_LOCAL = IPv4Network("169.254.0.0/16")
RESERVED_ADDRESSES = 2  # the range's first and last


@dataclass(frozen=True)
class Link:
    """One sandbox's: `name` is its namespace's, its table's and, as far as 15 characters go, its veth's."""

    name: str
    address: str

    @property
    def veth(self) -> str:
        """The host's end (IFNAMSIZ: 15 characters)."""
        return self.name


def name_of(uid: str) -> str:
    """The same for a sandbox at any time, and no other's: 15 characters."""
    return "sl" + hashlib.sha256(b"sandloom link " + uid.encode()).hexdigest()[:13]


def address_of(uid: str, cidr: str, taken: Container[str]) -> str:
    """A free address of `cidr`, the same one for a sandbox as long as nobody else has it; "" when all are taken."""
    network = IPv4Network(cidr)
    count = network.num_addresses - RESERVED_ADDRESSES
    begin = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big")
    for step in range(count):
        address = str(network[1 + (begin + step) % count])
        if address not in taken:
            return address
    return ""


def link_commands(link: Link) -> str:
    """For `ip -batch`, in the host's namespace."""
    return (
        f"link add {link.veth} type veth peer name eth0 netns {link.name}\n"
        f"addr add {GATEWAY}/32 dev {link.veth}\n"
        f"link set {link.veth} up\n"
        f"route add {link.address}/32 dev {link.veth}\n"
    )


def inside_commands(link: Link) -> str:
    """For `ip -batch`, in the sandbox's namespace."""
    return (
        "link set lo up\n"
        f"addr add {link.address}/32 dev eth0\n"
        "link set eth0 up\n"
        f"route add {GATEWAY}/32 dev eth0\n"
        f"route add default via {GATEWAY} dev eth0\n"
    )


def _match(rule: Allowed) -> str:
    to = f"ip daddr {rule.cidr}"
    if not rule.protocol:
        return to
    if not rule.first_port:
        return f"{to} meta l4proto {rule.protocol}"
    ports = str(rule.first_port) if rule.first_port == rule.last_port else f"{rule.first_port}-{rule.last_port}"
    return f"{to} {rule.protocol} dport {ports}"


def _rules(network: Network) -> list[str]:
    """Those that name link-local networks come before the rest of these is dropped."""
    local = [rule for rule in network.allow if IPv4Network(rule.cidr).subnet_of(LINK_LOCAL)]
    others = [rule for rule in network.allow if rule not in local]
    return [
        *(f"{_match(rule)} accept" for rule in local),
        f"ip daddr {LINK_LOCAL} drop",
        *(f"{_match(rule)} accept" for rule in others),
        "drop",
    ]


def ruleset(link: Link, network: Network, *, nat: bool) -> str:
    """For `nft -f`: the sandbox's table, made anew."""
    into, out_of = f'oifname "{link.veth}"', f'iifname "{link.veth}"'
    forward = "\n        ".join(_rules(network))
    masquerade = ""
    if nat:
        masquerade = (
            "\n    chain leaving {\n        type nat hook postrouting priority srcnat; policy accept;\n"
            f'        ip saddr {link.address} oifname != "{link.veth}" masquerade\n    }}'
        )
    return f"""table inet {link.name}
delete table inet {link.name}
table inet {link.name} {{
    chain allowed {{
        {forward}
    }}
    chain through {{
        type filter hook forward priority filter; policy accept;
        {out_of} meta nfproto ipv6 drop
        {out_of} ip saddr != {link.address} drop
        {out_of} ct state established,related accept
        {out_of} goto allowed
        {into} ct state established,related accept
        {into} drop
    }}
    chain to_host {{
        type filter hook input priority filter; policy accept;
        {out_of} meta nfproto ipv6 drop
        {out_of} ip saddr != {link.address} drop
        {out_of} ct state established,related accept
        {out_of} drop
    }}{masquerade}
}}
"""
