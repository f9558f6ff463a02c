"""How many of the things that the kernel counts are left on this host: what stops one more sandbox before memory does.

    pids               the least of kernel.pid_max, kernel.threads-max and each pids.max above hostd's own cgroup, less
                       what is taken of it; threads count
    file_descriptors   fs.file-max less the open files of everybody

A shared-memory file (memfd) is not among them: the kernel bounds them by memory and by descriptors alone. Sources:
Documentation/admin-guide/sysctl/kernel.rst and fs.rst, admin-guide/cgroup-v2.rst and cgroup-v1/pids.rst.
"""

from __future__ import annotations

from pathlib import Path

MOST = (1 << 63) - 1


def counted_left(root: Path = Path("/")) -> dict[str, int]:
    """What is left of each; a thing that this kernel does not tell of is not in it."""
    left = {"pids": _pids_left(root), "file_descriptors": _files_left(root)}
    return {name: max(0, min(count, MOST)) for name, count in left.items() if count is not None}


def _pids_left(root: Path) -> int | None:
    """Of the whole machine, and of each cgroup that hostd is in."""
    tasks = _text(root / "proc/loadavg").split()
    known = [_number(root / "proc/sys/kernel" / name) for name in ("pid_max", "threads-max")]
    bounds = [bound for bound in known if bound is not None]
    lefts = [min(bounds) - int(tasks[3].partition("/")[2])] if bounds and len(tasks) > 3 else []
    for folder in _own_cgroups(root):
        most, taken = _number(folder / "pids.max"), _number(folder / "pids.current")
        if most is not None and taken is not None:  # "max": no bound
            lefts.append(most - taken)
    return min(lefts, default=None)


def _own_cgroups(root: Path) -> list[Path]:
    """The folders of the cgroup that counts our pids and of those above it, v2's or v1's."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "pids" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("pids" if controllers else "")
        own = mount / path.lstrip("/")
        folders += [own, *(above for above in own.parents if above.is_relative_to(mount))]
    return folders


def _files_left(root: Path) -> int | None:
    allocated = _text(root / "proc/sys/fs/file-nr").split()
    return int(allocated[2]) - int(allocated[0]) if len(allocated) == 3 else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
