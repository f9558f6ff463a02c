"""What a host has of memory, read from the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.cgroups import Hierarchy
from hostd.errors import HostdError
from hostd.memory.pressure import HostMemory, HostSense, parse_meminfo, parse_psi, within_budget

MEMINFO = "MemTotal:       24684000 kB\nMemFree:  1 kB\nMemAvailable:   20480000 kB\n"
PSI = "some avg10=1.50 avg60=0.00 avg300=0.00 total=281922\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n"


def test_the_kernels_words() -> None:
    assert parse_psi(PSI) == (1.5, 0.25)
    assert parse_psi("") == (0.0, 0.0)
    assert parse_meminfo(MEMINFO) == (24105, 20000)
    with pytest.raises(HostdError, match="no MemTotal and MemAvailable"):
        parse_meminfo("MemTotal: 1 kB\n")


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(0, 20_000), st.integers(0, 20_000))
def test_a_budget_never_gives_more_than_there_is(budget: int, available: int, charged: int, cache: int) -> None:
    host = within_budget(HostMemory(10_000, available), budget, charged, cache)
    assert host.total_mib == budget
    assert 0 <= host.available_mib <= min(budget, available)


def test_this_host_is_read() -> None:
    host = HostSense()()
    assert 0 < host.available_mib <= host.total_mib


@pytest.mark.parametrize("version", [1, 2])
def test_a_budget_counts_what_is_charged_but_for_page_cache(tmp_path: Path, version: int) -> None:
    proc, group = tmp_path / "proc", tmp_path / "group"
    (proc / "pressure").mkdir(parents=True)
    group.mkdir()
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "pressure/memory").write_text("")
    prefix = "total_" if version == 1 else ""
    (group / ("memory.usage_in_bytes" if version == 1 else "memory.current")).write_text(str(900 << 20))
    (group / "memory.stat").write_text(f"{prefix}inactive_file {200 << 20}\n{prefix}active_file {100 << 20}\nanon 5\n")
    if version == 2:
        (group / "memory.pressure").write_text(PSI)
    cgroups = Hierarchy(version, {"memory" if version == 1 else "": group})
    psi = (1.5, 0.25) if version == 2 else (0.0, 0.0)
    assert HostSense(cgroups, 2048, proc)() == HostMemory(2048, 2048 - 600, *psi)
    cgroups.limit_total(1 << 30)
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    assert (group / name).read_text() == str(1 << 30)
    cgroups.limit_total(0)
    assert (group / name).read_text() == ("-1" if version == 1 else "max")
