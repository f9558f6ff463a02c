"""The C cores by themselves, without Python, compiled with ASan and UBSan."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=c11 -g -O1 -Wall -Wextra -Werror -D_GNU_SOURCE -fsanitize=address,undefined -fno-sanitize-recover=all"
DEADLINE_S = 120

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine")


def run(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["test_balloon", "test_dax", "fuzz_balloon"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One program of tests/native/c, with the cores it tests."""
    name: str = request.param
    built = tmp_path_factory.mktemp("c") / name
    cores = sorted((ROOT / "native" / "src").glob(f"{name.partition('_')[2]}*.c"))
    assert cores
    include = ("-I", ROOT / "native" / "src")
    run("gcc", *FLAGS.split(), *include, ROOT / "tests" / "native" / "c" / f"{name}.c", *cores, "-o", built)
    return built


def test_core(program: Path) -> None:
    rounds_and_seed = ("60000", "20251124") if program.name.startswith("fuzz") else ()
    assert run(program, *rounds_and_seed) == "ok\n"
