"""native._dax on the page cache: cachestat and mincore agree, prefetch and populate bring pages in."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from native import _dax
from tests.native.processes import PAGE, wait_for
from tests.native.watch import growth_of


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[int]:
    """A file on disk of 64 pages and a bit, of which the page cache holds nothing."""
    with (tmp_path / "cold").open("w+b") as file:
        file.write(os.urandom(64 * PAGE + 100))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _dax.mincore(file.fileno()) > 0:
            pytest.skip("the test's folder is on a file system that keeps all in memory")
        yield file.fileno()


def cachestat_or_skip(fd: int, offset: int = 0, length: int = 0) -> _dax.CacheStat:
    try:
        return _dax.cachestat(fd, offset, length)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            pytest.skip("this kernel has no cachestat(2)")
        raise


def test_cachestat_and_mincore_agree(cold: int) -> None:
    assert _dax.populate(cold, 8 * PAGE, 16 * PAGE) == 16 * PAGE
    cached = _dax.mincore(cold)
    assert cached >= 16 and _dax.mincore(cold, 8 * PAGE, 16 * PAGE) == 16
    assert cachestat_or_skip(cold).cached == cached
    assert _dax.cachestat(cold, 10 * PAGE + 7, PAGE).cached == 2 == _dax.mincore(cold, 10 * PAGE + 7, PAGE)


def test_dirty_and_evicted_pages_are_seen(cold: int) -> None:
    os.pwrite(cold, b"x" * 3 * PAGE, 0)
    assert cachestat_or_skip(cold, 0, 3 * PAGE).dirty == 3
    os.fsync(cold)
    after = _dax.cachestat(cold, 0, 3 * PAGE)
    assert (after.cached, after.dirty, after.writeback) == (3, 0, 0)
    assert after == (3, 0, 0, after.evicted, after.recently_evicted)


def test_populate_waits_and_ends_at_the_end(cold: int) -> None:
    assert _dax.populate(cold) == 64 * PAGE + 100
    assert _dax.mincore(cold) == 65
    assert _dax.populate(cold, 64 * PAGE, 1 << 40) == 100
    assert _dax.populate(cold, 1 << 40) == 0
    assert _dax.mincore(cold, 1 << 40, (1 << 64) - 1) == 0


def test_prefetch_brings_all_in(cold: int) -> None:
    _dax.prefetch(cold, 0, 40 * PAGE)
    wait_for(lambda: _dax.mincore(cold, 0, 40 * PAGE) == 40)
    _dax.prefetch(cold)
    wait_for(lambda: _dax.mincore(cold) == 65)


def test_bad_arguments_about_the_page_cache() -> None:
    asks = (_dax.cachestat, _dax.mincore, _dax.prefetch, _dax.populate)
    with Path(__file__).open("rb") as file:
        closed = file.fileno()
        for ask in asks:
            with pytest.raises(OverflowError):
                ask(file, -1)
            with pytest.raises(ValueError, match="negative"):
                ask(-1)
    for ask in asks:
        with pytest.raises(OSError) as caught:
            ask(closed)
        assert caught.value.errno == errno.EBADF


def test_nothing_leaks(cold: int) -> None:
    def once() -> None:
        for ask in (_dax.mincore, _dax.prefetch, _dax.populate):
            ask(cold, 0, PAGE)
        with pytest.raises(OSError):
            _dax.mincore(1 << 30)

    file_id = (os.fstat(cold).st_dev, os.fstat(cold).st_ino)
    assert growth_of(once) < 4096
    assert [each for each in _dax.smaps(os.getpid()) if each.file_id == file_id] == []
