"""native._dax.page_split: physical pages of real processes against the kernel's own sums."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from native import _dax
from tests.native.processes import PAGE, address_of, forked, mapping_at, needs_frames, private_memory, sleeping, touch
from tests.native.watch import growth_of, runs_beside

MIB = 1 << 20
HUGE = 2 * MIB
BLOB_PAGES = 256


@pytest.fixture
def blob() -> Iterator[int]:
    """A memory file of BLOB_PAGES pages, all there."""
    fd = os.memfd_create("blob", os.MFD_CLOEXEC)
    os.write(fd, os.urandom(BLOB_PAGES * PAGE))
    yield fd
    os.close(fd)


def frames_of(pid: int, address: int, pages: int) -> set[int]:
    """The frames of a range, read by Python."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        entries = struct.unpack(f"<{pages}Q", os.pread(pagemap.fileno(), pages * 8, address // PAGE * 8))
    return {entry & ((1 << 55) - 1) for entry in entries if entry >> 63}


@needs_frames
def test_children_that_share_a_file_and_hold_memory_of_their_own(blob: int) -> None:
    """Three children map one file, touch different parts of it, and have private memory: frames and Pss agree."""
    parts, own_pages = [range(200), range(100, 256), range(150, 160)], 64
    with (
        mmap.mmap(blob, BLOB_PAGES * PAGE) as shared,
        private_memory(own_pages) as own,
        ExitStack() as children,
    ):

        def work(part: range) -> None:
            touch(shared, part)
            touch(own, range(own_pages), write=True)

        pids = [children.enter_context(forked(partial(work, part))) for part in parts]
        areas = [(address_of(shared), BLOB_PAGES), (address_of(own), own_pages)]
        distinct, rows = _dax.page_split([(pid, pid, at, at + n * PAGE) for pid in pids for at, n in areas])
        frames = [set().union(*(frames_of(pid, at, n) for at, n in areas)) for pid in pids]
        pss_kib = [sum(mapping_at(pid, at).pss_kib for at, _ in areas) for pid in pids]
    assert distinct == len(set().union(*frames)) == BLOB_PAGES + 3 * own_pages
    held_by = Counter(frame for held in frames for frame in held)
    for pid, held, kib, row in zip(pids, frames, pss_kib, rows, strict=True):
        holders = Counter(held_by[frame] for frame in held)
        assert row == (pid, len(held), dict(holders))
        assert holders[1] >= own_pages and holders[3] >= 10
        assert abs(sum(pages / n for n, pages in holders.items()) * 4 - kib) <= 2  # the kernel rounds down


@needs_frames
def test_a_page_mapped_twice_by_one_owner_counts_once(blob: int) -> None:
    size = BLOB_PAGES * PAGE
    with mmap.mmap(blob, size) as first, mmap.mmap(blob, size) as second:
        touch(first, range(BLOB_PAGES))
        touch(second, range(BLOB_PAGES))
        me, at, also = os.getpid(), address_of(first), address_of(second)
        ranges = [("a", me, at, at + size), ("a", me, also, also + size), ("a", me, at + PAGE, at + 9 * PAGE)]
        assert _dax.page_split(ranges) == (BLOB_PAGES, [("a", BLOB_PAGES, {1: BLOB_PAGES})])
        ranges.append(("b", me, also, also + 10 * PAGE))
        assert _dax.page_split(ranges) == (
            BLOB_PAGES,
            [("a", BLOB_PAGES, {1: BLOB_PAGES - 10, 2: 10}), ("b", 10, {2: 10})],
        )


@needs_frames
def test_memory_after_a_fork_is_shared_until_it_is_written() -> None:
    pages = 64
    with private_memory(pages) as own:
        touch(own, range(pages), write=True)
        at = address_of(own)
        with forked(lambda: touch(own, range(24), write=True)) as child:
            ranges = [(pid, pid, at, at + pages * PAGE) for pid in (os.getpid(), child)]
            distinct, rows = _dax.page_split(ranges)
    assert distinct == pages + 24
    assert [holders for _, _, holders in rows] == [{1: 24, 2: 40}, {1: 24, 2: 40}]


@needs_frames
def test_the_zero_page_is_no_ones() -> None:
    pages = 64
    with private_memory(pages) as own:
        touch(own, range(pages))
        touch(own, range(5), write=True)
        at = address_of(own)
        assert present_pages(at, pages) == pages
        assert _dax.page_split([(0, os.getpid(), at, at + pages * PAGE)]) == (5, [(0, 5, {1: 5})])
        assert mapping_at(os.getpid(), at).rss_kib == 5 * 4


def present_pages(address: int, pages: int) -> int:
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        entries = struct.unpack(f"<{pages}Q", os.pread(pagemap.fileno(), pages * 8, address // PAGE * 8))
    return sum(entry >> 63 for entry in entries)


@contextmanager
def huge_area() -> Iterator[tuple[mmap.mmap, int, int]]:
    """(mapping, address, index): 2 MiB of anonymous memory that the kernel may make one huge page."""
    with private_memory(1024) as mapped:
        mapped.madvise(mmap.MADV_HUGEPAGE)
        index = -address_of(mapped) % HUGE
        yield mapped, address_of(mapped) + index, index


@needs_frames
def test_huge_pages_count_by_their_parts() -> None:
    with huge_area() as (mapped, at, index):
        mapped[index] = 1
        if mapping_at(os.getpid(), at).anon_huge_kib < HUGE // 1024:
            pytest.skip("this kernel gave no transparent huge page")
        assert _dax.page_split([(0, os.getpid(), at, at + HUGE)]) == (512, [(0, 512, {1: 512})])
        assert _dax.page_split([(0, os.getpid(), at + 7 * PAGE, at + 9 * PAGE)])[0] == 2


@needs_frames
def test_the_huge_zero_page_is_no_ones() -> None:
    with huge_area() as (mapped, at, index):
        mapped[index]
        if present_pages(at, 512) < 512:
            pytest.skip("this kernel has no huge zero page (use_zero_page)")
        assert _dax.page_split([(0, os.getpid(), at, at + HUGE)]) == (0, [(0, 0, {})])


@needs_frames
def test_the_whole_of_a_process_is_its_rss() -> None:
    """Of a process that does nothing: every page of Rss is seen, less what it maps twice."""
    with sleeping() as pid:
        mappings = _dax.smaps(pid)
        _, rows = _dax.page_split([("it", pid, m.start, m.end) for m in mappings])
    rss_pages = sum(m.rss_kib for m in mappings) // 4
    assert 0 <= rss_pages - rows[0][1] <= rss_pages // 20


@needs_frames
def test_processes_that_are_gone_hold_nothing(blob: int) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with mmap.mmap(blob, BLOB_PAGES * PAGE) as mapped:
        touch(mapped, range(3))
        at = address_of(mapped)
        resident = mapping_at(os.getpid(), at).rss_kib // 4
        rows = _dax.page_split([("gone", gone.pid, 0, 1 << 46), ("me", os.getpid(), at, at + BLOB_PAGES * PAGE)])
    assert rows == (resident, [("gone", 0, {}), ("me", resident, {1: resident})])


@needs_frames
def test_nothing_asked_nothing_found() -> None:
    assert _dax.page_split([]) == (0, [])
    assert _dax.page_split([("a", os.getpid(), PAGE, PAGE)]) == (0, [("a", 0, {})])
    top = (1 << 64) - PAGE
    assert _dax.page_split([("a", os.getpid(), top - 16 * PAGE, top)]) == (0, [("a", 0, {})])


def test_ranges_that_are_none() -> None:
    me = os.getpid()
    for bad in [("a", me, PAGE, 0), ("a", me, 1, PAGE), ("a", me, 0, PAGE + 1), ("a", 0, 0, PAGE), ("a", -1, 0, PAGE)]:
        with pytest.raises(ValueError, match="whole pages in order"):
            _dax.page_split([bad])
    wrong: list[Any] = [7, ("a", me, 0), ([], me, 0, PAGE), ("a", "b", 0, PAGE)]
    for item in wrong:
        with pytest.raises(TypeError):
            _dax.page_split([item])
    with pytest.raises(OverflowError):
        _dax.page_split([("a", me, 0, 1 << 64)])
    with pytest.raises(ValueError, match="more than 8192 owners"):
        _dax.page_split((owner, me, 0, 0) for owner in range(8193))


@needs_frames
def test_frames_are_for_the_privileged() -> None:
    def ask() -> None:
        os.setresuid(65534, 65534, 65534)
        try:
            _dax.page_split([("me", os.getpid(), 0, 1 << 46)])
        except PermissionError:
            return
        os._exit(1)

    with forked(ask):
        pass


@needs_frames
def test_gibibytes_take_milliseconds() -> None:
    """Four owners of one 512 MiB file, 2 GiB of address space each. CPU time: a busy machine does not count."""
    size = 512 * MIB
    fd = os.memfd_create("large", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4 * size)
        os.posix_fallocate(fd, 0, size)
        with mmap.mmap(fd, 4 * size) as mapped:
            mapped.madvise(23, 0, size)  # MADV_POPULATE_WRITE
            at = address_of(mapped)
            begun_s = time.thread_time()
            distinct, rows = _dax.page_split([(owner, os.getpid(), at, at + 4 * size) for owner in range(4)])
            taken_s = time.thread_time() - begun_s
    finally:
        os.close(fd)
    assert distinct == size // PAGE
    assert [holders for _, _, holders in rows] == [{4: distinct}] * 4
    assert taken_s < 0.8


@needs_frames
def test_others_run_while_it_walks() -> None:
    size = 128 * MIB
    with mmap.mmap(-1, size) as mapped:
        mapped.madvise(23)  # MADV_POPULATE_WRITE
        at = address_of(mapped)
        assert runs_beside(lambda: _dax.page_split([(n, os.getpid(), at, at + size) for n in range(16)]))


def test_nothing_leaks() -> None:
    me = os.getpid()
    first = next(m for m in _dax.smaps(me) if m.rss_kib)

    def once() -> None:
        if os.geteuid() == 0:
            _dax.page_split([(object(), me, first.start, first.end), ("b", me, first.start, first.end)])
        with pytest.raises(ValueError, match="whole pages"):
            _dax.page_split([("a", me, 0, 0), ("a", me, 0, 1)])

    assert growth_of(once) < 4096
