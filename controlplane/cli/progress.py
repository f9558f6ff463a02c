"""Progress of long work on stderr: one redrawn line on a terminal, a line a step elsewhere, nothing when quiet."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

from controlplane.cli.output import safe
from controlplane.cli.sizes import format_bytes

REDRAW_S = 0.1
PLAIN_S = 10.0  # without a terminal: a sign of life this often within a step
_CLEAR = "\r\x1b[K"


def bar_line(step: str, done: int, total: int, width: int) -> str:
    """`step  [####----]  42%  1.0 GiB of 2.4 GiB`, cut to `width`; without a total only the amount."""
    if total <= 0:
        amount = f"  {format_bytes(done)}" if done else ""
        return f"{step}{amount}"[:width]
    share = min(1.0, done / total)
    tail = f" {share:4.0%}  {format_bytes(done)} of {format_bytes(total)}"
    room = min(30, width - len(step) - len(tail) - 5)
    if room < 5:
        return f"{step}{tail}"[:width]
    filled = int(room * share)
    return f"{step}  [{'#' * filled}{'-' * (room - filled)}]{tail}"


class Progress:
    """A context manager; `update` as often as wanted. Leaves the terminal's line clear when it ends."""

    def __init__(
        self, *, quiet: bool, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._tty = self._stream.isatty()
        self._clock = clock
        self._step: str | None = None
        self._drawn_s = 0.0
        self._begun_s = 0.0  # when this step was first told of
        self._dirty = False

    def update(self, step: str, done: int = 0, total: int = 0) -> None:
        """What is going on now; bytes done of total (0: unknown)."""
        if self._quiet:
            return
        step, now_s = safe(step), self._clock()
        fresh = step != self._step
        if not fresh and now_s - self._drawn_s < (REDRAW_S if self._tty else PLAIN_S):
            return
        self._begun_s = now_s if fresh else self._begun_s
        self._step, self._drawn_s = step, now_s
        if not done and not total and now_s - self._begun_s >= 1:
            step = f"{step}  {now_s - self._begun_s:.0f} s"
        width = shutil.get_terminal_size().columns - 1
        if self._tty:
            self._write(_CLEAR + bar_line(step, done, total, width))
            self._dirty = True
        else:
            amount = f" {format_bytes(done)}" + (f" of {format_bytes(total)}" if total else "")
            self._write(step + ("" if fresh or not done else amount) + "\n")

    def note(self, text: str) -> None:
        """One line that stays."""
        if self._quiet:
            return
        self.clear()
        self._write(safe(text) + "\n")
        self._step = None

    def clear(self) -> None:
        """Takes the redrawn line away, so that other output starts on a clean one."""
        if self._dirty:
            self._write(_CLEAR)
            self._dirty = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
