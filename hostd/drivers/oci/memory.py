"""Elastic memory of an OCI sandbox: its cgroup's limit follows what is wanted, on v2 and v1 alike.

Growing is a write. Shrinking below what is in use takes reclaim and time: each step lowers the limit as far as the
kernel lets it (never below what it cannot reclaim, which would make it kill), until the target is reached.

    v2   memory.high throttles and reclaims at once; memory.reclaim asks for the rest; memory.max follows, so that no
         write to it ever finds more in use than it allows (that would be an OOM kill)
    v1   memory.limit_in_bytes reclaims by itself and refuses with EBUSY; memory.force_empty drops the page cache

Documentation/admin-guide/cgroup-v2.rst ("Memory Interface Files"), cgroup-v1/memory.rst.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from hostd.cgroups import Hierarchy
from hostd.errors import ControlLost
from hostd.memory.values import MemorySignals

PAGE_BYTES = 4096
SLACK_BYTES = 64 << 20
"""How far above what is in use a limit stays that cannot be reached yet: an exec's runtime needs some of it, and a
limit just above the use would turn the next page into an OOM kill."""

UNLIMITED_BYTES = 1 << 62
RECLAIM_STEP_BYTES = 64 << 20


@dataclass(frozen=True)
class Usage:
    """Bytes charged to a sandbox: all, and the part that is page cache of files on a disk."""

    used_bytes: int
    file_bytes: int


def next_limit(target_bytes: int, limit_bytes: int, used_bytes: int) -> int:
    """The limit to set now: the target when what is in use allows it, else as near as that does. Never above what it
    is while shrinking. Pure."""
    if target_bytes >= limit_bytes or used_bytes <= target_bytes:
        return target_bytes
    return min(limit_bytes, max(target_bytes, _up(used_bytes + SLACK_BYTES)))


def _up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def parse_stat(text: str, version: int) -> int:
    """File pages of memory.stat, tmpfs not among them (that cannot be dropped). Pure."""
    prefix = "total_" if version == 1 else ""
    wanted = {f"{prefix}active_file", f"{prefix}inactive_file"}
    values = (line.split() for line in text.splitlines())
    return sum(int(fields[1]) for fields in values if len(fields) == 2 and fields[0] in wanted)


def parse_signals(stat: str, events: str, pressure: str, version: int) -> MemorySignals:
    """What the kernel says of a cgroup's memory. `events` is memory.events (v2) or memory.oom_control (v1), `pressure`
    memory.pressure ("" on v1). Pure."""
    values = _numbers(stat)
    prefix = "total_" if version == 1 else ""
    stalls = {line.split()[0]: int(line.rpartition("total=")[2]) for line in pressure.splitlines() if "total=" in line}

    def mib(*names: str) -> int:
        return sum(values.get(prefix + name, 0) for name in names) >> 20

    return MemorySignals(
        psi_some_us=stalls.get("some", 0),
        psi_full_us=stalls.get("full", 0),
        refaults=values.get("workingset_refault_anon", 0) + values.get("workingset_refault_file", 0),
        oom_kills=_numbers(events).get("oom_kill", 0),
        active_mib=mib("active_anon", "active_file"),
        inactive_mib=mib("inactive_anon", "inactive_file"),
        swapped_mib=mib("swap"),
    )


def _numbers(text: str) -> dict[str, int]:
    fields = (line.split() for line in text.splitlines())
    return {one[0]: int(one[1]) for one in fields if len(one) == 2 and one[1].isdigit()}


class SandboxMemory:
    """One sandbox's memory cgroup. Its calls block for as long as the kernel reclaims: run them in a thread."""

    def __init__(self, hierarchy: Hierarchy, uid: str) -> None:
        self._version = hierarchy.version
        self._folder: Path = hierarchy.roots["" if self._version == 2 else "memory"] / uid
        self._limit_name = "memory.max" if self._version == 2 else "memory.limit_in_bytes"
        self._events_name = "memory.events" if self._version == 2 else "memory.oom_control"

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError as error:
            raise ControlLost(f"{self._folder / name}: {error.strerror}") from error

    def _write(self, name: str, value: int) -> bool:
        """False when the kernel cannot do it now."""
        try:
            (self._folder / name).write_text(str(value))
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EAGAIN):
                return False
            raise ControlLost(f"{self._folder / name} = {value}: {error.strerror}") from error
        return True

    def limit_bytes(self) -> int:
        """The hard limit now."""
        text = self._read(self._limit_name).strip()
        return UNLIMITED_BYTES if text == "max" else int(text)

    def usage(self) -> Usage:
        """What is charged now."""
        used = self._read("memory.current" if self._version == 2 else "memory.usage_in_bytes")
        return Usage(int(used), parse_stat(self._read("memory.stat"), self._version))

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed because it was at its limit."""
        return _numbers(self._read(self._events_name)).get("oom_kill", 0)

    def signals(self) -> MemorySignals:
        """See MemorySignals; stalls are told by v2 only, and by a kernel that counts them."""
        try:
            pressure = (self._folder / "memory.pressure").read_text() if self._version == 2 else ""
        except OSError:
            pressure = ""
        return parse_signals(self._read("memory.stat"), self._read(self._events_name), pressure, self._version)

    def reclaim(self, size_bytes: int) -> int:
        """Has the kernel take back up to `size_bytes` of what the sandbox has not used lately, its limit as it is; how
        much it was. v2 asks for just that (memory.reclaim); v1 knows no amount and drops all clean page cache."""
        before = self.usage().used_bytes
        if self._version == 1:
            self._write("memory.force_empty", 0)
        elif (self._folder / "memory.reclaim").exists():
            self._write("memory.reclaim", size_bytes)
        return max(0, before - self.usage().used_bytes)

    def step(self, target_bytes: int) -> bool:
        """Goes as near to `target_bytes` as can be now; whether it is reached. ControlLost when the cgroup is gone."""
        limit = self.limit_bytes()
        if limit == target_bytes:
            return True
        if self._version == 2:
            self._write("memory.high", target_bytes)
            surplus = self.usage().used_bytes - target_bytes
            if target_bytes < limit and surplus > 0 and (self._folder / "memory.reclaim").exists():
                self._write("memory.reclaim", min(surplus, RECLAIM_STEP_BYTES))
            self._write("memory.max", next_limit(target_bytes, limit, self.usage().used_bytes))
        elif not self._write(self._limit_name, target_bytes):
            self._write("memory.force_empty", 0)
            if not self._write(self._limit_name, target_bytes):
                self._write(self._limit_name, next_limit(target_bytes, limit, self.usage().used_bytes))
        return self.limit_bytes() == target_bytes
