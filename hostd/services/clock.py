"""What a sandbox's clock shows. Pure.

The clock is its own kernel's, which is read without a system call: hostd sets it at the start, when a copy goes on,
when hostd takes a sandbox over and after a checkpoint stopped it; under `time: tool` and `deny` nobody inside can.
"""

from __future__ import annotations

from controlplane.api.services import ServicePolicy

NS_PER_MS = 1_000_000


def clock_ns(policy: ServicePolicy, now_ns: int) -> int:
    """Nanoseconds since 1970 on the sandbox's clock when the host's shows `now_ns`."""
    return now_ns + policy.time_offset_ms * NS_PER_MS
