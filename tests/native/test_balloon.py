"""native._balloon: hostile lists against a model, real holes in real memory files, exact failures, threads, leaks."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import _balloon
from native._balloon import MemoryMap, PartialError, Plan
from tests.native.watch import growth_of, runs_beside

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30
F_ADD_SEALS, F_SEAL_WRITE = 1033, 8


def wire(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


@contextmanager
def memory_file(size_bytes: int, filled: bool = True) -> Iterator[int]:
    """A memfd of 4 KiB pages, every byte 0xAA."""
    fd = os.memfd_create("balloon-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        for offset in range(0, size_bytes if filled else 0, MIB):
            os.pwrite(fd, b"\xaa" * min(MIB, size_bytes - offset), offset)
        yield fd
    finally:
        os.close(fd)


def held_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


# The map


def test_a_pc_with_its_hole() -> None:
    """4 GiB of RAM as q35 lays it out: 2 GiB below the hole, 2 above 4 GiB, in one file; an elastic region after."""
    memory = MemoryMap([(4 * GIB, 2 * GIB, 0, 2 * GIB), (0, 2 * GIB, 0, 0), (6 * GIB, GIB, 1, 0)])
    assert memory.regions == ((0, 2 * GIB, 0, 0), (4 * GIB, 2 * GIB, 0, 2 * GIB), (6 * GIB, GIB, 1, 0))
    assert memory.total_bytes == 5 * GIB
    assert memory.locate(4 * GIB + 5) == (0, 2 * GIB + 5)
    assert memory.locate(7 * GIB - 1) == (1, GIB - 1)
    assert memory.locate(2 * GIB) is None and memory.locate(7 * GIB) is None and memory.locate((1 << 64) - 1) is None
    plan = memory.coalesce(wire(0, 1024, 2048, 1536))
    assert plan.extents == [(0, 0, 4 * GIB), (1, 0, GIB)]


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        ([(0, 0, 0, 0)], "region 0 has length 0"),
        ([(0, MIB, 0, 0), (MIB, 100, 0, MIB)], "region 1 has a gpa, length or offset that is no multiple"),
        ([(0, 2 * MIB, 0, 0), (MIB, MIB, 1, 0)], "region 1 shares guest-physical memory"),
        ([(0, MIB, 0, 0), (MIB, MIB, 0, MIB // 2)], "region 1 shares a part of its file"),
        ([((1 << 64) - PAGE, PAGE, 0, 0)], "region 0 ends over"),
        ([(0, MIB, 0, (1 << 63) - PAGE)], "region 0 ends over"),
        ([(0, MIB, 65536, 0)], "file index 65536"),
    ],
)
def test_what_is_no_map(regions: list[tuple[int, int, int, int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MemoryMap(regions)


@pytest.mark.parametrize("regions", [5, [7], [(1, 2, 3)], [(0, MIB, 0, "x")]])
def test_what_is_no_list_of_regions(regions: Any) -> None:
    with pytest.raises(TypeError):
        MemoryMap(regions)


@pytest.mark.parametrize("regions", [[(-PAGE, MIB, 0, 0)], [(0, 1 << 64, 0, 0)]])
def test_numbers_that_do_not_fit(regions: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(OverflowError):
        MemoryMap(regions)


# Coalescing


@st.composite
def maps_and_runs(draw: st.DrawFn) -> tuple[list[tuple[int, int, int, int]], int, list[tuple[int, int]]]:
    """Regions over the first 64 pages above 4 GiB, a unit, and runs in units: most near, some absurd."""
    base, regions, page = GIB * 4 // PAGE, [], 0
    offsets = {0: 0, 1: 0}
    while page < 64:
        length = draw(st.integers(1, 20))
        if draw(st.booleans()):
            file = draw(st.sampled_from([0, 1]))
            regions.append(((base + page) * PAGE, length * PAGE, file, offsets[file] * PAGE))
            offsets[file] += length
        page += length
    unit_pages = draw(st.sampled_from([1, 2, 4]))
    near = st.integers(base // unit_pages - 2, base // unit_pages + 90)
    number = st.integers(0, (1 << 64) - 1)
    runs = draw(st.lists(st.tuples(near | number, st.integers(0, 9) | number), max_size=30))
    return draw(st.permutations(regions)), unit_pages, runs


@settings(max_examples=400, deadline=None, derandomize=True)
@given(maps_and_runs())
def test_any_list_against_a_model(
    drawn: tuple[list[tuple[int, int, int, int]], int, list[tuple[int, int]]],
) -> None:
    regions, unit_pages, runs = drawn
    owned = {
        gpa // PAGE + i: (file, at // PAGE + i) for gpa, length, file, at in regions for i in range(length // PAGE)
    }
    wanted: list[int] = []
    refused = [0, 0, 0]
    for first, count in runs:
        start, end = first * unit_pages, (first + count) * unit_pages
        if count == 0:
            refused[0] += 1
        elif end * PAGE >= 1 << 64:
            refused[1] += 1
        elif end - start > len(owned) or not all(page in owned for page in range(start, end)):
            refused[2] += 1
        else:
            wanted += range(start, end)
    plan = MemoryMap(regions).coalesce(wire(*(number for run in runs for number in run)), unit_pages * PAGE)
    covered = [(file, page) for file, at, length in plan.extents for page in range(at // PAGE, (at + length) // PAGE)]
    assert covered == [owned[page] for page in sorted(set(wanted))]
    assert plan.refused == tuple(refused)
    assert plan.total_bytes == len(covered) * PAGE
    assert plan.duplicate_bytes == (len(wanted) - len(set(wanted))) * PAGE
    assert all((a, b + n) != (c, d) for (a, b, n), (c, d, _) in pairwise(plan.extents))


def test_frames_become_runs() -> None:
    memory = MemoryMap([(GIB, GIB, 0, 0)])
    base = GIB // PAGE
    plan = memory.coalesce_frames(wire(base + 5, base + 3, base + 4, base + 4, base + 9, 0))
    assert plan.extents == [(0, 3 * PAGE, 3 * PAGE), (0, 9 * PAGE, PAGE)]
    assert (len(plan), plan.duplicate_bytes, plan.refused.outside, plan.first_refused) == (2, PAGE, 1, 5)
    heads = memory.coalesce_frames(bytearray(wire(512, 513)), unit_bytes=2 * MIB)
    assert heads.extents == [(0, 0, 4 * MIB)] and heads.first_refused is None


def test_an_empty_list_is_an_empty_plan() -> None:
    for memory in (MemoryMap([]), MemoryMap([(0, MIB, 0, 0)])):
        plan = memory.coalesce(b"")
        assert (plan.extents, plan.total_bytes, plan.refused) == ([], 0, (0, 0, 0))
        assert _balloon.punch(plan, []) == (0, 0)
    assert MemoryMap([]).coalesce(wire(0, 1)).refused.outside == 1


def test_lists_that_are_none() -> None:
    memory = MemoryMap([(0, MIB, 0, 0)])
    with pytest.raises(ValueError, match="24 bytes are no whole number of runs of 16 bytes"):
        memory.coalesce(wire(1, 2, 3))
    with pytest.raises(ValueError, match="runs of 8 bytes"):
        memory.coalesce_frames(b"1234567")
    for unit_bytes in (0, 2048, 3 * PAGE, 2 * GIB):
        with pytest.raises(ValueError, match="power of two"):
            memory.coalesce(b"", unit_bytes=unit_bytes)
    with pytest.raises(OverflowError):
        memory.coalesce(b"", unit_bytes=(1 << 64) + PAGE)
    with pytest.raises(TypeError):
        memory.coalesce("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Plan()


# Punching


def test_what_is_punched_is_gone_and_nothing_else() -> None:
    with memory_file(8 * MIB) as fd, memory_file(4 * MIB) as other:
        memory = MemoryMap([(0, 4 * MIB, 0, 4 * MIB), (4 * MIB, 2 * MIB, 1, MIB)])
        plan = memory.coalesce(wire(1, 1, 1023, 2, 8, 4), unit_bytes=PAGE)
        done = _balloon.punch(plan, [fd, other])
        assert done.bytes == plan.total_bytes == 7 * PAGE and done.calls == 4
        assert held_bytes(fd) == 8 * MIB - 6 * PAGE and held_bytes(other) == 4 * MIB - PAGE
        holes = {(0, 4 * MIB + page * PAGE) for page in (1, 8, 9, 10, 11, 1023)} | {(1, MIB)}
        for index, file in enumerate((fd, other)):
            for offset in range(0, os.fstat(file).st_size, PAGE):
                byte = b"\0" if (index, offset) in holes else b"\xaa"
                assert os.pread(file, PAGE, offset) == byte * PAGE, (index, offset)
        assert os.fstat(fd).st_size == 8 * MIB
        assert _balloon.punch(plan, [fd, other]).bytes == 7 * PAGE  # repeating does no harm


def test_populate_allocates_and_keeps_what_is_there() -> None:
    with memory_file(4 * MIB, filled=False) as fd:
        os.pwrite(fd, b"kept", MIB)
        plan = MemoryMap([(0, 4 * MIB, 0, 0)]).coalesce(wire(0, 1))
        assert _balloon.populate(plan, [fd], piece_bytes=MIB) == (2 * MIB, 2)
        assert held_bytes(fd) == 2 * MIB and os.pread(fd, 4, MIB) == b"kept"
        assert os.fstat(fd).st_size == 4 * MIB
        assert _balloon.punch(plan, [fd]).calls == 1 and held_bytes(fd) == 0


def test_a_failure_says_how_far_it_came() -> None:
    with memory_file(4 * MIB) as fd, memory_file(4 * MIB) as sealed:
        fcntl.fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE)
        memory = MemoryMap([(0, 4 * MIB, 0, 0), (4 * MIB, 4 * MIB, 1, 0), (8 * MIB, 4 * MIB, 2, 0)])
        plan = memory.coalesce(wire(0, 1, 3, 3))
        assert plan.extents == [(0, 0, 2 * MIB), (1, 2 * MIB, 2 * MIB), (2, 0, 4 * MIB)]
        with pytest.raises(PartialError, match="punching of 1048576 bytes at 2097152 of file 1 failed") as caught:
            _balloon.punch(plan, [fd, sealed, fd], piece_bytes=MIB)
        error = caught.value
        assert isinstance(error, OSError) and error.errno == errno.EPERM
        assert (error.done_bytes, error.calls) == (2 * MIB, 2)
        assert (error.file, error.offset, error.length) == (1, 2 * MIB, MIB)
        assert held_bytes(fd) == 2 * MIB and held_bytes(sealed) == 4 * MIB


@pytest.mark.parametrize(
    ("path", "flags", "code"), [("/dev/null", os.O_RDWR, errno.ENODEV), (__file__, 0, errno.EBADF)]
)
def test_what_cannot_have_holes(path: str, flags: int, code: int) -> None:
    plan = MemoryMap([(0, MIB, 0, 0)]).coalesce(wire(0, 1), unit_bytes=PAGE)
    fd = os.open(path, flags)
    try:
        with pytest.raises(PartialError) as caught:
            _balloon.punch(plan, [fd])
        assert caught.value.errno == code and caught.value.done_bytes == 0
    finally:
        os.close(fd)


def test_bad_arguments_of_punch() -> None:
    plan = MemoryMap([(0, MIB, 1, 0)]).coalesce(wire(0, 1), unit_bytes=PAGE)
    with pytest.raises(ValueError, match="names 2 files, 1 descriptors"):
        _balloon.punch(plan, [0])
    with pytest.raises(ValueError, match="piece_bytes is 1000"):
        _balloon.punch(plan, [0, 0], piece_bytes=1000)
    with pytest.raises(TypeError):
        _balloon.punch([(0, 0, PAGE)], [0, 0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        _balloon.punch(plan, [0, -1])


# Threads and leaks


def test_threads_share_a_plan() -> None:
    with memory_file(64 * MIB) as fd:
        memory = MemoryMap([(0, 64 * MIB, 0, 0)])
        runs = wire(*(number for i in range(0, 16384, 2) for number in (i, 1)))
        with ThreadPoolExecutor(8) as pool:
            plans = list(pool.map(lambda _: memory.coalesce(runs, PAGE), range(8)))
            done = list(pool.map(lambda plan: _balloon.punch(plan, [fd]), plans))
        assert {d.bytes for d in done} == {32 * MIB} and held_bytes(fd) == 32 * MIB


def test_others_run_while_it_punches() -> None:
    with memory_file(256 * MIB, filled=False) as fd:
        plan = MemoryMap([(0, 256 * MIB, 0, 0)]).coalesce(wire(0, 128))
        _balloon.populate(plan, [fd])
        assert runs_beside(lambda: _balloon.punch(plan, [fd], piece_bytes=PAGE))  # one call, 65,536 system calls


def test_others_run_while_it_coalesces() -> None:
    memory = MemoryMap([(0, 1 << 40, 0, 0)])
    backwards = wire(*range(2_000_000, 0, -1))
    assert runs_beside(lambda: memory.coalesce_frames(backwards))


def _fails(action: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        action()


def test_nothing_leaks() -> None:
    runs = wire(*(number for i in range(0, 200, 2) for number in (i, 1)))
    fd = os.memfd_create("leak")
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE)

    def once() -> None:
        memory = MemoryMap([(0, MIB, 0, 0), (MIB, MIB, 1, 0)])
        plan = memory.coalesce(runs, PAGE)
        assert len(plan.extents) == 100 and memory.regions and plan.refused and plan.first_refused is None
        _balloon.punch(plan, [fd])
        _balloon.populate(plan, [fd])
        _fails(lambda: _balloon.punch(plan, [sealed]), PartialError)
        _fails(lambda: _balloon.punch(plan, []), ValueError)
        _fails(lambda: memory.coalesce(b"1"), ValueError)
        _fails(lambda: MemoryMap([(0, 1, 0, 0)]), ValueError)
        _fails(lambda: MemoryMap([(0, PAGE, 0, 0), None]), TypeError)  # type: ignore[list-item]

    try:
        assert growth_of(once) < 4096
    finally:
        os.close(fd)
        os.close(sealed)
