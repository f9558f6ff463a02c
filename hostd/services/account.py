"""What a sandbox's services did, counted, and its refusals as entries for the event log, at a bounded rate. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

TOLD_PER_S, TOLD_AT_ONCE = 2.0, 20


@dataclass(frozen=True)
class Refusal:
    """A call that was refused: of the process with that number in the sandbox's kernel (0: not known), and why."""

    service: str
    pid: int
    syscall: str
    argument: str
    rule: str

    def __str__(self) -> str:
        by = f"pid {self.pid} " if self.pid else ""
        return f"{self.service}: {by}{self.syscall}({self.argument}): {self.rule}"


@dataclass(frozen=True)
class ServiceUsage:
    """What a sandbox's services did: payload bytes, counts, decisions by "SERVICE: what", ports as they listen."""

    bytes_out: int = 0
    bytes_in: int = 0
    connections: int = 0
    open_connections: int = 0
    datagrams: int = 0
    decisions: tuple[tuple[str, int], ...] = ()
    published: tuple[str, ...] = ()


@dataclass
class Account:
    """Counters of one sandbox; `tell` gets the refusals that the rate allows, the first of the others' number with it.

    bytes_out is what the sandbox sent, bytes_in what it got, payload only."""

    tell: Callable[[str], None] = lambda text: None
    bytes_out: int = 0
    bytes_in: int = 0
    connections: int = 0
    datagrams: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    _budget: float = TOLD_AT_ONCE
    _last_s: float | None = None
    _untold: int = 0

    def decided(self, service: str, *, allowed: bool) -> None:
        """One more decision."""
        self.decisions[f"{service}: {'allowed' if allowed else 'refused'}"] += 1

    def cut(self, service: str) -> None:
        """A connection ended because the rules have changed."""
        self.decisions[f"{service}: cut"] += 1

    def refused(self, refusal: Refusal, now_s: float) -> None:
        """Counts it, and tells it when that many may be told."""
        self.decided(refusal.service, allowed=False)
        passed_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._budget = min(TOLD_AT_ONCE, self._budget + passed_s * TOLD_PER_S)
        self._last_s = now_s
        if self._budget < 1:
            self._untold += 1
            return
        self._budget -= 1
        more, self._untold = self._untold, 0
        self.tell(f"{refusal}{f'; {more} more were not told' if more else ''}")
