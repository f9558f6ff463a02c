"""An engine's address space cut into guest RAM, image layers and the VMM itself, from /proc/PID/smaps."""

from __future__ import annotations

import re

from hostd.drivers.contract import Region
from native import _dax

RAM_PREFIXES = ("/memfd:memory-backend-memfd", "/memfd:sandloom-template", "/memfd:sandloom-checkpoint")
LAYER_SUFFIX = "/blob"
LAYER_MOUNT = re.compile(r"/mounts/g\d+/[0-9a-f]{16}\.erofs/")
"""A file of a layer's mount, which a guest maps where the blob would be (hostd/drivers/onecopy.py)."""


def kind_of(path: str) -> str:
    """What a mapping of `path` is: guest RAM is in named memfds (QEMU's own, a template's, a
    checkpoint's), layers are the store's
    blobs, or files of their mounts."""
    if path.startswith(RAM_PREFIXES):
        return "ram"
    return "layer" if path.endswith(LAYER_SUFFIX) or LAYER_MOUNT.search(path) else "vmm"


def regions_of(pid: int) -> list[Region]:
    """The mappings of `pid` that have resident pages. Empty when the process is gone."""
    try:
        mappings = _dax.smaps(pid)
    except (ProcessLookupError, FileNotFoundError):
        return []
    return [Region(kind_of(each.path), pid, each.start, each.end, each.rss_kib) for each in mappings if each.rss_kib]
