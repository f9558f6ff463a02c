"""How long this machine stood still meanwhile: what a bound in seconds has to allow for on a shared one."""

from __future__ import annotations

import threading
import time
from types import TracebackType

TICK_S = 0.01


class Stalls:
    """A context: `longest_s` is by how much a thread that wakes every 10 ms was late at most."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls")

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._over.wait(TICK_S):
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, now_s - before_s - TICK_S)
            before_s = now_s

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
