"""What is run again, and what stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.suite import FEW, worth_another_try


@pytest.mark.parametrize(
    ("exit_code", "failed", "again"),
    [
        (0, [], False),
        (1, ["a::b"], True),
        (1, ["a::b"] * FEW, True),
        (1, ["a::b"] * (FEW + 1), False),
        (1, [], False),  # nobody knows which
        (2, ["a::b"], False),  # interrupted
        (3, ["a::b"], False),  # pytest's own fault
    ],
)
def test_a_few_failures_are_tried_again_and_nothing_else(exit_code: int, failed: list[str], again: bool) -> None:
    assert worth_another_try(exit_code, failed) is again


@pytest.mark.parametrize(("body", "exit_code", "last"), [
    ("assert seen", 0, "unsteady, failed at first and passed alone:"),
    ("assert False", 1, "1 failed"),
])  # fmt: skip
def test_a_test_that_fails_is_run_once_more(tmp_path: Path, body: str, exit_code: int, last: str) -> None:
    (tmp_path / "test_one.py").write_text(
        "from pathlib import Path\n\n\ndef test_one():\n    seen = Path('seen').exists()\n"
        f"    Path('seen').touch()\n    {body}\n"
    )
    root = Path(__file__).parent.parent
    suite = subprocess.run(
        [sys.executable, "-m", "tests.suite", "-n0"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert suite.returncode == exit_code, suite.stdout + suite.stderr
    assert "1 failed: once more, alone" in suite.stdout
    assert last in suite.stdout.split("once more, alone")[1]
