"""Two questions that tests ask of native code: does it let others run, and does it give all memory back."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

_FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]
    uordblks: int
    hblkhd: int


def _malloced_bytes() -> int:
    """What glibc's malloc has given out and not got back, its own mappings included."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info: _Mallinfo2 = mallinfo2()
    return info.uordblks + info.hblkhd


def growth_of(action: Callable[[], object], times: int = 300) -> int:
    """How many bytes more are in use for each hundred of `times` calls, after the first ones have warmed caches."""
    for _ in range(50):
        action()
    gc.collect()
    blocks, malloced = sys.getallocatedblocks(), _malloced_bytes()
    for _ in range(times):
        action()
    gc.collect()
    grown_blocks, grown_bytes = sys.getallocatedblocks() - blocks, _malloced_bytes() - malloced
    return (max(0, grown_blocks) * 32 + max(0, grown_bytes)) * 100 // times


def runs_beside(action: Callable[[], object], attempts: int = 5) -> bool:
    """Whether this thread gets to run in the middle of `action`, which another thread does without the GIL.

    Only the middle half of its time counts, so that what happens before it starts proves nothing. A busy machine may
    keep this thread waiting, hence the attempts. The action should take some 30 ms or more.
    """
    return any(_once_beside(action) for _ in range(attempts))


def _once_beside(action: Callable[[], object]) -> bool:
    span: list[float] = []

    def work() -> None:
        begun_s = time.monotonic()
        action()
        span.extend((begun_s, time.monotonic()))

    ticks: list[float] = []
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        ticks.append(time.monotonic())
    worker.join()
    begun_s, ended_s = span
    quarter_s = (ended_s - begun_s) / 4
    return any(begun_s + quarter_s < tick < ended_s - quarter_s for tick in ticks)
