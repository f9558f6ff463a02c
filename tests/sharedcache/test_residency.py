"""What of a stored blob the page cache holds: by both of the kernel's ways, cold, warm and gone."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from pathlib import Path

import pytest

from native import _dax
from sharedcache import residency
from sharedcache.errors import CacheError, NotFound
from sharedcache.objects import StoredObject
from sharedcache.residency import Residency, Source
from sharedcache.store import Store
from tests.sharedcache.storekit import publish

PAGE = _dax.PAGE_BYTES
SIZE = 64 * PAGE + 100


@pytest.fixture
def cold(store: Store) -> StoredObject:
    """A published blob of which the page cache holds nothing."""
    stored = publish(store, os.urandom(SIZE))
    with stored.path.open("rb") as blob:
        os.fsync(blob.fileno())
        os.posix_fadvise(blob.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _dax.mincore(blob) > 0:
            pytest.skip("the test's folder is on a file system that keeps all in memory")
    return stored


def no_cachestat(fd: int, offset: int = 0, length: int = 0) -> _dax.CacheStat:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=Source)
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Both ways to ask: an older kernel is one without cachestat."""
    asked: Source = request.param
    if asked is Source.MINCORE:
        monkeypatch.setattr(_dax, "cachestat", no_cachestat)
        return asked
    with Path(__file__).open("rb") as file:
        try:
            _dax.cachestat(file)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            pytest.skip("this kernel has no cachestat(2)")
    return asked


def wait_cached(stored: StoredObject, wanted_bytes: int, deadline_s: float = 10) -> None:
    give_up = time.monotonic() + deadline_s
    while residency.blob_residency(stored).cached_bytes < wanted_bytes:
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_cold_then_partly_then_wholly_there(cold: StoredObject, source: Source) -> None:
    found = residency.blob_residency(cold)
    assert (found.size_bytes, found.cached_bytes, found.source, found.cached_share) == (SIZE, 0, source, 0.0)
    residency.populate(cold, 0, 8 * PAGE)
    part = residency.blob_residency(cold).cached_bytes
    assert part >= 8 * PAGE  # the kernel reads ahead of what is asked
    residency.populate(cold)
    found = residency.blob_residency(cold)
    assert found.cached_bytes == 65 * PAGE and found.cached_share == 1.0


def test_what_mincore_cannot_know_is_not_0(cold: StoredObject, source: Source) -> None:
    found = residency.blob_residency(cold)
    if source is Source.MINCORE:
        assert (found.dirty_bytes, found.evicted_bytes, found.refault_bytes) == (None, None, None)
    else:
        assert found.dirty_bytes == 0 and found.evicted_bytes is not None and found.refault_bytes is not None


def test_dirty_bytes_are_seen(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"x" * 3 * PAGE)
        file.flush()
        found = residency.file_residency(file.fileno(), 3 * PAGE)
        if found.source is Source.MINCORE:
            pytest.skip("this kernel has no cachestat(2)")
        os.fsync(file.fileno())
        after = residency.file_residency(file.fileno(), 3 * PAGE)
    assert found.dirty_bytes == 3 * PAGE and after.dirty_bytes == 0 and after.cached_bytes == 3 * PAGE


def test_prefetch_does_not_wait_but_comes(cold: StoredObject) -> None:
    residency.prefetch(cold, 0, 40 * PAGE)
    wait_cached(cold, 40 * PAGE)
    residency.prefetch(cold)
    wait_cached(cold, 65 * PAGE)


def test_only_the_blob_is_counted_not_what_is_behind_it(cold: StoredObject) -> None:
    residency.populate(cold)
    first = dataclasses.replace(cold, size_bytes=3 * PAGE)
    assert residency.blob_residency(first).cached_bytes == 3 * PAGE


def test_an_empty_file_is_all_there(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with path.open("rb") as file:
        found = residency.file_residency(file.fileno(), 0)
    assert (found.cached_bytes, found.cached_share) == (0, 1.0)


@pytest.mark.parametrize(("offset", "length"), [(-1, None), (0, SIZE + 1), (SIZE + 1, None), (5, -1)])
def test_parts_that_are_none(cold: StoredObject, offset: int, length: int | None) -> None:
    for ask in (residency.prefetch, residency.populate):
        with pytest.raises(ValueError, match="no part of sha256:"):
            ask(cold, offset, length)


def test_a_blob_that_is_gone(cold: StoredObject, tmp_path: Path) -> None:
    gone = dataclasses.replace(cold, path=tmp_path / "not" / "there")
    for ask in (residency.blob_residency, residency.prefetch, residency.populate):
        with pytest.raises(NotFound, match="import the image again"):
            ask(gone)


def test_what_the_kernel_refuses_is_a_cache_error(cold: StoredObject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, offset: int = 0, length: int = 0) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(_dax, "populate", broken)
    with pytest.raises(CacheError, match="Input/output error"):
        residency.populate(cold)


def test_nothing_stays_open(cold: StoredObject) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        residency.blob_residency(cold)
        residency.prefetch(cold)
        residency.populate(cold)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_answer_is_a_value() -> None:
    found = Residency(PAGE, 0, Source.MINCORE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.cached_bytes = 1  # type: ignore[misc]
