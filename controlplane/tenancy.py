"""The value of a tenant, and the one that is always there. Frozen, free of protobuf."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from controlplane import codec
from controlplane.model import REVISION
from controlplane.quotas import UNBOUNDED, Quota

DEFAULT_TENANT = "default"
"""The operator's own: it is there without a record, and trusted then."""


@dataclass(frozen=True)
class Tenant:
    """Who owns things. `trusted`: may run sandboxes on the host's own kernel."""

    name: str
    quota: Quota = UNBOUNDED
    trusted: bool = False
    created_at_s: float = 0.0
    revision: int = field(default=0, metadata=REVISION)


def etag(tenant: Tenant) -> str:
    """Changes with the tenant's record."""
    return hashlib.sha256(codec.encode(tenant)).hexdigest()[:16]
