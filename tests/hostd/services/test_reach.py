"""What a sandbox may reach: addresses, names, and what DNS can never open."""

from __future__ import annotations

import ipaddress

import pytest

from controlplane.api.services import Answerer, ServicePolicy, Transport, parse_allow
from hostd.services.reach import LEARNED_S, MAX_LEARNED, Reach, host_side, sandbox_side


def reach(*rules: str, dns: Answerer = Answerer.TOOL) -> Reach:
    return Reach(ServicePolicy(sockets=Answerer.TOOL, dns=dns, allow=tuple(map(parse_allow, rules))))


def allows(of: Reach, address: str, port: int, transport: Transport = Transport.TCP, now_s: float = 0.0) -> bool:
    return of.verdict(transport, ipaddress.ip_address(address), port, now_s).allowed


def test_nothing_is_reached_without_a_rule() -> None:
    verdict = reach().verdict(Transport.TCP, ipaddress.ip_address("10.0.0.1"), 80, 0.0)
    assert not verdict.allowed and "no rule" in verdict.rule


def test_rules_are_over_transport_address_and_port() -> None:
    one = reach("tcp:10.0.0.0/8:80-90", "udp:[2001:db8::]:53")
    assert allows(one, "10.2.3.4", 85) and allows(one, "2001:db8::", 53, Transport.UDP)
    assert allows(one, "::ffff:10.2.3.4", 85)  # the same place by another name
    assert not allows(one, "10.2.3.4", 91) and not allows(one, "11.2.3.4", 85)
    assert not allows(one, "10.2.3.4", 85, Transport.UDP)


def test_a_name_opens_what_it_was_lately() -> None:
    one = reach("tcp:*.example.org:80")
    assert not allows(one, "151.101.2.132", 80)
    one.learn("mirror.example.org", [ipaddress.ip_address("151.101.2.132")], 0.0)
    assert allows(one, "151.101.2.132", 80) and not allows(one, "151.101.2.132", 443)
    assert allows(one, "151.101.2.132", 80, now_s=LEARNED_S - 1)
    assert not allows(one, "151.101.2.132", 80, now_s=LEARNED_S + 1)


def test_a_name_never_opens_the_host() -> None:
    one = reach("tcp:*.evil.org:*")
    own = ["127.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "100.64.0.1", "0.0.0.0"]
    assert one.learn("a.evil.org", [ipaddress.ip_address(text) for text in own], 0.0) == []
    assert not any(allows(one, text, 80) for text in own)


@pytest.mark.parametrize(
    ("rules", "name", "allowed"),
    [
        (("tcp:*.example.org:80",), "mirror.example.org", True), (("tcp:*.example.org:80",), "example.net", False),
        (("tcp:*.example.org:80", "tcp:10.0.0.0/8:*"), "example.net", True), ((), "example.net", False),
    ],
)  # fmt: skip
def test_names_are_resolved_where_rules_decide_over_them(rules: tuple[str, ...], name: str, allowed: bool) -> None:
    assert reach(*rules).may_resolve(name).allowed is allowed


def test_dns_deny_closes_its_ports_whatever_the_rules_say() -> None:
    one = reach("udp:*:*", "tcp:*:*", dns=Answerer.DENY)
    assert not allows(one, "1.1.1.1", 53, Transport.UDP) and not allows(one, "1.1.1.1", 853)
    assert allows(one, "1.1.1.1", 54)


def test_what_is_learnt_is_bounded_and_rules_change() -> None:
    one = reach("tcp:a.org:80")
    first = ipaddress.ip_address("10.0.0.0")
    one.learn("a.org", [first + number for number in range(MAX_LEARNED + 1)], 0.0)
    assert not allows(one, "10.0.0.0", 80) and allows(one, "10.0.0.1", 80)
    one.change(ServicePolicy(sockets=Answerer.TOOL))
    assert not allows(one, "10.0.0.1", 80)


def test_the_gateway_is_the_hosts_loopback_both_ways() -> None:
    assert host_side(ipaddress.ip_address("100.64.0.1")) == "127.0.0.1"
    assert host_side(ipaddress.ip_address("fd73:616e:646c::1")) == "::1"
    assert host_side(ipaddress.ip_address("10.0.0.1")) == "10.0.0.1"
    assert str(sandbox_side(ipaddress.ip_address("127.0.0.1"))) == "100.64.0.1"
    assert str(sandbox_side(ipaddress.ip_address("10.0.0.1"))) == "10.0.0.1"
