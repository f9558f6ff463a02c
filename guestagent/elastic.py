"""What the host asks of a guest that runs: its elastic memory, vCPUs and clock (PROTOCOL.md, kinds 15 to 18 and 21),
checked when it is built."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import ClassVar

from guestagent.messages import MAX_BLOCKS, MAX_VCPUS, U32_MAX, U64_MAX, Kind, require_uint


@dataclass(frozen=True)
class SetBalloon:
    """Have so many 2 MiB blocks held, of those from `first` to `end` of guest-physical memory: a BalloonReport.

    When it says runs, BalloonDone is due as soon as the host has made its holes; EBUSY until then. Lowering never
    does, and gives the blocks back at once."""

    blocks: int
    first: int
    end: int
    deadline_ms: int
    kind: ClassVar[Kind] = Kind.BALLOON

    def __post_init__(self) -> None:
        for name, value in (("blocks", self.blocks), ("first", self.first), ("end", self.end)):
            require_uint(value, name, MAX_BLOCKS)
        require_uint(self.deadline_ms, "deadline_ms", U32_MAX, 1)

    def fields(self) -> tuple[int, ...]:
        """As the message has them."""
        return astuple(self)


@dataclass(frozen=True)
class MoreRuns:
    """Tell the rest of the runs, from block `first` on: a BalloonReport."""

    first: int
    kind: ClassVar[Kind] = Kind.BALLOON_RUNS

    def __post_init__(self) -> None:
        require_uint(self.first, "first", MAX_BLOCKS)

    def fields(self) -> tuple[int, ...]:
        """As the message has them."""
        return astuple(self)


@dataclass(frozen=True)
class BalloonDone:
    """The host has made its holes: the guest may take the blocks back when it needs them."""

    kind: ClassVar[Kind] = Kind.BALLOON_DONE

    def fields(self) -> tuple[int, ...]:
        """As the message has them."""
        return ()


@dataclass(frozen=True)
class SetCpus:
    """Bring vCPUs on or off until `count` are online, or the deadline is over: how many are."""

    count: int
    deadline_ms: int
    kind: ClassVar[Kind] = Kind.CPUS

    def __post_init__(self) -> None:
        require_uint(self.count, "count", MAX_VCPUS, 1)
        require_uint(self.deadline_ms, "deadline_ms", U32_MAX, 1)

    def fields(self) -> tuple[int, ...]:
        """As the message has them."""
        return astuple(self)


@dataclass(frozen=True)
class SetClock:
    """Have CLOCK_REALTIME show `time_unix_ns`. EOPNOTSUPP where the kernel is not the sandbox's own."""

    time_unix_ns: int
    kind: ClassVar[Kind] = Kind.CLOCK

    def __post_init__(self) -> None:
        require_uint(self.time_unix_ns, "time_unix_ns", U64_MAX >> 1, 1)

    def fields(self) -> tuple[int, ...]:
        """As the message has them."""
        return astuple(self)


ElasticRequest = SetBalloon | MoreRuns | BalloonDone | SetCpus | SetClock
