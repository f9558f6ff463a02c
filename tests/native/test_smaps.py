"""native._dax.smaps against the kernel's own text, read the slow way."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from native import _dax
from tests.native.processes import PAGE, address_of, mapping_at, sleeping
from tests.native.watch import growth_of


def parsed_by_python(pid: int) -> list[dict[str, int | str]]:
    """The kernel's text, the slow way."""
    found: list[dict[str, int | str]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(None, 5)
        if not words[0].endswith(":"):
            start, end = words[0].split("-")
            path = words[5] if len(words) == 6 else ""
            found.append({"start": int(start, 16), "end": int(end, 16), "perms": words[1], "path": path})
            found[-1]["offset"] = int(words[2], 16)
        elif words[0] not in ("VmFlags:",):
            found[-1][words[0][:-1]] = int(words[1])
    return found


def test_smaps_is_what_the_kernel_says() -> None:
    names = {
        "rss_kib": "Rss",
        "pss_kib": "Pss",
        "shared_clean_kib": "Shared_Clean",
        "shared_dirty_kib": "Shared_Dirty",
        "private_clean_kib": "Private_Clean",
        "private_dirty_kib": "Private_Dirty",
        "anonymous_kib": "Anonymous",
        "anon_huge_kib": "AnonHugePages",
        "shmem_huge_kib": "ShmemPmdMapped",
        "file_huge_kib": "FilePmdMapped",
        "shared_hugetlb_kib": "Shared_Hugetlb",
        "private_hugetlb_kib": "Private_Hugetlb",
        "swap_kib": "Swap",
        "swap_pss_kib": "SwapPss",
    }
    with sleeping() as pid:
        ours, theirs = _dax.smaps(pid), parsed_by_python(pid)
        rollup = _dax.smaps_rollup(pid)
    assert len(ours) == len(theirs) > 5
    for mapping, expected in zip(ours, theirs, strict=True):
        assert mapping[:4] == tuple(expected[name] for name in ("start", "end", "perms", "offset"))
        assert mapping.path == expected["path"] == mapping[5]
        for field, key in names.items():
            # Pss moves as other processes come and go that map the same libraries.
            if field not in ("pss_kib", "shared_clean_kib", "private_clean_kib"):
                assert getattr(mapping, field) == expected.get(key, 0), (mapping, field)
    assert mapping[6] == mapping.rss_kib
    assert rollup.path == "[rollup]" and rollup.rss_kib == sum(mapping.rss_kib for mapping in ours)


def test_smaps_of_odd_files(tmp_path: Path) -> None:
    odd = tmp_path / "a\nnew line \udce9 and (spaces)"
    odd.write_bytes(b"x" * 2 * PAGE)
    with odd.open("r+b") as file, mmap.mmap(file.fileno(), PAGE, offset=PAGE) as mapped:
        status = os.fstat(file.fileno())
        mapped[0]
        found = mapping_at(os.getpid(), address_of(mapped))
        assert found.path == str(odd).replace("\n", "\\012")
        assert found.file_id[1] == status.st_ino and found.offset == PAGE and found.perms == "rw-s"
        odd.unlink()
        assert mapping_at(os.getpid(), address_of(mapped)).path.endswith(" (deleted)")


def test_smaps_of_no_process() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    for ask in (_dax.smaps, _dax.smaps_rollup):
        with pytest.raises((FileNotFoundError, ProcessLookupError)) as caught:
            ask(gone.pid)
        assert str(gone.pid) in str(caught.value)


def test_smaps_of_a_zombie() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert _dax.smaps(pid) == []
        with pytest.raises(ProcessLookupError):
            _dax.smaps_rollup(pid)
    finally:
        os.waitpid(pid, 0)


def test_nothing_leaks() -> None:
    def once() -> None:
        _dax.smaps(os.getpid())
        _dax.smaps_rollup(os.getpid())
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            _dax.smaps(1 << 30)

    open_before = len(list(Path("/proc/self/fd").iterdir()))
    assert growth_of(once, times=200) < 4096
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
