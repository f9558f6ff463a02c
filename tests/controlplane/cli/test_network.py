"""`--network` and `--allow`, from what is typed to what the control plane takes of it."""

from __future__ import annotations

import pytest

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.errors import UsageError
from controlplane.cli.network import parse_rule
from controlplane.edge.network import parse_network, render_network
from controlplane.errors import Invalid
from controlplane.model import Network, NetworkRule, SandboxClass
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric

HOST = SandboxClass.HOST_KERNEL


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("192.0.2.0/24", NetworkRule("192.0.2.0/24")),
        ("192.0.2.1:443", NetworkRule("192.0.2.1/32", "tcp", 443, 443)),
        ("192.0.2.1:53/udp", NetworkRule("192.0.2.1/32", "udp", 53, 53)),
        ("0.0.0.0/0:8000-8100/tcp", NetworkRule("0.0.0.0/0", "tcp", 8000, 8100)),
        ("10.0.0.0/8/udp", NetworkRule("10.0.0.0/8", "udp")),
    ],
)
def test_what_is_typed_is_what_is_kept_and_shown(text: str, rule: NetworkRule) -> None:
    message = sandboxes_pb2.Network(mode=sandboxes_pb2.NETWORK_VETH, allow=[parse_rule(text)])
    network = parse_network(message, HOST, "spec.network")
    assert network == Network(True, (rule,))
    assert parse_network(render_network(network), HOST, "spec.network") == network


@pytest.mark.parametrize("text", ["", "example.org", "10.0.0.1:", "10.0.0.1:5-", "10.0.0.1/icmp", "::1/128:80"])
def test_what_is_no_rule_is_said_with_how_one_looks(text: str) -> None:
    with pytest.raises(UsageError, match="--allow"):
        parse_rule(text)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"cidr": "192.0.2.1/24"}, "cidr"),
        ({"cidr": "300.0.0.0/8"}, "cidr"),
        ({"cidr": "10.0.0.0/8", "protocol": "icmp"}, "protocol"),
        ({"cidr": "10.0.0.0/8", "first_port": 80}, "protocol"),
        ({"cidr": "10.0.0.0/8", "protocol": "tcp", "first_port": 90, "last_port": 80}, "first_port"),
        ({"cidr": "10.0.0.0/8", "protocol": "tcp", "last_port": 80}, "first_port"),
        ({"cidr": "10.0.0.0/8", "protocol": "udp", "first_port": 70000}, "first_port"),
    ],
)
def test_a_rule_that_is_none_is_refused_with_its_field(rule: dict[str, object], field: str) -> None:
    allow = [sandboxes_pb2.NetworkRule(**rule)]  # type: ignore[arg-type]
    with pytest.raises(Invalid, match=rf"spec\.network\.allow\[0\]\.{field}"):
        parse_network(sandboxes_pb2.Network(mode=sandboxes_pb2.NETWORK_VETH, allow=allow), HOST, "spec.network")


def test_a_class_without_links_is_told_who_has_them() -> None:
    veth = sandboxes_pb2.Network(mode=sandboxes_pb2.NETWORK_VETH)
    with pytest.raises(Invalid, match="guest-kernel has no veth; classes that have it: user-kernel, host-kernel"):
        parse_network(veth, SandboxClass.GUEST_KERNEL, "spec.network")
    assert parse_network(sandboxes_pb2.Network(), SandboxClass.GUEST_KERNEL, "spec.network") == Network()
    for message in (
        sandboxes_pb2.Network(mode=9),  # type: ignore[arg-type]
        sandboxes_pb2.Network(allow=[parse_rule("10.0.0.0/8")]),
        sandboxes_pb2.Network(mode=sandboxes_pb2.NETWORK_VETH, allow=[parse_rule("10.0.0.0/8")] * 65),
    ):
        with pytest.raises(Invalid, match=r"spec\.network"):
            parse_network(message, HOST, "spec.network")


def test_run_passes_it_on(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["true"] = lambda process: 0
    words = ("--class", "host-kernel", "--network", "veth", "--allow", "192.0.2.1:443", "debian", "--", "true")
    assert cli("run", "--name", "box", *words).code == 0
    (box,) = fabric.sandboxes.values()
    assert box.spec.network.mode == sandboxes_pb2.NETWORK_VETH
    assert [rule.cidr for rule in box.spec.network.allow] == ["192.0.2.1"]
    refused = cli("run", "--allow", "192.0.2.1:443", "debian", "--", "true")
    assert refused.code == 125
    assert "give --network veth, too" in refused.err
