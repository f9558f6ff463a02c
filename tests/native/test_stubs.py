"""The .pyi files, which are native's documentation, say what the extensions have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_stubs_match_the_extensions() -> None:
    argv = [sys.executable, "-m", "mypy.stubtest", "native._balloon", "native._dax"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
