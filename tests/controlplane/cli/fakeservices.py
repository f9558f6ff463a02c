"""The part of the fake control plane that changes services: it does as it is told, by the real pure rules."""

from __future__ import annotations

from typing import Any

from controlplane.api.errors import PolicyError
from controlplane.api.policies import parse_change, parse_policy, render_policy
from controlplane.api.servicechange import changed
from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2


class FakeServices:
    """Methods of the fake fabric. Tests read and set `service_usage`; None: its host is away."""

    service_usage: sandboxes_pb2.ServiceUsage | None = None

    def SetServices(self: Any, request: sandboxes_pb2.SetServicesRequest, context: Any) -> sandboxes_pb2.Sandbox:
        self._called("SetServices", request, context)
        sandbox: sandboxes_pb2.Sandbox = self.find(request.name, context)
        wish = parse_change(request.services, replace_allow=request.replace_allow)
        try:
            policy = changed(parse_policy(sandbox.spec.services), wish)
        except PolicyError as error:
            self.refuse(context, Condition.PRECONDITION, "ServiceFixed", str(error))
        sandbox.spec.services.CopyFrom(render_policy(policy))
        return sandbox

    def GetServiceUsage(
        self: Any, request: sandboxes_pb2.GetServiceUsageRequest, context: Any
    ) -> sandboxes_pb2.ServiceUsage:
        self._called("GetServiceUsage", request, context)
        if self.service_usage is None:
            self.refuse(context, Condition.UNAVAILABLE, "HostAway", "host loom does not answer")
        usage: sandboxes_pb2.ServiceUsage = self.service_usage
        return usage
