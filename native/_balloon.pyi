"""The host half of the balloon: guest frames in, holes in memory files out.

Promise: whatever list of runs a guest sends, only bytes that a region of the map owns are ever touched, each at most
once a plan, and a failure says exactly how far the work came. All numbers are bytes unless a name says otherwise.

    memory = MemoryMap([(0, 2 << 30, 0, 0), (4 << 30, 6 << 30, 1, 0)])   # (gpa, length, file, offset)
    plan = memory.coalesce(runs_from_the_agent)                          # hostile bytes
    punch(plan, [base_fd, elastic_fd])                                   # the host has the memory back

Wire form of a list of runs: for each run two little-endian u64, `first` and `count`, both in units of `unit_bytes` of
guest-physical memory (a unit is 2 MiB for the hugetlb balloon). Runs may come in any order, overlap and repeat: the
plan covers their union. A run is refused whole, and counted, when its count is 0, when its end does not fit in 64
bits, or when any byte of it belongs to no region (a PCI hole, a device, memory that is not elastic). What to think of
a guest that sends such runs is the caller's matter: nothing of them is in the plan.

All functions release the GIL while they work, and hold no lock: values are immutable, so threads may share them.
"""

from collections.abc import Iterable, Sequence
from typing import Final, final

from _typeshed import FileDescriptorLike, ReadableBuffer, structseq

@final
class MemoryMap:
    """Where guest-physical memory stands in memory files. Immutable.

    `regions`: tuples (gpa, length, file, offset), in any order, each of whole 4096-byte pages; `file` is an index
    (below 65536) into the descriptors that `punch` gets. Only memory that may be taken from the guest belongs here:
    never a template's base RAM. ValueError, with the region's index, when one is empty, not of whole pages, does not
    fit in 64 bits (63 for the file), or shares guest-physical memory or a part of its file with another.
    """

    def __new__(cls, regions: Iterable[tuple[int, int, int, int]]) -> MemoryMap: ...
    @property
    def regions(self) -> tuple[tuple[int, int, int, int], ...]:
        """The regions by gpa."""

    @property
    def total_bytes(self) -> int:
        """What all regions own together."""

    def locate(self, gpa: int, /) -> tuple[int, int] | None:
        """(file, offset) of the byte at `gpa`; None when no region owns it."""

    def coalesce(self, runs: ReadableBuffer, /, unit_bytes: int = 2 << 20) -> Plan:
        """The plan of a list of runs in the wire form. O(n log n), O(n) when the list is sorted.

        ValueError when `runs` is no whole number of 16-byte runs, or `unit_bytes` no power of two from 4096 to 1 GiB.
        `runs` must not change meanwhile.
        """

    def coalesce_frames(self, frames: ReadableBuffer, /, unit_bytes: int = 4096) -> Plan:
        """The same of a list of single units: one little-endian u64 each, as if `count` were 1."""

@final
class Plan:
    """Extents of memory files: by guest-physical address, disjoint, none to be joined with the next. Immutable.

    `len(plan)` is the number of extents. Only `MemoryMap.coalesce` and `coalesce_frames` make plans.
    """

    def __len__(self) -> int: ...
    @property
    def extents(self) -> list[tuple[int, int, int]]:
        """(file, offset, length) of each extent; a new list."""

    @property
    def total_bytes(self) -> int:
        """What the extents cover."""

    @property
    def duplicate_bytes(self) -> int:
        """How much accepted runs named more than once, each further time counted; at most 2^64 - 1."""

    @property
    def refused(self) -> Refused:
        """How many runs were refused, by reason."""

    @property
    def first_refused(self) -> int | None:
        """Index in the list of the first run that was refused."""

@final
class Refused(structseq[int], tuple[int, int, int]):
    """Runs refused whole: `empty` (count 0), `wrapping` (end over 64 bits), `outside` (a byte of no region)."""

    __match_args__: Final = ("empty", "wrapping", "outside")
    @property
    def empty(self) -> int: ...
    @property
    def wrapping(self) -> int: ...
    @property
    def outside(self) -> int: ...

@final
class Done(structseq[int], tuple[int, int]):
    """A plan that was carried out whole: `bytes` is its `total_bytes`, `calls` how many fallocate(2) it took."""

    __match_args__: Final = ("bytes", "calls")
    @property
    def bytes(self) -> int: ...
    @property
    def calls(self) -> int: ...

class PartialError(OSError):
    """A call failed. All of the plan before it is done, nothing from it on was tried; `errno` is the call's.

    EPERM: the file is sealed. EBADF: not open for writing. ENODEV, EOPNOTSUPP: no file that can have holes. ENOSPC (of
    `populate`): the file system or the cgroup is full.
    """

    done_bytes: int
    """How much was done, from the plan's first extent on, without a gap."""
    calls: int
    """How many calls succeeded."""
    file: int
    offset: int
    length: int
    """What the failed call was about: file index, and bytes of that file."""

def punch(plan: Plan, fds: Sequence[FileDescriptorLike], /, piece_bytes: int = 64 << 20) -> Done:
    """Gives the plan's memory back to the host: fallocate(PUNCH_HOLE | KEEP_SIZE), at most `piece_bytes` a call.

    Afterwards the guest reads zeros there, and gets new pages when it touches them. A file in huge pages gives back
    whole huge pages only: a smaller piece is cleared and stays allocated. `Done.bytes` is what was punched, allocated
    or not; how much the host got back is the difference of the files' st_blocks. Repeating it does no harm.

    `fds` has a descriptor, open for writing, for each file index of the plan (ValueError when it is too short).
    PartialError when a call fails.
    """

def populate(plan: Plan, fds: Sequence[FileDescriptorLike], /, piece_bytes: int = 64 << 20) -> Done:
    """Allocates the plan's memory now (fallocate with KEEP_SIZE), so that the guest's first touch does not have to.

    Contents stay as they are, new pages are zero. Arguments and errors as `punch`.
    """
