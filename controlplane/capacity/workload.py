"""What the planner plans for: classes of sandboxes, and the demands that the scheduler sees of them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from controlplane.capacity.calibration import Calibration
from controlplane.model import LayerSize, SandboxClass
from controlplane.rules import NO_RULES, Rules
from controlplane.scheduler_values import MIB, Demand, layer_mib

GUEST_LIMITS = ("pids", "file_descriptors", "shared_memory_files", "disk_mib")
"""What of a host is counted beside memory and CPU (HostState.limits), and how much a guest takes of it
(Calibration)."""


@dataclass(frozen=True)
class Image:
    """A name and its layers."""

    name: str
    layers: tuple[LayerSize, ...] = ()

    @property
    def total_mib(self) -> int:
        """All layers once."""
        return sum(map(layer_mib, self.layers))


@dataclass(frozen=True)
class Workload:
    """A class of sandboxes. `use_mib`: how much of its own memory one uses on average, and how much that varies; None
    when that is not known. `domain`: whose pages it may share, its tenant's unless given."""

    name: str
    memory_min_mib: int
    memory_max_mib: int
    cpu_milli: int
    image: Image
    tenant: str = "default"
    kind: SandboxClass = SandboxClass.GUEST_KERNEL
    rules: Rules = NO_RULES
    domain: str = ""
    use_mib: float | None = None
    use_std_mib: float = 0.0

    @property
    def vcpus(self) -> int:
        """Whole CPUs."""
        return -(-self.cpu_milli // 1000)


def demand_of(workload: Workload, calibration: Calibration, *, quantile: float = 0.0, diverging: float = 0.0) -> Demand:
    """What one sandbox of the class asks. `quantile`: of its measured use, charged where it is above the guarantee (0:
    the guarantee alone); `diverging`: the part of what it shares that becomes its own."""
    layers = workload.image.layers
    if calibration.template_mib and workload.kind is SandboxClass.GUEST_KERNEL:
        size = f"template/{workload.kind.value}/{_bucket_mib(workload.memory_max_mib)}"
        layers = (*layers, LayerSize(size, calibration.template_mib * MIB))
    shared_mib = sum(map(layer_mib, layers))
    mapped_mib = workload.memory_max_mib + shared_mib
    extras = [
        ("pids", calibration.guest_pids + workload.vcpus),
        ("file_descriptors", calibration.guest_file_descriptors + 2 * len(layers)),
        ("shared_memory_files", calibration.guest_shared_memory_files),
        ("disk_mib", calibration.guest_disk_mib),
    ]
    return Demand(
        tenant=workload.tenant,
        sandbox_class=workload.kind,
        memory_min_mib=workload.memory_min_mib,
        cpu_milli=workload.cpu_milli,
        image_digest=workload.image.name,
        layers=layers,
        memory_max_mib=workload.memory_max_mib,
        vcpus=workload.vcpus,
        cold=True,  # pools are no part of a plan
        rules=workload.rules,
        group=workload.name,
        expected_mib=expected_mib(workload, quantile),
        extra_mib=math.ceil(mapped_mib * calibration.page_table_share + diverging * shared_mib),
        extras=tuple(extras),
        guest_needs=(("pmem_slots", len(workload.image.layers)),),
        share_domain=workload.domain,
        fetchable=True,
    )


def expected_mib(workload: Workload, quantile: float) -> int:
    """The quantile of its use, taken as normally spread; 0 when nothing is known or asked."""
    if workload.use_mib is None or quantile <= 0:
        return 0
    return math.ceil(max(0.0, workload.use_mib + normal_quantile(quantile) * workload.use_std_mib))


def normal_quantile(probability: float) -> float:
    """How many standard deviations above the mean the quantile lies. ValueError outside of (0, 1)."""
    if not 0 < probability < 1:
        raise ValueError(f"{probability} is no quantile: it must lie between 0 and 1")
    low, high = -10.0, 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if normal_below(middle) < probability else (low, middle)
    return (low + high) / 2


def normal_below(deviations: float) -> float:
    """The probability of less than so many standard deviations above the mean."""
    return 0.5 * math.erfc(-deviations / math.sqrt(2))


def _bucket_mib(size_mib: int) -> int:
    return 1 << max(0, size_mib - 1).bit_length()
