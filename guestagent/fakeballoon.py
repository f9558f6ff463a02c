"""The balloon and the vCPUs of the fake agent: blocks that are numbers, told honestly or as a test wants them told."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from guestagent.messages import RUN, RUNS_AT_ONCE, Kind

Runs = list[tuple[int, int]]


@dataclass
class FakeBalloon:
    """`most_blocks` is what can be taken at most. `told` makes what is reported of (first, taken); the honest answer is
    one run from the region's start. `vcpus` are online of `present`."""

    blocks: int = 0
    most_blocks: int = 1 << 20
    vcpus: int = 1
    present: int = 1
    told: Callable[[int, int], Runs] = lambda first, taken: [(first, taken)] if taken else []
    busy: bool = False
    _first: int = 0

    def balloon(self, blocks: int, first: int, end: int, deadline_ms: int) -> dict[str, object]:
        """BALLOON."""
        if self.busy:
            raise OSError(errno.EBUSY, "BALLOON_DONE comes first")
        raised = blocks >= self.blocks > 0 or blocks > self.blocks
        self.blocks, self._first = min(blocks, self.most_blocks, end - first), first
        self.busy = raised
        return self._report(0) if raised else {"blocks": self.blocks, "runs": b"", "next": 0}

    def runs(self, first: int) -> dict[str, object]:
        """BALLOON_RUNS."""
        if not self.busy:
            raise OSError(errno.EINVAL, "BALLOON comes first")
        return self._report(first)

    def _report(self, first: int) -> dict[str, object]:
        runs = [run for run in self.told(self._first, self.blocks) if run[0] >= first]
        more = runs[RUNS_AT_ONCE][0] if len(runs) > RUNS_AT_ONCE else 0
        packed = b"".join(RUN.pack(*run) for run in runs[:RUNS_AT_ONCE])
        return {"blocks": self.blocks, "runs": packed, "next": more}

    def done(self) -> None:
        """BALLOON_DONE."""
        self.busy = False

    def handlers(self) -> dict[Kind, Callable[..., object]]:
        """What answers which request."""
        return {
            Kind.BALLOON: self.balloon,
            Kind.BALLOON_RUNS: self.runs,
            Kind.BALLOON_DONE: self.done,
            Kind.CPUS: self.cpus,
        }

    def cpus(self, count: int, deadline_ms: int) -> int:
        """CPUS."""
        self.vcpus = min(count, self.present)
        return self.vcpus
