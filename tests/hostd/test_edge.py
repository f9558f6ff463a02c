"""What a host refuses of an assignment by itself, whoever let it through before."""

from __future__ import annotations

import pytest

from controlplane.api.policies import render_policy
from controlplane.api.services import Answerer, ServicePolicy
from controlplane.api.v1 import sandboxes_pb2
from hostd.edge import parse_sandbox
from hostd.errors import InvalidSpec

SOCKETS = ServicePolicy(sockets=Answerer.TOOL, dns=Answerer.TOOL)


def assigned(sandbox_class: sandboxes_pb2.SandboxClass.ValueType, policy: ServicePolicy) -> sandboxes_pb2.Sandbox:
    spec = sandboxes_pb2.SandboxSpec(image_digest="sha256:" + "0" * 64, services=render_policy(policy))
    setattr(spec, "class", sandbox_class)
    spec.process.argv.append("true")
    spec.resources.memory_min_mib = spec.resources.memory_max_mib = 512
    return sandboxes_pb2.Sandbox(uid="u", name="n", tenant="t", spec=spec, desired_state=sandboxes_pb2.DESIRED_RUNNING)


def test_services_that_the_class_has_are_taken() -> None:
    assert parse_sandbox(assigned(sandboxes_pb2.GUEST_KERNEL, SOCKETS)).services == SOCKETS


@pytest.mark.parametrize(
    ("sandbox_class", "policy", "why"),
    [
        (sandboxes_pb2.USER_KERNEL, SOCKETS, "sockets: tool is not to be had with class user-kernel"),
        (sandboxes_pb2.GUEST_KERNEL, ServicePolicy(devices=Answerer.DENY), "devices: deny is not to be had"),
        (sandboxes_pb2.GUEST_KERNEL, ServicePolicy(dns=Answerer.DENY), "dns: deny"),
    ],
)
def test_services_that_the_class_has_not_are_refused_by_name(
    sandbox_class: sandboxes_pb2.SandboxClass.ValueType, policy: ServicePolicy, why: str
) -> None:
    with pytest.raises(InvalidSpec, match=f"sandbox n: services: {why}"):
        parse_sandbox(assigned(sandbox_class, policy))
