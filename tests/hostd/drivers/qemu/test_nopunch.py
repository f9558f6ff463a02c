"""sandloom-nopunch: under it punching a hole succeeds and does nothing, and nothing else changes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hostd.drivers.qemu.vmm import NO_PUNCH

CALLS = """
import ctypes, os
fallocate = ctypes.CDLL(None, use_errno=True).fallocate
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
fd = os.memfd_create('x')
os.write(fd, b'a' * 8192)
PUNCH_KEEP = 3
print(fallocate(fd, PUNCH_KEEP, 0, 4096), os.pread(fd, 1, 0), fallocate(fd, 0, 0, 16384), os.fstat(fd).st_size)
print(fallocate(999, 0, 0, 1), open('/proc/self/status').read().count('NoNewPrivs:\\t1'))
"""


@pytest.fixture(autouse=True)
def built() -> None:
    if not NO_PUNCH.is_file():
        pytest.skip(f"{NO_PUNCH.name} is not built: run `make setup`")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_a_punch_is_told_done_and_is_not() -> None:
    assert run(sys.executable, "-c", CALLS).stdout.split("\n")[0] == "0 b'\\x00' 0 16384"
    assert run(str(NO_PUNCH), sys.executable, "-c", CALLS).stdout.split("\n")[:2] == ["0 b'a' 0 16384", "-1 1"]


def test_it_stays_over_exec_and_children() -> None:
    nested = run(str(NO_PUNCH), "/bin/sh", "-c", '"$0" -c "$1" & wait', sys.executable, CALLS)
    assert nested.stdout.startswith("0 b'a'")


def test_what_cannot_be_run_is_told() -> None:
    assert run(str(NO_PUNCH)).returncode == 2
    missing = run(str(NO_PUNCH), "/no/such/program")
    assert missing.returncode == 127 and "/no/such/program: No such file" in missing.stderr
