"""Between sandloom.v1's host and image messages and values. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from controlplane.api.identity import NAME_PATTERN
from controlplane.api.v1 import hosts_pb2, images_pb2
from controlplane.edge.enums import CLASSES, parse_class, seconds, timestamp
from controlplane.edge.poolreports import parse_pool_reports, render_pool_report
from controlplane.edge.rules import parse_labels, parse_taints
from controlplane.errors import Invalid
from controlplane.jointokens import DEFAULT_LIFETIME_S, LONGEST_LIFETIME_S
from controlplane.membership import Blocker, Member, Standing
from controlplane.model import Capacity, CountedLimit, Host, Image, ImageConfig, Layer, Resident
from controlplane.rules import text_of

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
IMAGE_NAME = re.compile(r"[a-z0-9]([a-z0-9._/:-]{0,126}[a-z0-9])?")
REGISTRY_REFERENCE = re.compile(
    r"(?=.{3,512}\Z)([a-z0-9][a-z0-9-]*(\.[a-z0-9-]+)+(:[0-9]{1,5})?|[a-z0-9-]+:[0-9]{1,5})"
    r"(/[a-z0-9]+([._-]+[a-z0-9]+)*)+(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
MAX_IMAGES = 10_000
LIMIT_NAME = re.compile(r"[a-z][a-z_]{0,31}")
MAX_LIMITS = 16


def parse_host(message: hosts_pb2.Host, now_s: float) -> Host:
    """A host's report, seen now."""
    if not NAME_PATTERN.fullmatch(message.name):
        raise Invalid("host.name", f"it must match {NAME_PATTERN.pattern}")
    if not ADDRESS.fullmatch(message.runtime_address):
        raise Invalid("host.runtime_address", f"{message.runtime_address!r} is not HOST:PORT")
    if len(message.image_digests) > MAX_IMAGES or not all(DIGEST.fullmatch(d) for d in message.image_digests):
        raise Invalid("host.image_digests", f"at most {MAX_IMAGES}, each sha256:<64 hex>")
    sizes = message.capacity
    return Host(
        name=message.name,
        capacity=Capacity(
            sizes.memory_mib, sizes.memory_available_mib, sizes.memory_reserved_mib, sizes.cpu_milli,
            sizes.disk_free_mib, sizes.system_reserve_mib, sizes.vm_overhead_mib,
        ),
        runtime_address=message.runtime_address,
        last_seen_s=now_s,
        classes=tuple(parse_class(number, "host.classes") for number in message.classes),
        accel=message.accel,
        isolation_note=message.isolation_note,
        kernel_version=message.kernel_version,
        guest_kernel_version=message.guest_kernel_version,
        qemu_version=message.qemu_version,
        cgroup_version=message.cgroup_version,
        elastic_memory=message.elastic_memory[:256],
        image_digests=tuple(message.image_digests),
        sandboxes=message.sandboxes,
        pools=parse_pool_reports(message.pools),
        kernel_features=tuple(feature[:64] for feature in message.kernel_features[:64]),
        resident=tuple(Resident(one.kind[:32], one.count, one.bytes) for one in message.resident[:16]),
        labels=parse_labels("host.labels", message.labels),
        taints=parse_taints("host.taints", message.taints),
        smt=message.smt,
        admission_closed=message.admission_closed[:512],
        limits=parse_limits(message.limits),
    )  # fmt: skip


def parse_limits(messages: Iterable[hosts_pb2.CountedLimit]) -> tuple[CountedLimit, ...]:
    """What of a host is counted."""
    limits = tuple(CountedLimit(one.name, one.left, one.of_a_guest) for one in messages)
    if len(limits) > MAX_LIMITS or not all(LIMIT_NAME.fullmatch(limit.name) for limit in limits):
        raise Invalid("host.limits", f"at most {MAX_LIMITS}, each name matches {LIMIT_NAME.pattern}")
    return limits


STATES = {
    Standing.OPEN: hosts_pb2.READY,
    Standing.CORDONED: hosts_pb2.CORDONED,
    Standing.DRAINING: hosts_pb2.DRAINING,
    Standing.DRAINED: hosts_pb2.DRAINED,
    Standing.REMOVED: hosts_pb2.LOST,  # of a record that is on its way out
}


def render_host(host: Host, member: Member, *, alive: bool, blockers: Iterable[Blocker] = ()) -> hosts_pb2.Host:
    """A host as operators see it: LOST without a lease, else as they decided."""
    sizes = host.capacity
    return hosts_pb2.Host(
        name=host.name,
        state=STATES[member.standing] if alive else hosts_pb2.LOST,
        capacity=hosts_pb2.HostCapacity(
            memory_mib=sizes.memory_mib,
            memory_available_mib=sizes.memory_available_mib,
            memory_reserved_mib=sizes.memory_reserved_mib,
            cpu_milli=sizes.cpu_milli,
            disk_free_mib=sizes.disk_free_mib,
            system_reserve_mib=sizes.system_reserve_mib,
            vm_overhead_mib=sizes.vm_overhead_mib,
        ),
        accel=host.accel,
        isolation_note=host.isolation_note,
        kernel_version=host.kernel_version,
        guest_kernel_version=host.guest_kernel_version,
        qemu_version=host.qemu_version,
        cgroup_version=host.cgroup_version,
        elastic_memory=host.elastic_memory,
        runtime_address=host.runtime_address,
        image_digests=host.image_digests,
        sandboxes=host.sandboxes,
        last_seen=timestamp(host.last_seen_s),
        classes=[CLASSES[kind] for kind in host.classes],
        resource_version=host.revision,
        pools=[render_pool_report(pool) for pool in host.pools],
        kernel_features=host.kernel_features,
        resident=[hosts_pb2.ResidentObjects(kind=r.kind, count=r.count, bytes=r.size_bytes) for r in host.resident],
        blockers=[
            hosts_pb2.DrainBlocker(
                sandbox=one.sandbox.name, uid=one.sandbox.uid, tenant=one.sandbox.tenant, reason=one.reason
            )
            for one in blockers
        ],
        labels=dict(host.labels),
        taints=[text_of(taint) for taint in host.taints],
        smt=host.smt,
        limits=[hosts_pb2.CountedLimit(name=one.name, left=one.left, of_a_guest=one.of_a_guest) for one in host.limits],
        admission_closed=host.admission_closed,
    )


def parse_lifetime_s(asked_s: int) -> int:
    """How long a join token is good for."""
    if asked_s > LONGEST_LIFETIME_S:
        raise Invalid("lifetime_s", f"{asked_s} s, {LONGEST_LIFETIME_S} s is the most")
    return asked_s or DEFAULT_LIFETIME_S


def parse_image_name(name: str, field: str) -> str:
    """A name an image may be bound to; never one that looks like a digest."""
    if not IMAGE_NAME.fullmatch(name) or name.startswith("sha256:"):
        raise Invalid(field, f"{name!r} is no image name: it must match {IMAGE_NAME.pattern} and not be a digest")
    return name


def parse_registry_reference(text: str, field: str = "reference") -> str:
    """REGISTRY/REPOSITORY[:TAG][@DIGEST]; which registry must be said."""
    if not REGISTRY_REFERENCE.fullmatch(text):
        raise Invalid(field, f"{text!r} is not REGISTRY/REPOSITORY[:TAG][@sha256:...], the registry with a dot or port")
    return text


def parse_image(message: images_pb2.Image, *, name: str, tenant: str) -> Image:
    """An image as a host imported it, under the name that it gets here."""
    if not DIGEST.fullmatch(message.digest):
        raise Invalid("image.digest", f"{message.digest!r} is not sha256:<64 hex>")
    config = message.config
    return Image(
        name=name,
        tenant=tenant,
        digest=message.digest,
        layers=tuple(Layer(one.digest, one.size_bytes, one.source_digest, one.volume_uuid) for one in message.layers),
        config=ImageConfig(
            tuple(config.entrypoint), tuple(config.cmd), tuple(sorted(config.env.items())), config.workdir, config.user
        ),
        size_bytes=message.size_bytes,
        created_at_s=seconds(message.created_at),
        format=message.format,
    )


def render_image(image: Image, hosts: Iterable[str]) -> images_pb2.Image:
    """An image as its tenant sees it; `hosts` hold it."""
    config = image.config
    return images_pb2.Image(
        name=image.name,
        digest=image.digest,
        layers=[
            images_pb2.Layer(
                digest=layer.digest,
                size_bytes=layer.size_bytes,
                source_digest=layer.source_digest,
                volume_uuid=layer.volume_uuid,
            )
            for layer in image.layers
        ],
        config=images_pb2.ImageConfig(
            entrypoint=config.entrypoint,
            cmd=config.cmd,
            env=dict(config.env),
            workdir=config.workdir,
            user=config.user,
        ),
        size_bytes=image.size_bytes,
        created_at=timestamp(image.created_at_s),
        hosts=sorted(hosts),
        tenant=image.tenant,
        format=image.format,
        resource_version=image.revision,
    )


def parse_image_reference(text: str, field: str = "name") -> str:
    """An image's name or digest, given to find one."""
    return text if DIGEST.fullmatch(text) else parse_image_name(text, field)
