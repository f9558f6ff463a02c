"""The file behind a guest's elastic memory: huge pages where the host can give them, found out by trying.

A file on a tmpfs of its own that is mounted nowhere (fsmount(2)) and unlinked at once: it lives as long as somebody has
it open or mapped, so hostd's end leaves it to its QEMU, and nothing has to be unmounted. The mount says huge=always,
whatever the host's setting for shared memory: a touched page brings 2 MiB, and punching them is some 80 times as fast
as punching 4 KiB pages. Where that cannot be had the file is an ordinary memfd.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ELASTIC_NAME = "sandloom-elastic"
"""Shows in /proc/PID/maps as `/sandloom-elastic (deleted)`, or `/memfd:sandloom-elastic (deleted)` on small pages."""

HUGE_BYTES = 2 << 20
BLOCK_BYTES = 512  # st_blocks counts in these
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6  # enum fsconfig_command, linux/mount.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Backing:
    """What elastic memory stands on here, and why, for people."""

    huge: bool
    why: str

    def __str__(self) -> str:
        return f"{'huge' if self.huge else '4 KiB'} pages ({self.why})"


def open_elastic(size_bytes: int, *, huge: bool) -> int:
    """A new empty file of that size; the caller closes the descriptor. OSError when the host cannot make it."""
    if not huge:
        descriptor = os.memfd_create(ELASTIC_NAME, os.MFD_CLOEXEC)
    else:
        with _tmpfs(size_bytes) as folder:
            descriptor = os.open(ELASTIC_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
            os.unlink(ELASTIC_NAME, dir_fd=folder)
    try:
        os.ftruncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def find_elastic(pid: int, size_bytes: int) -> int | None:
    """The same file of a running QEMU, open for writing; None when it has none, as a fork. OSError when it is gone."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if entry.readlink().name == f"{ELASTIC_NAME} (deleted)" or str(entry.readlink()).startswith(
            (f"/memfd:{ELASTIC_NAME} ", "/memfd:memory-backend-memfd ")
        ):
            descriptor = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(descriptor).st_size == size_bytes:
                return descriptor
            os.close(descriptor)
    return None


def held_bytes(descriptor: int) -> int:
    """How much of the host's memory the file has."""
    return os.fstat(descriptor).st_blocks * BLOCK_BYTES


@cache
def probe() -> Backing:
    """Whether a touched byte brings a huge page, and whether punching takes it away again. Once a process."""
    try:
        descriptor = open_elastic(2 * HUGE_BYTES, huge=True)
    except OSError as error:
        return Backing(False, f"a detached tmpfs with huge=always cannot be mounted: {error.strerror}")
    try:
        with mmap.mmap(descriptor, 2 * HUGE_BYTES) as view:
            view[HUGE_BYTES] = 1
            came_bytes = held_bytes(descriptor)
    finally:
        os.close(descriptor)
    if came_bytes < HUGE_BYTES:
        return Backing(False, f"on a tmpfs with huge=always a touched byte brings {came_bytes >> 10} KiB")
    return Backing(True, "a detached tmpfs with huge=always")


@contextmanager
def _tmpfs(size_bytes: int) -> Iterator[int]:
    """The root of a new tmpfs that is mounted nowhere; what is open in it outlives the block."""
    context = _checked(_libc.fsopen(b"tmpfs", _CLOEXEC))
    try:
        size = str(-(-size_bytes // HUGE_BYTES) * HUGE_BYTES).encode()
        for key, value in ((b"size", size), (b"huge", b"always"), (b"mode", b"0700")):
            _checked(_libc.fsconfig(context, _SET_STRING, key, value, 0))
        _checked(_libc.fsconfig(context, _CREATE, None, None, 0))
        folder = _checked(_libc.fsmount(context, _CLOEXEC, 0))
    finally:
        os.close(context)
    try:
        yield folder
    finally:
        os.close(folder)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
