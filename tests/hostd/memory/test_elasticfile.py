"""The file behind elastic memory, and what becomes of it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostd.memory import elasticfile
from hostd.memory.elasticfile import HUGE_BYTES, find_elastic, held_bytes, open_elastic

SIZE = 16 << 20


def needs_huge() -> None:
    if not elasticfile.probe().huge:
        pytest.skip(f"needs huge pages for shared memory: {elasticfile.probe().why}")


@pytest.mark.parametrize("huge", [True, False])
def test_a_touched_byte_brings_a_page(huge: bool) -> None:
    if huge:
        needs_huge()
    mounts = Path("/proc/self/mountinfo").read_text()
    descriptor = open_elastic(SIZE, huge=huge)
    try:
        assert os.fstat(descriptor).st_size == SIZE and held_bytes(descriptor) == 0
        assert not os.get_inheritable(descriptor)
        with mmap.mmap(descriptor, SIZE) as view:
            view[HUGE_BYTES + 5] = 1
            assert held_bytes(descriptor) == (HUGE_BYTES if huge else 4096)
        assert Path("/proc/self/mountinfo").read_text() == mounts  # mounted nowhere: there is nothing to leave behind
    finally:
        os.close(descriptor)


def test_it_lives_as_long_as_somebody_has_it() -> None:
    """As QEMU does after hostd's end, and the next hostd finds it there."""
    needs_huge()
    descriptor = open_elastic(SIZE, huge=True)
    os.pwrite(descriptor, b"kept", HUGE_BYTES)
    keeper = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(descriptor,),
    )
    try:
        assert keeper.stdout is not None and keeper.stdout.readline() == b"\n"
        os.close(descriptor)
        assert find_elastic(keeper.pid, SIZE * 2) is None
        found = find_elastic(keeper.pid, SIZE)
        assert found is not None
        try:
            assert os.pread(found, 4, HUGE_BYTES) == b"kept" and held_bytes(found) == HUGE_BYTES
        finally:
            os.close(found)
    finally:
        keeper.communicate(timeout=60)
    with pytest.raises(OSError, match="No such file"):
        find_elastic(keeper.pid, SIZE)


def test_what_the_host_has_is_said() -> None:
    backing = elasticfile.probe()
    assert str(backing).startswith("huge pages (" if backing.huge else "4 KiB pages (") and backing.why
