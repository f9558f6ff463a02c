"""Between sandloom.v1's tenant messages and values: parse once, strictly, and render. Pure."""

from __future__ import annotations

from dataclasses import asdict, fields

from controlplane.api.identity import NAME_PATTERN
from controlplane.api.v1 import tenants_pb2
from controlplane.edge.enums import timestamp
from controlplane.errors import Invalid
from controlplane.quotas import Quota, Usage
from controlplane.tenancy import Tenant, etag


def parse_tenant_name(name: str) -> str:
    """A tenant's name: a DNS label, as its certificate's SAN has it."""
    if not NAME_PATTERN.fullmatch(name):
        raise Invalid("name", f"{name!r} is not a tenant's name: it must match {NAME_PATTERN.pattern}")
    return name


def parse_quota(message: tenants_pb2.Quota) -> Quota:
    """Bounds; what is unset is none."""
    given = {field.name: value for field, value in message.ListFields()}
    return Quota(**{field.name: given.get(field.name) for field in fields(Quota)})


def parse_tenant(request: tenants_pb2.CreateTenantRequest) -> Tenant:
    """What CreateTenant asks for."""
    return Tenant(parse_tenant_name(request.name), parse_quota(request.quota), request.trusted)


def render_tenant(tenant: Tenant, used: Usage) -> tenants_pb2.Tenant:
    """A tenant and what it has."""
    message = tenants_pb2.Tenant(
        name=tenant.name,
        quota=tenants_pb2.Quota(**{name: most for name, most in asdict(tenant.quota).items() if most is not None}),
        trusted=tenant.trusted,
        usage=tenants_pb2.TenantUsage(**asdict(used)),
        resource_version=tenant.revision,
        etag=etag(tenant),
    )
    if tenant.created_at_s:
        message.created_at.CopyFrom(timestamp(tenant.created_at_s))
    return message
