"""Between a host's reports of its warm pools and values. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.api.v1 import pools_pb2
from controlplane.edge.enums import CLASSES, parse_class
from controlplane.errors import Invalid
from controlplane.model import HostPool

MAX_POOLS, MAX_MESSAGE_CHARS = 1000, 1024


def parse_pool_reports(messages: Iterable[pools_pb2.PoolReport]) -> tuple[HostPool, ...]:
    """What a host says of every pool that it keeps a share of."""
    reports = tuple(
        HostPool(
            uid=message.uid[:64],
            name=message.name[:64],
            tenant=message.tenant[:64],
            image_digest=message.image_digest[:128],
            ready=message.ready,
            making=message.making,
            message=message.message[:MAX_MESSAGE_CHARS],
            vcpus=message.vcpus,
            memory_min_mib=message.memory_min_mib,
            fits_above_mib=message.fits_above_mib,
            fits_to_mib=message.fits_to_mib,
            sandbox_class=parse_class(getattr(message, "class"), "host.pools.class"),
        )
        for message in messages
    )
    if len(reports) > MAX_POOLS:
        raise Invalid("host.pools", f"{len(reports)} pools, {MAX_POOLS} is the most")
    return reports


def render_pool_report(pool: HostPool) -> pools_pb2.PoolReport:
    """The same as operators see it."""
    report = pools_pb2.PoolReport(
        uid=pool.uid,
        name=pool.name,
        tenant=pool.tenant,
        image_digest=pool.image_digest,
        ready=pool.ready,
        making=pool.making,
        message=pool.message,
        vcpus=pool.vcpus,
        memory_min_mib=pool.memory_min_mib,
        fits_above_mib=pool.fits_above_mib,
        fits_to_mib=pool.fits_to_mib,
    )
    setattr(report, "class", CLASSES[pool.sandbox_class])
    return report
