"""Where an image's members are read from: a scanned tar, or a folder.

Promise: a tar's members are windows on the one open file; a folder's are opened component by component below
its own descriptor, and symbolic links in it are never followed.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from sharedcache.archive import Scan, Span
from sharedcache.errors import BadArchive

_MAX_LINKS = 8
_BUFFER_BYTES = 1 << 20


class Source(Protocol):
    """Members by their clean names ("blobs/sha256/…")."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def size_bytes(self, name: str) -> int:
        """Its size. BadArchive when it is not there or is no regular file."""

    def open(self, name: str, progress: Callable[[int], None] | None = None) -> BinaryIO:
        """Its bytes from the start; `progress` gets the count of each read. BadArchive as above."""


class _Window(io.RawIOBase):
    """A read-only view of `span` of an open file; its own position, so that many can be open."""

    def __init__(self, fd: int, span: Span, progress: Callable[[int], None] | None = None) -> None:
        self._fd = fd
        self._span = span
        self._pos = 0
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        wanted = min(len(view), self._span.size_bytes - self._pos)
        if wanted <= 0:
            return 0
        n_bytes = os.preadv(self._fd, [view[:wanted]], self._span.offset + self._pos)
        if n_bytes == 0:
            raise BadArchive("the file ends inside this member", where=f"offset {self._span.offset + self._pos}")
        self._pos += n_bytes
        if self._progress is not None:
            self._progress(n_bytes)
        return n_bytes


def window(fd: int, span: Span, progress: Callable[[int], None] | None = None) -> BinaryIO:
    """`span` of the file `fd` as a buffered stream; closing it leaves `fd` open."""
    return cast(BinaryIO, io.BufferedReader(_Window(fd, span, progress), _BUFFER_BYTES))


class TarSource:
    """The members of a scanned tar; the member "" is the whole of it. `fd` stays the caller's."""

    def __init__(self, fd: int, found: Scan, size_bytes: int) -> None:
        self._fd = fd
        self._scan = found
        self._whole = Span(0, size_bytes)

    def has(self, name: str) -> bool:
        return self._resolve(name) in self._scan.spans

    def size_bytes(self, name: str) -> int:
        return self._span(name).size_bytes

    def open(self, name: str, progress: Callable[[int], None] | None = None) -> BinaryIO:
        return window(self._fd, self._span(name), progress)

    def _resolve(self, name: str) -> str:
        """docker save links equal layers to each other: follows such links inside the archive."""
        for _ in range(_MAX_LINKS):
            if name not in self._scan.links:
                return name
            name = self._scan.links[name]
        raise BadArchive("its links lead in a circle", where=name)

    def _span(self, name: str) -> Span:
        if not name:
            return self._whole
        span = self._scan.spans.get(self._resolve(name))
        if span is None:
            raise BadArchive("this file is missing from the archive", where=name)
        return span


class FolderSource:
    """The members of an OCI layout folder. Owns a descriptor of it until `close`."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._fd)

    def has(self, name: str) -> bool:
        try:
            os.close(self._open(name))
        except BadArchive:
            return False
        return True

    def size_bytes(self, name: str) -> int:
        fd = self._open(name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def open(self, name: str, progress: Callable[[int], None] | None = None) -> BinaryIO:
        raw = _CountedFile(self._open(name), progress)
        return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))

    def _open(self, name: str) -> int:
        folder = os.dup(self._fd)
        try:
            *parents, last = name.split("/")
            for part in parents:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            remedy = "copy the layout again with its files in place, without symbolic links"
            raise BadArchive(f"cannot be opened: {error.strerror}", where=name, remedy=remedy) from error
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadArchive("is no regular file", where=name)
        return fd


class _CountedFile(io.FileIO):
    def __init__(self, fd: int, progress: Callable[[int], None] | None) -> None:
        super().__init__(fd, "rb")
        self._progress = progress

    def readinto(self, buffer: object, /) -> int:
        n_bytes = super().readinto(cast(bytearray, buffer)) or 0
        if self._progress is not None:
            self._progress(n_bytes)
        return n_bytes
