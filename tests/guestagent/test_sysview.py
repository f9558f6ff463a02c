"""The numbers and texts of `sysview: tool`, by its pure half under ASan and UBSan; then a fixed generator's bytes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.guestagent.realagent import SOURCE, built

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("gcc", "make", "pkg-config")),
    reason="needs gcc, make and pkg-config (deploy/install-packages.sh)",
)

MEMINFO = """\
MemTotal:         493216 kB
MemFree:          100000 kB
HugePages_Total:      32
HugePages_Free:       32
HugePages_Rsvd:        0
HugePages_Surp:        0
Hugepagesize:       2048 kB
Hugetlb:           65536 kB
DirectMap4k:       40960 kB
"""
CPUINFO = "".join(f"processor\t: {cpu}\nmodel name\t: M\ncore id\t\t: {cpu}\n\n" for cpu in (0, 1, 2, 10))
STAT = "cpu  9 0 9\ncpu0 1 0 1\ncpu1 2 0 2\ncpu2 3 0 3\ncpu10 3 0 3\nintr 7 0 0\nctxt 5\n"


def seen(what: str, kernel: str = "", *, granted: int = 0, online: str = "0-2,10", mask: str = "") -> str:
    """What a sandbox sees of a kernel that counts 493216 KiB, reserved 31072 of boot RAM and gave 65536 away."""
    argv = [
        str(built("sysview-core")),
        what,
        "493216",
        "31072",
        "65536",
        str(granted),
        online,
        *([mask] if mask else []),
    ]
    done = subprocess.run(argv, input=kernel, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_memory_is_what_was_granted_and_the_balloon_does_not_show() -> None:
    assert seen("meminfo", MEMINFO).splitlines() == [
        "MemTotal:         458752 kB",
        "MemFree:          100000 kB",
        "HugePages_Total:       0",
        "HugePages_Free:        0",
        "HugePages_Rsvd:        0",
        "HugePages_Surp:        0",
        "Hugepagesize:       2048 kB",
        "Hugetlb:               0 kB",
        "DirectMap4k:       40960 kB",
    ]


def test_the_lowest_cpus_count_as_many_as_were_granted() -> None:
    assert seen("online") == "0-2,10\n"
    assert seen("online", granted=2) == "0-1\n"
    assert seen("online", granted=9, online="1,3,255") == "1,3,255\n"
    assert seen("online", online="4000") == "0\n"  # whoever asks runs on one


def test_texts_have_the_cpus_of_the_view_and_all_else() -> None:
    two = seen("cpuinfo", CPUINFO, granted=2)
    assert two == CPUINFO[: CPUINFO.index("processor\t: 2")]
    assert seen("cpuinfo", CPUINFO) == CPUINFO
    assert seen("stat", STAT, granted=1).splitlines() == ["cpu  9 0 9", "cpu0 1 0 1", "intr 7 0 0", "ctxt 5"]
    assert seen("stat", STAT) == STAT


def test_an_affinity_keeps_to_the_view_and_is_never_empty() -> None:
    assert seen("affinity", granted=2, mask="ffffffff,ffffffff") == "0-1\n"
    assert seen("affinity", granted=3, mask="00000000,00000004") == "2\n"
    assert seen("affinity", granted=2, mask="00000400") == "0-1\n"  # pinned to one that went
    assert seen("affinity", mask="400") == "10\n"


@pytest.mark.parametrize("seed", [1, 2])
def test_no_text_reads_or_writes_out_of_bounds(seed: int) -> None:
    argv = [str(built("sysview-core")), "fuzz", str(seed), "50000"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "ok\n"), done.stderr[-4000:]


def test_the_core_does_no_io() -> None:
    for suffix in (".c", ".h"):
        text = (SOURCE / f"sysview{suffix}").read_text()
        assert not any(name in text for name in ("<unistd.h>", "<fcntl.h>", "<stdio.h>", "<stdlib.h>", '"agent.h"'))
