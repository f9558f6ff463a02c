"""Removing folders whose path was computed: never a relative one, never a mount, never anything but a folder of ours.

`Path("")` is the working directory to shutil.rmtree. A path that comes out of a record or a plan passes through here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hostd.errors import HostdError

LEAST_PARTS = 4
"""`/`, and three names: nothing of ours lies higher (/var/lib/sandloom, /run/sandloom/<uid>)."""


def mounts_within(folder: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> list[Path]:
    """Everything that is mounted on or below `folder` (field 5 of mountinfo, proc(5), its octal escapes undone)."""
    fields = (line.split(" ")[4] for line in mountinfo.read_text().splitlines())
    points = (Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)) for field in fields)
    return sorted(point for point in points if point == folder or folder in point.parents)


def require_own(folder: Path, otherwise: str) -> None:
    """HostdError, saying `otherwise`, unless hostd could have made `folder`: it is absolute and lies deep enough."""
    if not folder.is_absolute() or len(folder.parts) < LEAST_PARTS or ".." in folder.parts:
        raise HostdError(f"{str(folder)!r} is no folder that hostd makes: {otherwise}", reason="InternalError")


def remove_folder(folder: Path) -> None:
    """Removes a folder and all that is in it; nothing happens when it is not there. HostdError when the path is not
    one that hostd could have made, when it is mounted on, or when something of it stays."""
    require_own(folder, "it is not removed")
    mounted = mounts_within(folder)
    if mounted:
        raise HostdError(f"{mounted[0]} is mounted: unmount it first, or what it shows would be removed with {folder}")
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostdError(f"{folder} cannot be removed: {error.strerror}") from error
