"""What a guest costs and how fast it changes, as measured on a host. A JSON file, read strictly; every key has a
default.

The defaults are the measured facts of ARCHITECTURE.md (2 cores, QEMU under TCG). `sandloom plan calibrate` measures a
real host and writes the file:

    {"schema": 1, "measured_on": "...", "guest_overhead_mib": 45, ...}
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from controlplane.errors import ConfigError
from controlplane.scheduler_values import GUEST_TAKES

SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """Memory in MiB, times in seconds. What is charged is what the scheduler reserves; the rest is for forecasts."""

    measured_on: str = "defaults"
    guest_overhead_mib: int = 64
    """What is reserved for the VMM of a guest and the rest of what a guest costs beside its RAM."""
    page_table_share: float = 1 / 512
    """Page tables over what they map: 8 bytes for each 4 KiB."""
    template_mib: int = 0
    """The part of a template's RAM that its clones share."""
    guest_private_mib: float = 43.0
    """What an idle guest holds alone: VMM and the RAM that it wrote to."""
    layer_share: float = 1.0
    """The part of its layers that a guest touches."""
    base_shared_mib: float = 0.0
    """What the guests of one image share beside its layers: the template's pages, the VMM's program."""
    guest_pids: int = GUEST_TAKES["pids"]
    guest_file_descriptors: int = GUEST_TAKES["file_descriptors"]
    guest_shared_memory_files: int = 2
    guest_disk_mib: int = GUEST_TAKES["disk_mib"]
    start_cold_s: float = 4.0
    start_clone_s: float = 0.5
    start_warm_s: float = 0.15
    resize_lag_s: float = 0.2
    reclaim_mib_s: float = 3800.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and (not math.isfinite(value) or value < 0):
                raise ConfigError(f"calibration: {field.name} = {value} is not a number of at least 0")


def parse(document: Any, source: str) -> Calibration:
    """A Calibration of JSON's values. ConfigError names the key and `source`."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ConfigError(f"{source}: is no calibration of schema {SCHEMA}: make one with `sandloom plan calibrate`")
    known = {field.name: field for field in fields(Calibration)}
    values = {key: value for key, value in document.items() if key != "schema"}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}; known are {', '.join(known)}")
        kinds = {"str": str, "int": int, "float": (int, float)}[str(known[key].type)]
        if not isinstance(value, kinds) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ConfigError(f"{source}: {key} = {value!r} is not {known[key].type}")
    return replace(Calibration(), **values)


def load(path: Path) -> Calibration:
    """Reads a file. ConfigError."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def dump(calibration: Calibration) -> str:
    """The file's text."""
    return json.dumps({"schema": SCHEMA, **asdict(calibration)}, indent=2) + "\n"
