"""`sandloom service` and what `inspect` tells of services."""

from __future__ import annotations

import json

from controlplane.api.policies import render_policy
from controlplane.api.services import Answerer, ServicePolicy, parse_allow
from controlplane.api.v1 import sandboxes_pb2
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric

USAGE = sandboxes_pb2.ServiceUsage(
    bytes_out=4096, bytes_in=512, connections=12, open_connections=1, datagrams=3,
    decisions={"sockets: allowed": 12, "sockets: refused": 2}, published=["127.0.0.1:8080:80/tcp"],
)  # fmt: skip


def with_services(fabric: FakeFabric) -> sandboxes_pb2.Sandbox:
    sandbox = fabric.add("web")
    policy = ServicePolicy(sockets=Answerer.TOOL, dns=Answerer.TOOL, allow=(parse_allow("tcp:10.0.0.0/8:443"),))
    sandbox.spec.services.CopyFrom(render_policy(policy))
    return sandbox


def test_what_services_did_is_shown(fabric: FakeFabric, cli: Cli) -> None:
    with_services(fabric)
    fabric.service_usage = USAGE
    shown = cli("service", "show", "web")
    assert [line.split() for line in shown.out.splitlines()[:2]] == [
        ["SERVICE", "WHO", "ALLOWED", "REFUSED", "CUT", "RULES"],
        ["sockets", "tool", "12", "2", "0", "tcp:10.0.0.0/8:443"],
    ]
    assert "12 connections (1 open), 3 datagrams, 4096 bytes out, 512 bytes in" in shown.err
    looked = json.loads(cli.ok("inspect", "web"))
    assert looked["service_usage"]["bytes_out"] == 4096
    assert looked["service_usage"]["decisions"]["sockets: refused"] == 2
    fabric.service_usage = None
    without = cli("inspect", "web")
    assert (
        without.code == 0 and "service_usage" not in json.loads(without.out) and "loom does not answer" in without.err
    )


def test_rules_and_a_denial_are_set(fabric: FakeFabric, cli: Cli) -> None:
    sandbox = with_services(fabric)
    cli.ok("service", "set", "web", "--allow", "tcp:10.1.0.0/16:80", "--allow", "udp:*:53")
    assert list(sandbox.spec.services.allow) == ["tcp:10.1.0.0/16:80", "udp:*:53"]
    assert "deny" in cli.ok("service", "set", "web", "sockets=deny")
    assert list(sandbox.spec.services.withdrawn) == ["sockets"]
    cli.ok("service", "set", "web", "sockets=tool", "--allow-nothing")
    assert not sandbox.spec.services.withdrawn and not sandbox.spec.services.allow
    refused = cli("service", "set", "web", "sockets=kernel")
    assert refused.code == 1 and "filter stays" in refused.err and "service show web" in refused.err


def test_what_is_wrong_is_said(fabric: FakeFabric, cli: Cli) -> None:
    with_services(fabric)
    for words, said in (
        (("web",), "nothing to change"),
        (("web", "sockts=deny"), "no such service"),
        (("web", "--allow", "10.0.0.0/8"), "no rule"),
        (("web", "--allow", "tcp:*:*", "--allow-nothing"), "contradict"),
    ):
        wrong = cli("service", "set", *words)
        assert wrong.code == 2 and said in wrong.err, wrong.err
