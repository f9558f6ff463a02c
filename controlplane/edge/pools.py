"""Between sandloom.v1's pool messages and values: parse once, strictly, and render. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from controlplane import codec
from controlplane.api.v1 import pools_pb2
from controlplane.edge.enums import CLASSES, parse_class, timestamp
from controlplane.edge.sandboxes import REQUEST_ID, parse_name, parse_resources, render_resources
from controlplane.errors import Invalid
from controlplane.model import Pool, PoolSpec, SandboxClass
from controlplane.poolspread import PoolShare, PoolState
from controlplane.requests import PoolCreation

MAX_SIZE = 1000
WARM_CLASSES = (SandboxClass.GUEST_KERNEL, SandboxClass.HOST_KERNEL)


def parse_pool_creation(request: pools_pb2.CreatePoolRequest) -> PoolCreation:
    """What CreatePool asks for."""
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        raise Invalid("request_id", f"it must match {REQUEST_ID.pattern}")
    spec = request.spec
    if not spec.image:
        raise Invalid("spec.image", "name the image whose sandboxes are to start at once")
    kind = parse_class(getattr(spec, "class"), "spec.class")
    if kind not in WARM_CLASSES:
        have = ", ".join(one.value for one in WARM_CLASSES)
        raise Invalid("spec.class", f"class {kind.value} has no warm pools; classes that have it: {have}")
    made = PoolSpec(spec.image, parse_resources(spec.resources), parse_size(spec.size, "spec.size"), "", kind)
    return PoolCreation(parse_name(request.name), made, request.request_id, request.validate_only)


def parse_size(size: int, field: str = "size") -> int:
    """How many members are wanted."""
    if size > MAX_SIZE:
        raise Invalid(field, f"{size} members, {MAX_SIZE} is the most")
    return size


def etag(pool: Pool) -> str:
    """Changes with what is asked of a pool, not with how far the hosts are."""
    return hashlib.sha256(codec.encode(pool)).hexdigest()[:16]


def render_pool(state: PoolState) -> pools_pb2.Pool:
    """A pool as users see it."""
    pool = state.pool
    spec = pools_pb2.PoolSpec(
        image=pool.spec.image,
        image_digest=pool.spec.image_digest,
        resources=render_resources(pool.spec.resources),
        size=pool.spec.size,
    )
    setattr(spec, "class", CLASSES[pool.spec.sandbox_class])
    return pools_pb2.Pool(
        name=pool.name,
        uid=pool.uid,
        tenant=pool.tenant,
        spec=spec,
        hosts=[
            pools_pb2.PoolOnHost(
                host=row.host, wanted=row.wanted, ready=row.ready, making=row.making, message=row.message
            )
            for row in state.hosts
        ],
        ready=state.ready,
        message=state.message,
        created_at=timestamp(pool.created_at_s),
        resource_version=pool.revision,
        etag=etag(pool),
    )


def render_assignments(shares: Iterable[PoolShare]) -> pools_pb2.PoolAssignments:
    """All that one host is to keep."""
    return pools_pb2.PoolAssignments(pools=[_render_share(share) for share in shares])


def _render_share(share: PoolShare) -> pools_pb2.PoolAssignment:
    pool = share.pool
    message = pools_pb2.PoolAssignment(
        uid=pool.uid,
        name=pool.name,
        tenant=pool.tenant,
        image_digest=pool.spec.image_digest,
        resources=render_resources(pool.spec.resources),
        wanted=share.wanted,
    )
    setattr(message, "class", CLASSES[pool.spec.sandbox_class])
    return message
