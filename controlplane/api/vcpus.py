"""How many vCPUs a sandbox can be given while it runs. Control plane and hosts go by the same rule. Pure."""

from __future__ import annotations

LEAST_VCPU_CEILING = 4


def vcpu_ceiling(vcpus: int) -> int:
    """The most for one that starts with `vcpus`: a power of two, no less than LEAST_VCPU_CEILING. Room for one costs a
    guest some 200 KB."""
    return max(LEAST_VCPU_CEILING, 1 << (vcpus - 1).bit_length())
