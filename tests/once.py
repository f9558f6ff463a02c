"""One at a time: tests run in several processes, and what they make for all of them only one may make."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Holds the lock file `lock`, which is made where it is missing; its folder must exist. Blocks."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
