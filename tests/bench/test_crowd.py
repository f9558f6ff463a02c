"""The parts of the crowd's measures that need no guest: what is read, what is compared, when the machine is at rest."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.bench import crowd
from tests.bench.crowd import Machine, Moment, Way
from tests.bench.report import Report, Runs

MEMINFO = """MemTotal:       24683656 kB
MemAvailable:   23960288 kB
AnonPages:          7428 kB
Shmem:              9076 kB
SUnreclaim:        79800 kB
KernelStack:        1512 kB
PageTables:         2924 kB
Percpu:             3160 kB
HugePages_Total:       0
"""
BEFORE = Moment(
    pages=40_960, private=30_720, tables=1024, own=2048, machine=Machine(20 << 20, 30_720, 2048, 1024, 16, 512, 64)
)


def test_meminfo_is_read_by_name() -> None:
    assert crowd.parse_meminfo(MEMINFO) == Machine(
        available=23960288, anonymous=7428, shmem=9076, page_tables=2924, kernel_stacks=1512, slab=79800, percpu=3160
    )


def test_a_line_that_meminfo_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="no line Percpu"):
        crowd.parse_meminfo(MEMINFO.replace("Percpu:", "PerCpu:"))


def test_growth_is_of_pages_and_page_tables_against_the_fall_of_what_is_available() -> None:
    machine = replace(BEFORE.machine, available=(20 << 20) - 100 * 1024, anonymous=30_720 + 90 * 1024)
    grown = crowd.grown(BEFORE, replace(BEFORE, pages=40_960 + 95 * 1024, tables=1024 + 3 * 1024, machine=machine))
    assert (grown.ledger, grown.tables, grown.taken) == (98, 3, 100)
    assert grown.apart_percent == pytest.approx(2)
    assert grown.kinds == {
        "anonymous": 90, "shmem": 0, "page_tables": 0, "kernel_stacks": 0, "slab": 0, "percpu": 0
    }  # fmt: skip


def test_a_ledger_that_says_too_much_is_as_far_apart_as_one_that_says_too_little() -> None:
    machine = replace(BEFORE.machine, available=(20 << 20) - 100 * 1024)
    for mib in (95, 105):
        grown = crowd.grown(BEFORE, replace(BEFORE, pages=40_960 + mib * 1024, machine=machine))
        assert grown.apart_percent == pytest.approx(5)


def test_a_machine_that_gained_memory_meanwhile_is_no_measure() -> None:
    with pytest.raises(ValueError, match="MemAvailable grew by 10 MiB"):
        crowd.grown(BEFORE, replace(BEFORE, machine=replace(BEFORE.machine, available=(20 << 20) + 10 * 1024)))


def test_the_machine_is_read_on_both_sides_of_the_ledgers_walk() -> None:
    other = replace(BEFORE.machine, available=(20 << 20) + 200, slab=712)
    assert crowd.between(BEFORE.machine, other) == replace(BEFORE.machine, available=(20 << 20) + 100, slab=612)


def test_memory_is_at_rest_when_the_last_readings_lie_together() -> None:
    still = [1000] * crowd.REST_READINGS
    assert crowd.at_rest(still)
    assert crowd.at_rest([0, *still])
    assert not crowd.at_rest(still[1:])
    assert not crowd.at_rest([*still, 1000 + crowd.REST_WITHIN_KIB + 1])


def test_busy_is_neither_idle_nor_waiting_nor_stolen() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    counts = " ".join(str(seconds * ticks) for seconds in (1, 2, 4, 1000, 1000, 8, 16, 1000, 0, 0))
    assert crowd.busy_s(f"cpu  {counts}\ncpu0 1 2 3\n") == 31


def test_no_start_together_beats_cpus_that_never_pause() -> None:
    one = Way(wall=Runs((1.5, 1.0), "s"), busy=Runs((2.0, 1.0), "s"))
    assert crowd.ceiling(one, cpus=2) == Runs((1.5, 2.0), "x")


def test_both_ways_are_told_and_their_ratio_is_the_bar() -> None:
    report = Report("x", {})
    one = Way(Runs((1.6, 3.2), "s"), Runs((1.6, 3.2), "s"))
    crowd.tell_pairs(report, one, Way(Runs((1.0, 2.0), "s"), Runs((1.6, 3.2), "s")))
    assert [bar.measure for bar in report.bars] == [crowd.TOGETHER]
    assert report.bars[0].runs == Runs((1.6, 1.6), "x")
    assert report.ok


def test_one_clone_that_does_not_answer_misses_the_bar() -> None:
    grown = crowd.grown(BEFORE, replace(BEFORE, machine=replace(BEFORE.machine, available=(20 << 20) - 1024)))
    report = Report("x", {})
    crowd.tell_crowds(report, [(crowd.CROWD - 1, grown)])
    assert {bar.measure: bar.ok for bar in report.bars} == {crowd.ANSWERED: False, crowd.AGREED: False}
