"""The bindings too, not only their cores, under ASan and UBSan: the Python tests once more, with such a build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.native.test_c import FLAGS, ROOT, run

LEFT_OUT = "not leaks and not others_run and not milliseconds"
"""What asks of malloc (ASan has its own) and of time."""
DEADLINE_S = 250


def build(into: Path) -> None:
    """A folder with `native`, sanitized, and the tests of it."""
    for name in ("balloon", "dax"):
        sources = [*(ROOT / "native").glob(f"{name}*.c"), *(ROOT / "native" / "src").glob(f"{name}*.c")]
        includes = ("-I", ROOT / "native" / "src", "-I", sysconfig.get_path("include"))
        shared = ("-fPIC", "-shared", "-DPy_LIMITED_API=0x030B0000")
        (into / "native").mkdir(exist_ok=True)
        run("gcc", *FLAGS.split(), *shared, *includes, *sources, "-o", into / "native" / f"_{name}.abi3.so")
    (into / "native" / "__init__.py").touch()
    (into / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "__init__.py", into / "tests")
    shutil.copy(ROOT / "pyproject.toml", into)
    shutil.copytree(ROOT / "tests" / "native", into / "tests" / "native")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine")
def test_bindings_under_sanitizers(tmp_path: Path) -> None:
    build(tmp_path)
    libraries = " ".join(run("gcc", f"-print-file-name={name}.so").strip() for name in ("libasan", "libubsan"))
    environment = os.environ | {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    names = ("balloon", "page_split", "smaps", "page_cache")
    tests = [f"tests/native/test_{name}.py" for name in names]
    check = "import native._dax as m, sys; sys.exit(0 if m.__file__.startswith(sys.argv[1]) else 3)"
    for argv in (
        ["-c", check, str(tmp_path)],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *tests],
    ):
        done = subprocess.run(
            [sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
