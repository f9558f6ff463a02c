"""The planner's forecast of memory, with a calibration measured here, against what the host then holds: within 10 %."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.capacity import calibration as calibrations
from controlplane.capacity.forecast import forecast_mib
from controlplane.capacity.workload import Image, Workload
from controlplane.model import LayerSize
from tests.integration.fabric import Fabric, until

pytestmark = pytest.mark.guest

MIB = 1 << 20
HOLD = """
import time
held = bytearray({} << 20)
held[::4096] = b"x" * len(range(0, len(held), 4096))
print("held", flush=True)
time.sleep(100000)
"""
EXTRA_MIB = (0, 40, 90)


def test_what_was_forecast_is_what_is_held(fabric: Fabric, tmp_path: Path) -> None:
    written = tmp_path / "calibration.json"
    fabric.ok(
        "plan", "calibrate", "userland", "--guests", "2", "--memory", "256M:512M", "--write", str(written), "--",
        "python3", "-c", HOLD.format(0),
    )  # fmt: skip
    assert fabric.asked("ps", "-a") == []  # its guests are gone
    measured = calibrations.load(written)
    assert 0 < measured.start_clone_s < measured.start_cold_s
    assert 0 < measured.guest_private_mib < 128
    assert measured.guest_shared_memory_files >= 1

    answer = fabric.asked("image", "inspect", "userland")
    image = answer[0] if isinstance(answer, list) else answer
    layers = tuple(LayerSize(layer["digest"], layer["size_bytes"]) for layer in image["layers"])
    planned = [
        (Workload(f"w{number}", 256, 512, 1000, Image("userland", layers), use_mib=float(extra)), 1)
        for number, extra in enumerate(EXTRA_MIB)
    ]
    forecast = forecast_mib(measured, planned)

    for number, extra in enumerate(EXTRA_MIB):
        program = ("python3", "-c", HOLD.format(extra))
        fabric.start(f"w{number}", "--memory", "256M:512M", command=program)
        until(lambda name=f"w{number}": "held" in fabric.ok("logs", name), 120.0)  # type: ignore[misc]
    held = fabric.asked("share")["hosts"][0]["distinct_bytes"] / MIB
    assert forecast == pytest.approx(held, rel=0.10), (json.loads(written.read_text()), fabric.asked("share"))
