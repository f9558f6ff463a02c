"""What a host has of memory now: its own, or what a budget leaves of it where a cgroup stands for the host.

    no budget    MemTotal and MemAvailable of /proc/meminfo, /proc/pressure/memory
    a budget     of the cgroup that holds all sandboxes: what is charged to it, without page cache of files, which the
                 kernel takes back by itself; on v2 its own memory.pressure

Documentation/accounting/psi.rst, filesystems/proc.rst (meminfo), admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hostd.cgroups import Hierarchy
from hostd.errors import HostdError

PROC = Path("/proc")


@dataclass(frozen=True)
class HostMemory:
    """MiB, and per cent of the last 10 s in which some task, or all of them, stood still for want of memory."""

    total_mib: int
    available_mib: int
    psi_some: float = 0.0
    psi_full: float = 0.0


def parse_psi(text: str) -> tuple[float, float]:
    """`avg10` of the lines "some" and "full"; 0 for a line that is not there. Pure."""
    found = {"some": 0.0, "full": 0.0}
    for line in text.splitlines():
        kind, *fields = line.split()
        for field in fields:
            name, _, value = field.partition("=")
            if kind in found and name == "avg10":
                found[kind] = float(value)
    return found["some"], found["full"]


def parse_meminfo(text: str) -> tuple[int, int]:
    """MemTotal and MemAvailable in MiB. HostdError when they are not there. Pure."""
    values = {line.partition(":")[0]: line.partition(":")[2].split() for line in text.splitlines()}
    try:
        return int(values["MemTotal"][0]) >> 10, int(values["MemAvailable"][0]) >> 10
    except (KeyError, IndexError, ValueError) as error:
        raise HostdError(f"/proc/meminfo has no MemTotal and MemAvailable ({error}): is /proc mounted?") from error


def total_mib() -> int:
    """What this machine has."""
    return parse_meminfo((PROC / "meminfo").read_text())[0]


def within_budget(host: HostMemory, budget_mib: int, charged_mib: int, cache_mib: int) -> HostMemory:
    """The host as a budget leaves it: never more than there is. Pure."""
    left_mib = budget_mib - max(0, charged_mib - cache_mib)
    return HostMemory(
        min(budget_mib, host.total_mib), max(0, min(left_mib, host.available_mib)), host.psi_some, host.psi_full
    )


@dataclass(frozen=True)
class HostSense:
    """Reads it. `cgroups` holds all sandboxes; without `budget_mib` (0) only the host itself counts."""

    cgroups: Hierarchy | None = None
    budget_mib: int = 0
    proc: Path = PROC

    def __call__(self) -> HostMemory:
        """The host now. Blocks for microseconds. HostdError."""
        total_mib, available_mib = parse_meminfo(_read(self.proc / "meminfo") or "")
        host = HostMemory(total_mib, available_mib, *parse_psi(_read(self.proc / "pressure/memory") or ""))
        if not self.budget_mib or self.cgroups is None:
            return host
        group = self.cgroups.total()
        own = group.pressure
        if own is not None:
            host = HostMemory(total_mib, available_mib, *parse_psi(own))
        return within_budget(host, self.budget_mib, group.charged_bytes >> 20, group.cache_bytes >> 20)


def _read(path: Path) -> str | None:
    """None where this kernel has no such file."""
    try:
        return path.read_text()
    except OSError:
        return None
