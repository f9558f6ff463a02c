"""The fake fabric's Tenants: which there are."""

from __future__ import annotations

from typing import Any

import grpc

from controlplane.api.identity import TENANT_HEADER
from controlplane.api.status import DETAILS_TRAILER, Condition, Failure, to_status
from controlplane.api.v1 import tenants_pb2, tenants_pb2_grpc


class FakeTenants(tenants_pb2_grpc.TenantsServicer):
    """`tenants` is what there is beside `default`."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants: list[str] = []

    def ListTenants(self, request: Any, context: Any) -> tenants_pb2.ListTenantsResponse:
        return tenants_pb2.ListTenantsResponse(tenants=[tenants_pb2.Tenant(name=name) for name in self.tenants])

    def GetTenant(self, request: Any, context: Any) -> tenants_pb2.Tenant:
        if request.name not in self.tenants:
            status = to_status(Failure(Condition.NOT_FOUND, "TenantNotFound", f"there is no tenant {request.name}"))
            context.set_trailing_metadata(((DETAILS_TRAILER, status.SerializeToString()),))
            context.abort(grpc.StatusCode.NOT_FOUND, status.message)
        return tenants_pb2.Tenant(name=request.name)

    def CreateTenant(self, request: Any, context: Any) -> tenants_pb2.Tenant:
        raise NotImplementedError

    def UpdateTenant(self, request: Any, context: Any) -> tenants_pb2.Tenant:
        raise NotImplementedError

    def DeleteTenant(self, request: Any, context: Any) -> tenants_pb2.DeleteTenantResponse:
        raise NotImplementedError


def acting_for(context: Any) -> str:
    """The tenant that a call acts for."""
    return next((value for key, value in context.invocation_metadata() if key == TENANT_HEADER), "default")
