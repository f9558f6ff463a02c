"""What of a stored blob is in the host's memory: asked of the kernel, page by page, never estimated.

cachestat(2) where the kernel has it (Linux 6.5), else mincore(2), which knows cached pages only: then what cannot be
known is None, not 0. Which one it was is in the answer. Nothing here changes a blob, and nothing is kept open.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from native import _dax
from sharedcache.errors import CacheError, NotFound
from sharedcache.objects import StoredObject

_NO_CACHESTAT = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
"""An older kernel; a file system without it; a seccomp filter that does not know the call."""


class Source(StrEnum):
    """Who was asked."""

    CACHESTAT = "cachestat"
    MINCORE = "mincore"


@dataclass(frozen=True)
class Residency:
    """The page cache's share of one blob, or of a part of one.

    Bytes are whole pages, so `cached_bytes` of a blob is never more than its size rounded up to pages. The last three
    are None when the source is mincore. `evicted_bytes`: was cached once, is not now. `refault_bytes`: of that, what
    went so recently that memory must have been short.
    """

    size_bytes: int
    cached_bytes: int
    source: Source
    dirty_bytes: int | None = None
    evicted_bytes: int | None = None
    refault_bytes: int | None = None

    @property
    def cached_share(self) -> float:
        """0.0 to 1.0; 1.0 of an empty blob, all of which is there."""
        return min(1.0, self.cached_bytes / self.size_bytes) if self.size_bytes else 1.0


def blob_residency(stored: StoredObject) -> Residency:
    """How much of `stored` is in the page cache now. Blocks for microseconds (mincore: a millisecond a GiB).

    NotFound when the blob is gone (removed, quarantined), CacheError when the kernel refuses.
    """
    with _opened(stored) as fd:
        return file_residency(fd, stored.size_bytes)


def file_residency(fd: int, size_bytes: int) -> Residency:
    """The same of the first `size_bytes` of an open file. OSError as native._dax.mincore."""
    if size_bytes == 0:  # a length of 0 means "up to the end" to the kernel
        return Residency(0, 0, Source.CACHESTAT, 0, 0, 0)
    try:
        pages = _dax.cachestat(fd, 0, size_bytes)
    except OSError as error:
        if error.errno not in _NO_CACHESTAT:
            raise
        return Residency(size_bytes, _dax.mincore(fd, 0, size_bytes) * _dax.PAGE_BYTES, Source.MINCORE)
    return Residency(
        size_bytes,
        cached_bytes=pages.cached * _dax.PAGE_BYTES,
        source=Source.CACHESTAT,
        dirty_bytes=pages.dirty * _dax.PAGE_BYTES,
        evicted_bytes=pages.evicted * _dax.PAGE_BYTES,
        refault_bytes=pages.recently_evicted * _dax.PAGE_BYTES,
    )


def prefetch(stored: StoredObject, offset: int = 0, length: int | None = None) -> None:
    """Starts reading a part of the blob (None: up to its end) into the page cache; does not wait for it.

    NotFound when the blob is gone, CacheError when it cannot be read, ValueError for a part that is not in it.
    """
    _read(stored, offset, length, _dax.prefetch)


def populate(stored: StoredObject, offset: int = 0, length: int | None = None) -> None:
    """The same, and waits until it is there: as long as the disk takes, so run it in a thread. Errors as `prefetch`."""
    _read(stored, offset, length, _dax.populate)


def _read(stored: StoredObject, offset: int, length: int | None, how: Callable[[int, int, int], int | None]) -> None:
    upto = stored.size_bytes if length is None else offset + length
    if not 0 <= offset <= upto <= stored.size_bytes:
        raise ValueError(f"bytes {offset} to {upto} are no part of {stored.digest}, which has {stored.size_bytes}")
    if offset == upto:
        return
    with _opened(stored) as fd:
        how(fd, offset, upto - offset)


@contextmanager
def _opened(stored: StoredObject) -> Iterator[int]:
    """The blob, open for reading; what the kernel refuses meanwhile as one of this package's errors."""
    try:
        fd = os.open(Path(stored.path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"the blob of {stored.digest} is gone: import the image again") from error
    except OSError as error:
        raise CacheError(
            f"cannot look at the blob of {stored.digest} in the page cache: {error}; see `sandloom doctor`"
        ) from error
