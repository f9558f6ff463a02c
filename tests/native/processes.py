"""Real processes and their memory, for the tests of native._dax."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from native import _dax
from native._dax import Mapping

PAGE = 4096

needs_frames = pytest.mark.skipif(os.geteuid() != 0, reason="frame numbers of /proc/PID/pagemap need root")


def address_of(mapped: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(mapped)
    address = ctypes.addressof(view)
    del view
    return address


def private_memory(pages: int) -> mmap.mmap:
    """Anonymous memory that is a mapping of its own: the flag keeps the kernel from joining it with a neighbour."""
    mapped = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_DONTDUMP)
    return mapped


def mapping_at(pid: int, address: int) -> Mapping:
    return next(mapping for mapping in _dax.smaps(pid) if mapping.start <= address < mapping.end)


def touch(mapped: mmap.mmap, pages: range, write: bool = False) -> None:
    """Faults pages in, one byte each."""
    for page in pages:
        if write:
            mapped[page * PAGE] = 1
        else:
            mapped[page * PAGE]


@contextmanager
def forked(action: Callable[[], object]) -> Iterator[int]:
    """A child that has done `action` and then waits until the block ends; its pid. The child runs no other Python."""
    ready_out, ready_in = os.pipe()
    end_out, end_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(end_in)
            action()
            os.write(ready_in, b"r")
            os.read(end_out, 1)
        finally:
            os._exit(0)
    os.close(ready_in)
    os.close(end_out)
    try:
        assert os.read(ready_out, 1) == b"r", "the child died before it was ready"
        yield pid
    finally:
        os.close(ready_out)
        os.close(end_in)
        os.waitpid(pid, 0)


def asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def wait_for(wanted: Callable[[], bool], deadline_s: float = 10) -> None:
    give_up = time.monotonic() + deadline_s
    while not wanted():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@contextmanager
def sleeping() -> Iterator[int]:
    """A process that does nothing at all; its pid."""
    with subprocess.Popen(["sleep", "600"]) as child:
        try:
            wait_for(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n" and asleep(child.pid))
            yield child.pid
        finally:
            child.kill()
