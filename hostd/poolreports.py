"""Between sandloom.v1's messages about warm pools and hostd's values. Pure."""

from __future__ import annotations

from controlplane.api.v1 import pools_pb2
from hostd.edge import CLASSES, render_classes
from hostd.errors import InvalidSpec
from hostd.pools import PoolStatus
from hostd.spec import Resources
from hostd.warmpool import PoolSpec


def parse_assignment(message: pools_pb2.PoolAssignment) -> PoolSpec:
    """This host's share of a pool. InvalidSpec names what is wrong."""
    sizes = message.resources
    resources = Resources(
        memory_min_mib=sizes.memory_min_mib,
        memory_max_mib=sizes.memory_max_mib,
        memory_mib=sizes.memory_mib or sizes.memory_min_mib,
        cpu_milli=sizes.cpu_milli or 1000,
    )
    sandbox_class = CLASSES.get(getattr(message, "class"))
    if sandbox_class is None:
        raise InvalidSpec(f"pool {message.name}: class {getattr(message, 'class')} is unknown to this hostd")
    return PoolSpec(
        message.uid, message.name, message.tenant, message.image_digest, resources, message.wanted, sandbox_class
    )


def render_report(status: PoolStatus) -> pools_pb2.PoolReport:
    """How far this host got with a pool."""
    spec = status.spec
    report = pools_pb2.PoolReport(
        uid=spec.uid,
        name=spec.name,
        tenant=spec.tenant,
        image_digest=spec.image_digest,
        ready=status.ready,
        making=status.making,
        message=status.message,
        vcpus=spec.resources.vcpus,
        memory_min_mib=spec.resources.memory_min_mib,
        fits_above_mib=spec.floor_mib,
        fits_to_mib=spec.ceiling_mib,
    )
    setattr(report, "class", render_classes([spec.sandbox_class])[0])
    return report
