"""Tenants: parse, call, render. See tenants.proto for every method's contract."""

from __future__ import annotations

from controlplane import paging
from controlplane.api.v1 import tenants_pb2, tenants_pb2_grpc
from controlplane.edge import tenants as edge
from controlplane.errors import NotFound
from controlplane.gate import Context, Gate
from controlplane.tenancy import Tenant
from controlplane.tenants import Tenants
from controlplane.view import View


class TenantsService(tenants_pb2_grpc.TenantsServicer):
    """See the module."""

    def __init__(self, gate: Gate, tenants: Tenants, view: View) -> None:
        self._gate, self._tenants, self._view = gate, tenants, view

    async def CreateTenant(self, request: tenants_pb2.CreateTenantRequest, context: Context) -> tenants_pb2.Tenant:
        """See tenants.proto."""
        async with self._gate.admit(context):
            return self._rendered(await self._tenants.create(edge.parse_tenant(request)))

    async def GetTenant(self, request: tenants_pb2.GetTenantRequest, context: Context) -> tenants_pb2.Tenant:
        """See tenants.proto."""
        async with self._gate.admit(context) as caller:
            name = edge.parse_tenant_name(request.name or caller.tenant)
            if not caller.is_operator and name != caller.tenant:
                raise NotFound("TenantNotFound", f"there is no tenant {name}", tenant=name)
            return self._rendered(self._tenants.get(name))

    async def ListTenants(
        self, request: tenants_pb2.ListTenantsRequest, context: Context
    ) -> tenants_pb2.ListTenantsResponse:
        """See tenants.proto. Of the view: there are few tenants, and some have no record."""
        async with self._gate.admit(context):
            cursor, most = paging.parse(request.page_token, "tenants"), paging.page_size(request.page_size)
            rest = [tenant for tenant in self._tenants.all() if tenant.name > cursor.after]
            shown = rest[:most]
            revision = self._view.revision
            token = paging.token(paging.Cursor("tenants", shown[-1].name, revision)) if len(rest) > most else ""
            return tenants_pb2.ListTenantsResponse(
                tenants=[self._rendered(tenant) for tenant in shown], next_page_token=token, resource_version=revision
            )

    async def UpdateTenant(self, request: tenants_pb2.UpdateTenantRequest, context: Context) -> tenants_pb2.Tenant:
        """See tenants.proto."""
        async with self._gate.admit(context):
            name, quota = edge.parse_tenant_name(request.name), edge.parse_quota(request.quota)
            return self._rendered(await self._tenants.update(name, quota, trusted=request.trusted, tag=request.etag))

    async def DeleteTenant(
        self, request: tenants_pb2.DeleteTenantRequest, context: Context
    ) -> tenants_pb2.DeleteTenantResponse:
        """See tenants.proto."""
        async with self._gate.admit(context):
            await self._tenants.delete(edge.parse_tenant_name(request.name), allow_missing=request.allow_missing)
            return tenants_pb2.DeleteTenantResponse()

    def _rendered(self, tenant: Tenant) -> tenants_pb2.Tenant:
        return edge.render_tenant(tenant, self._tenants.used(tenant.name))
