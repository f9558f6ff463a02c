"""One cgroup a sandbox, on cgroup v2 or v1 alike, found by probing.

    v2   ROOT/<slice>/<uid>
    v1   ROOT/<controller>/<slice>/<uid> for each of memory, cpu, pids, freezer that is mounted

A cgroup outlives hostd (as its sandbox does) and goes with remove(). `cgroup.kill` (v2) or killing every pid in a
loop (v1) ends what is in it. See Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hostd.errors import ConfigError, HostdError

CPU_PERIOD_US = 100_000
V1_CONTROLLERS = ("memory", "cpu", "pids", "freezer")
SLICE = "sandloom"


@dataclass(frozen=True)
class Limits:
    """Hard bounds that stand behind all softer ones."""

    memory_bytes: int
    cpu_milli: int
    pids: int


def limit_files(version: int, limits: Limits) -> list[tuple[str, str, str]]:
    """(controller, file, value) to write for `limits`. Pure."""
    quota_us = limits.cpu_milli * CPU_PERIOD_US // 1000
    if version == 2:
        return [
            ("", "memory.max", str(limits.memory_bytes)),
            ("", "cpu.max", f"{quota_us} {CPU_PERIOD_US}"),
            ("", "pids.max", str(limits.pids)),
        ]
    return [
        ("memory", "memory.limit_in_bytes", str(limits.memory_bytes)),
        ("cpu", "cpu.cfs_period_us", str(CPU_PERIOD_US)),
        ("cpu", "cpu.cfs_quota_us", str(quota_us)),
        ("pids", "pids.max", str(limits.pids)),
    ]


@dataclass(frozen=True)
class GroupMemory:
    """Memory of all sandboxes' cgroups together; `pressure` is the text of memory.pressure, None on v1."""

    charged_bytes: int
    cache_bytes: int  # of it page cache of files, which the kernel takes back by itself
    pressure: str | None = None


@dataclass(frozen=True)
class Hierarchy:
    """Where this host's cgroups are: `roots` maps a controller ("" on v2) to the folder for our sandboxes."""

    version: int
    roots: dict[str, Path]

    @classmethod
    def probe(cls, mount: Path = Path("/sys/fs/cgroup"), name: str = SLICE) -> Hierarchy:
        """v2 when the unified tree offers memory and cpu, else v1. ConfigError when there is neither."""
        controllers = mount / "cgroup.controllers"
        if controllers.exists() and {"memory", "cpu"} <= set(controllers.read_text().split()):
            return cls(2, {"": mount / name})
        roots = {each: mount / each / name for each in V1_CONTROLLERS if (mount / each / "tasks").exists()}
        if "memory" not in roots:
            raise ConfigError(f"no memory cgroup under {mount}, neither v2 nor v1: mount one and start again")
        return cls(1, roots)

    def prepare(self) -> None:
        """Makes the parent folders and, on v2, delegates the controllers to them. ConfigError when that is refused."""
        try:
            for root in self.roots.values():
                root.mkdir(exist_ok=True)
            if self.version == 2:
                root = self.roots[""]
                offered = set((root.parent / "cgroup.controllers").read_text().split())
                wanted = " ".join(f"+{name}" for name in sorted(offered & {"cpu", "memory", "pids"}))
                for folder in (root.parent, root):
                    (folder / "cgroup.subtree_control").write_text(wanted)
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}: hostd makes a cgroup for each sandbox; run it as root, and on v2"
                " outside of any cgroup that holds processes itself"
            ) from error

    def retire(self) -> None:
        """Removes the parent folders when no sandbox is left in them; called when hostd stops."""
        for root in self.roots.values():
            _rmdir(root)

    def folders(self, uid: str) -> list[Path]:
        """A sandbox's folder in each tree."""
        return [root / uid for root in self.roots.values()]

    def create(self, uid: str, limits: Limits) -> list[Path]:
        """Makes a sandbox's cgroup; returns the `cgroup.procs` files a new process has to write itself into."""
        for folder in self.folders(uid):
            folder.mkdir(exist_ok=True)
        self.set_limits(uid, limits)
        return [folder / "cgroup.procs" for folder in self.folders(uid)]

    def set_limits(self, uid: str, limits: Limits) -> None:
        """Applies `limits`; a controller that v1 has not mounted is passed over. HostdError names the file."""
        for controller, name, value in limit_files(self.version, limits):
            if controller not in self.roots:
                continue
            path = self.roots[controller] / uid / name
            try:
                path.write_text(value)
            except FileNotFoundError:
                if path.parent.exists():
                    continue  # a kernel without this knob (no CFS bandwidth, say)
                raise HostdError(f"{path.parent}: the sandbox's cgroup is gone") from None
            except OSError as error:
                raise HostdError(f"{path} = {value}: {error.strerror}") from error

    def usage_bytes(self, uid: str) -> int:
        """Memory charged to the sandbox's cgroup now; 0 when it is gone."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        try:
            return int((self.roots["" if self.version == 2 else "memory"] / uid / name).read_text())
        except FileNotFoundError:
            return 0

    def swappable_mib(self) -> int:
        """How much this host could swap out."""
        match = re.search(r"^SwapFree:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        return int(match[1]) >> 10 if match else 0

    def reclaim(self, uid: str, size_bytes: int) -> int:
        """Has the kernel take back up to `size_bytes` of what the sandbox used least lately, into swap; how much it
        got. v2 has a file for it; on v1 the limit is lowered for a moment. Blocks while the kernel works."""
        before = self.usage_bytes(uid)
        folder = self.roots["" if self.version == 2 else "memory"] / uid
        try:
            if self.version == 2:
                (folder / "memory.reclaim").write_text(str(size_bytes))
            else:
                limit = (folder / "memory.limit_in_bytes").read_text()
                try:
                    (folder / "memory.limit_in_bytes").write_text(str(max(0, before - size_bytes)))
                finally:
                    (folder / "memory.limit_in_bytes").write_text(limit)
        except OSError:
            pass  # EBUSY, EAGAIN: not all of it; no such file: nothing
        return max(0, before - self.usage_bytes(uid))

    def total(self) -> GroupMemory:
        """What all sandboxes are charged with together. HostdError when the parent folder is gone."""
        root = self.roots["" if self.version == 2 else "memory"]
        prefix = "" if self.version == 2 else "total_"
        try:
            charged = int((root / ("memory.current" if self.version == 2 else "memory.usage_in_bytes")).read_text())
            stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        except OSError as error:
            raise HostdError(
                f"{error.filename}: {error.strerror}: the cgroup of all sandboxes cannot be read"
            ) from error
        cache = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
        pressure = root / "memory.pressure"
        return GroupMemory(charged, cache, pressure.read_text() if pressure.exists() else None)

    def limit_total(self, memory_bytes: int) -> None:
        """A hard limit on all sandboxes together; 0: none. ConfigError when the kernel does not take it."""
        root = self.roots["" if self.version == 2 else "memory"]
        path = root / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")
        none = "max" if self.version == 2 else "-1"
        try:
            path.write_text(str(memory_bytes) if memory_bytes else none)
        except OSError as error:
            raise ConfigError(
                f"{path} = {memory_bytes}: {error.strerror}: sandboxes that run may use more already; raise"
                " memory_budget_mib, or stop some"
            ) from error

    def names(self, prefix: str) -> list[str]:
        """Our cgroups whose names begin with `prefix`."""
        folders = [folder for root in self.roots.values() for folder in root.glob(f"{prefix}*")]
        return sorted({folder.name for folder in folders if folder.is_dir()})

    def pids(self, uid: str) -> set[int]:
        """Every process in the sandbox's cgroups."""
        found: set[int] = set()
        for folder in self.folders(uid):
            try:
                found.update(map(int, (folder / "cgroup.procs").read_text().split()))
            except OSError:
                continue
        return found

    def remove(
        self, uid: str, *, deadline_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> frozenset[int]:
        """Kills what is in the sandbox's cgroups and removes them; returns the pids it killed, for whose parent it is
        to reap them. Blocks until then; run it in a thread. HostdError when something stays."""
        give_up = clock() + deadline_s
        killed: set[int] = set()
        while True:
            for pid in self.pids(uid):
                killed.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            left = [folder for folder in self.folders(uid) if not _rmdir(folder)]
            if not left:
                return frozenset(killed)
            if clock() > give_up:
                raise HostdError(f"cgroup {left[0]} cannot be removed: processes {sorted(self.pids(uid))} stay in it")
            time.sleep(0.005)


def _rmdir(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
