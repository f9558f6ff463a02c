"""Decisions of the guest-kernel driver, as pure functions: the guest's shape, its hard limits, its identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.api.vcpus import vcpu_ceiling
from guestagent.messages import Configure
from hostd.cgroups import Limits
from hostd.drivers.contract import LayerFile, StartPlan
from hostd.drivers.qemu.command import FUNCTIONS, GuestShape, RamFile, qemu_argv
from hostd.drivers.qemu.template import (
    GuestIdentity,
    ceiling_bucket_mib,
    layers_bucket_mib,
    template_key,
)
from hostd.services.clock import clock_ns
from hostd.spec import BLOCK_MIB, MemoryShape, Resources, SandboxSpec, base_ram_mib, memory_shape

VM_OVERHEAD_MIB = 256
"""Above guest RAM in the cgroup's hard limit: QEMU's heap, TCG's buffers, page tables. Not what a VM uses
(about 50), but what it may never pass."""

VM_PIDS = 256
LAYER_DEADLINE_MS = 20_000
HOTPLUG_PORTS = 2


@dataclass(frozen=True)
class GuestKernel:
    """What guests boot here: files in the store that group `gid` may read."""

    version: str
    digest: str
    initrd_digest: str
    vmlinuz: Path
    initrd: Path
    gid: int
    init_on_alloc: bool = True


def limits_for(resources: Resources, *, restored: bool = False) -> Limits:
    """The hard cgroup bounds of a VM with these resources.

    A restored one may be charged for each page of its memory twice: for its own copy, and for the page of zeros in its
    checkpoint's file that it was the first to touch."""
    memory_mib = resources.memory_max_mib * (2 if restored else 1)
    return Limits((memory_mib + VM_OVERHEAD_MIB) << 20, resources.cpu_milli, VM_PIDS)


def shape_for(plan: StartPlan, kernel: GuestKernel, accel: str, layers_as: str = "pmem") -> GuestShape:
    """What this plan's guest looks like. A layer that an image has twice is one device. InvalidSpec."""
    unique = unique_layers(plan.layers)
    return GuestShape(
        uid=plan.spec.uid,
        folder=plan.folder,
        kernel=kernel.vmlinuz,
        initrd=kernel.initrd,
        accel=accel,
        vcpus=plan.spec.resources.vcpus,
        max_vcpus=vcpu_ceiling(plan.spec.resources.vcpus),
        init_on_alloc=kernel.init_on_alloc,
        memory=memory_shape(plan.spec.resources, sum(layer.size_bytes for layer in unique)),
        layers=unique,
        layers_as=layers_as,
    )


def unique_layers(layers: tuple[LayerFile, ...]) -> tuple[LayerFile, ...]:
    """A layer that an image has twice is one device."""
    return tuple({layer.volume_uuid: layer for layer in layers}.values())


def template_shape(plan: StartPlan, kernel: GuestKernel, accel: str, *, with_image: bool) -> GuestShape | None:
    """The template that this plan's guest could be cloned from; None when there can be none.

    Sizes are rounded up to buckets (hostd/drivers/qemu/template.py). Generic templates have ports for hot-plug
    instead of layers."""
    resources, layers = plan.spec.resources, unique_layers(plan.layers)
    if not with_image and len(layers) > HOTPLUG_PORTS * FUNCTIONS:
        return None
    ceiling_mib, base_mib = _template_sizes(plan)
    if resources.memory_min_mib < base_mib:
        return None
    return GuestShape(
        uid="template",
        folder=Path("/nonexistent"),
        kernel=kernel.vmlinuz,
        initrd=kernel.initrd,
        accel=accel,
        vcpus=resources.vcpus,
        max_vcpus=vcpu_ceiling(resources.vcpus),
        init_on_alloc=kernel.init_on_alloc,
        memory=MemoryShape(base_mib, ceiling_mib - base_mib),
        layers=layers if with_image else (),
        hotplug_ports=0 if with_image else HOTPLUG_PORTS,
    )


def _template_sizes(plan: StartPlan) -> tuple[int, int]:
    """Ceiling and base RAM of the template for such a sandbox, in MiB."""
    ceiling_mib = ceiling_bucket_mib(plan.spec.resources.memory_max_mib)
    layers_bytes = sum(layer.size_bytes for layer in unique_layers(plan.layers))
    return ceiling_mib, base_ram_mib(ceiling_mib + layers_bucket_mib(layers_bytes))


def lacking_template(plan: StartPlan) -> str:
    """Why there can be no generic template for it (template_shape), for people; "" when there can be one. Pure."""
    ceiling_mib, base_mib = _template_sizes(plan)
    if len(unique_layers(plan.layers)) > HOTPLUG_PORTS * FUNCTIONS:
        return "the image has more layers than can be hot-plugged"
    least_mib = plan.spec.resources.memory_min_mib
    if least_mib >= base_mib:
        return ""
    return f"its minimum of {least_mib} MiB is below the {base_mib} MiB in which a template of {ceiling_mib} MiB boots"


def key_of(shape: GuestShape, identity: GuestIdentity, domain: str) -> str:
    """The key of the template `shape`: its command line without what differs between hosts, runs and clones."""
    nameless = replace(
        shape,
        kernel=Path("kernel"),
        initrd=Path("initrd"),
        layers=tuple(replace(layer, path=Path(layer.volume_uuid.hex())) for layer in shape.layers),
        ram=RamFile(0, private=False),
    )
    return template_key(qemu_argv(nameless), identity, domain, [layer.volume_uuid.hex() for layer in shape.layers])


def clone_memory(template: MemoryShape, resources: Resources) -> MemoryShape:
    """What of a template's memory a sandbox may use: its elastic part ends at the sandbox's own ceiling."""
    elastic = max(0, resources.memory_max_mib - template.base_mib) // BLOCK_MIB * BLOCK_MIB
    return MemoryShape(template.base_mib, min(template.elastic_mib, elastic))


def machine_id_of(spec: SandboxSpec) -> bytes:
    """32 hex digits that follow from the uid, so that they are the same after a restart."""
    return hashlib.sha256(b"sandloom machine-id " + spec.uid.encode()).hexdigest()[:32].encode()


def configure_for(spec: SandboxSpec, layers: tuple[bytes, ...], *, entropy: bytes, now_ns: int) -> Configure:
    """The identity of one sandbox."""
    last_wins = tuple(reversed(dict.fromkeys(reversed(layers))))  # of equal layers the topmost decides
    return Configure(
        hostname=spec.hostname.encode(),
        layers=last_wins,
        upper_mib=max(16, spec.resources.memory_max_mib // 2),
        entropy=entropy,
        machine_id=machine_id_of(spec),
        time_unix_ns=clock_ns(spec.services, now_ns),
        deadline_ms=LAYER_DEADLINE_MS,
    )
