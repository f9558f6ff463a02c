"""What workloads were measured to use of their own memory: a record for each (tenant, image digest). Pure.

A histogram whose buckets grow by 5 %, so that a quantile is right to 5 %; a sample loses half of its weight in
HALF_LIFE_S. The scheduler charges a quantile of it (scheduler_values.Policy) once there are LEAST_SAMPLES; before that,
the guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controlplane.model import REVISION

GROWTH = 1.05
HALF_LIFE_S = 86_400.0
LEAST_SAMPLES = 30
KEPT_S = 30 * 86_400.0
"""A workload that was not seen for so long is forgotten."""
LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Use:
    """`buckets`: (number, weight as of `newest_s`). A bucket's upper edge is GROWTH ** number MiB."""

    tenant: str
    digest: str
    buckets: tuple[tuple[int, float], ...] = ()
    samples: int = 0
    first_s: float = 0.0
    newest_s: float = 0.0
    revision: int = field(default=0, metadata=REVISION)


def bucket_of(size_mib: float) -> int:
    """The number of the bucket that holds it."""
    return 0 if size_mib <= 1 else math.ceil(math.log(size_mib, GROWTH) - 1e-9)


def quantile_mib(buckets: Mapping[int, float], share: float) -> float:
    """The upper edge of the bucket in which the quantile lies; 0 without weight."""
    total, upto = sum(buckets.values()), 0.0
    for bucket in sorted(buckets):
        upto += buckets[bucket]
        if upto >= share * total * (1 - 1e-9):
            return float(GROWTH**bucket)
    return 0.0


def with_samples(use: Use, sizes_mib: Iterable[float], now_s: float) -> Use:
    """The record with these samples of now."""
    fade = 0.5 ** (max(0.0, now_s - use.newest_s) / HALF_LIFE_S) if use.samples else 0.0
    weights = {bucket: weight * fade for bucket, weight in use.buckets if weight * fade >= LEAST_WEIGHT}
    count = 0
    for size_mib in sizes_mib:
        bucket = bucket_of(size_mib)
        weights[bucket] = weights.get(bucket, 0.0) + 1.0
        count += 1
    rounded = tuple((bucket, round(weight, 6)) for bucket, weight in sorted(weights.items()))
    first_s = use.first_s if use.samples else now_s
    return Use(use.tenant, use.digest, rounded, use.samples + count, first_s, now_s, use.revision)


def expected_mib(use: Use, share: float) -> int:
    """The quantile that is charged; 0 while there are too few samples to tell."""
    return math.ceil(quantile_mib(dict(use.buckets), share)) if use.samples >= LEAST_SAMPLES else 0


class Measured:
    """Every workload's record, and what is charged of it. Changes in place, as the view does."""

    def __init__(self, share: float) -> None:
        self._share = share
        self.uses: dict[tuple[str, str], Use] = {}  # by tenant and image digest
        self.expected: dict[tuple[str, str], int] = {}  # MiB

    def put(self, workload: tuple[str, str], use: Use | None) -> bool:
        """The record as it is now (None: there is none any more); whether something else is charged since."""
        if use is None:
            self.uses.pop(workload, None)
        else:
            self.uses[workload] = use
        before, now = self.expected.get(workload, 0), 0 if use is None else expected_mib(use, self._share)
        self.expected[workload] = now
        return now != before

    def clear(self) -> None:
        """Nothing is known."""
        self.uses.clear()
        self.expected.clear()
