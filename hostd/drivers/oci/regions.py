"""An OCI sandbox's processes' address spaces cut into its own memory, image layers and what runs it.

A mapping belongs to the image when it maps a file of the sandbox's root (by device, as /proc/PID/smaps tells it). The
programs that run the sandbox (monitor, init, runsc) count as "vmm", and so does their own heap; the user-space
kernel keeps its workload's memory in a memfd named runsc-memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hostd.drivers.contract import Region
from native import _dax

SENTRY_MEMORY = "/memfd:runsc-memory"
OURS = ("/sandloom-monitor", "/runsc", "/crun")


def kind_of(path: str, *, runs_it: bool) -> str:
    """ "ram", "layer" or "vmm" for a mapping of `path` in a process that runs the sandbox, or in its workload. Pure."""
    if path.startswith(SENTRY_MEMORY):
        return "ram"
    if path.endswith(OURS):
        return "vmm"
    if path.startswith("/") and not path.startswith(("/memfd:", "/dev/", "/SYSV")):
        return "layer"
    return "vmm" if runs_it else "ram"


def _runs_it(pid: int) -> bool:
    """Whether the process is ours or the runtime's: by its executable, which a workload cannot choose to be."""
    try:
        return str(Path(f"/proc/{pid}/exe").readlink()).endswith(OURS)
    except OSError:
        return False


def regions_of(pids: Iterable[int]) -> list[Region]:
    """The mappings of these processes that have resident pages. Blocks."""
    found: list[Region] = []
    for pid in pids:
        runs_it = _runs_it(pid)
        try:
            mappings = _dax.smaps(pid)
        except (ProcessLookupError, FileNotFoundError):
            continue
        found += [Region(kind_of(m[5], runs_it=runs_it), pid, m[0], m[1], m[6]) for m in mappings if m[6]]
    return found
