"""Decisions of the OCI driver, as pure functions: hard limits, the size of the writable layer, what a handle says."""

from __future__ import annotations

from hostd.cgroups import Limits
from hostd.drivers.oci.runtime import Runtime
from hostd.spec import Resources

MIN_UPPER_MIB = 16
PIDS = 4096
OVERHEAD_MIB = {"crun": 8, "runsc": 64}
"""Above the sandbox's own memory in its hard limit: monitor and init, or monitor, Sentry and gofer. Measured private:
0.3 MiB and 14 MiB for an idle sandbox; the rest is the Sentry's bookkeeping of its workload's memory."""


def overhead_bytes(runtime: Runtime) -> int:
    """What the sandbox's cgroup may use beyond the sandbox's memory."""
    return OVERHEAD_MIB[runtime.name] << 20


def limits_for(resources: Resources, runtime: Runtime) -> Limits:
    """The cgroup bounds of a sandbox with these resources now."""
    memory_bytes = (resources.memory_mib << 20) + overhead_bytes(runtime)
    return Limits(memory_bytes, resources.cpu_milli, PIDS)


def upper_mib(resources: Resources) -> int:
    """How much a sandbox may write to its root: half of the memory it has now, so that a full root is ENOSPC and not
    the sandbox's end for want of memory."""
    return max(MIN_UPPER_MIB, resources.memory_mib // 2)
