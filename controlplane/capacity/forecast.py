"""What sandboxes will really hold in memory, and the calibration that makes such a forecast right. Pure.

A host holds for the guests of one image and domain what they share (layers, template, the VMM's program), once; and for
each guest what it holds alone: its VMM and the RAM that it wrote to. One guest's memory d(1) and that of several d(n)
tell the two apart: each guest more adds the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.workload import Workload


@dataclass(frozen=True)
class Seen:
    """Guests of one image as the sharing ledger shows them, MiB: all their pages, each once; and of one guest on
    average the pages of layers and of the VMM in its page tables."""

    guests: int
    distinct_mib: float
    layers_mib: float
    vmm_mib: float


def calibrated(base: Calibration, seen: Sequence[Seen], image_mib: float) -> Calibration:
    """With the memory figures of what was seen, from one guest on to several. ValueError when that cannot be told
    apart."""
    first, last = seen[0], seen[-1]
    if last.guests <= first.guests:
        raise ValueError(f"{first.guests} and {last.guests} guests tell nothing apart: measure one, and then more")
    private_mib = (last.distinct_mib - first.distinct_mib) / (last.guests - first.guests)
    private_mib = max(0.0, private_mib)
    shared_mib = max(0.0, last.distinct_mib - last.guests * private_mib)
    layers_mib = min(last.layers_mib, shared_mib)
    return replace(
        base,
        guest_private_mib=round(private_mib, 2),
        layer_share=round(layers_mib / image_mib, 4) if image_mib else base.layer_share,
        base_shared_mib=round(shared_mib - layers_mib, 2),
        guest_overhead_mib=max(1, round(last.vmm_mib + 0.5)),
    )


def forecast_mib(calibration: Calibration, demand: Iterable[tuple[Workload, int]]) -> float:
    """What a host that runs so many of each class holds for them. A class's `use_mib` is what one holds of its own
    beyond an idle guest; not known: nothing."""
    images: dict[tuple[str, str], float] = {}
    alone_mib = 0.0
    for workload, count in demand:
        if not count:
            continue
        domain = workload.domain or workload.tenant
        images[domain, workload.image.name] = (
            workload.image.total_mib * calibration.layer_share + calibration.base_shared_mib
        )
        alone_mib += count * (calibration.guest_private_mib + (workload.use_mib or 0.0))
    return alone_mib + sum(images.values())
