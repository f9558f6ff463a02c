"""Rows sorted by their room, and the first of them that fits. Pure.

Blocks of at most 2 BLOCK rows know the most of CPU and of uncommitted memory that any of theirs has, so that a search
passes over a block none of whose rows can do. Rows that changed are put in their new places when the next search asks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from controlplane.scheduler_rows import Row

BLOCK = 16
Entry = tuple[int, str, "Row"]


class Rooms:
    """See the module."""

    __slots__ = ("_at", "_blocks", "_most", "rows", "stale")

    def __init__(self) -> None:
        self.rows: set[Row] = set()
        self.stale: set[Row] = set()
        self._at: dict[Row, int] = {}  # the room under which a row stands in its block
        self._blocks: list[list[Entry]] = []
        self._most: list[_Most] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(list(self.rows))

    def add(self, row: Row) -> None:
        """From now on among the rows."""
        self.rows.add(row)
        row.lists.add(self)
        self.stale.add(row)

    def discard(self, row: Row) -> None:
        """No longer."""
        self.rows.discard(row)
        row.lists.discard(self)
        self.stale.add(row)

    def first(
        self, need_mib: int, level: int, cpu_milli: int, ceiling_mib: int, fits: Callable[[Row], bool]
    ) -> Row | None:
        """The row with the least room of at least `need_mib` (then the first by name) that has CPU at this level and
        uncommitted memory for it, and that `fits`."""
        if self.stale:
            self._settle()
        number = self._block_of((need_mib, ""))
        if number >= len(self._blocks):
            return None
        start = bisect_left(self._blocks[number], (need_mib, ""))
        while number < len(self._blocks):
            most = self._most[number]
            if most.cpu_left[level] >= cpu_milli and most.uncommitted_mib >= ceiling_mib:
                block = self._blocks[number]
                for at in range(start, len(block)):
                    row = block[at][2]
                    if row.cpu_left[level] >= cpu_milli and row.uncommitted_mib >= ceiling_mib and fits(row):
                        return row
                if most.loose:
                    self._most[number] = _Most(block)
            number, start = number + 1, 0
        return None

    def _block_of(self, key: tuple[int, str]) -> int:
        """The first block whose last entry is not below `key`."""
        low, high = 0, len(self._blocks)
        while low < high:
            middle = (low + high) // 2
            if self._blocks[middle][-1][:2] < key:
                low = middle + 1
            else:
                high = middle
        return low

    def _settle(self) -> None:
        stale, self.stale = self.stale, set()
        if len(stale) * 4 > len(self._at) + 64:
            self._sort()
            return
        for row in stale & self._at.keys():  # all before any is put in: a host that was replaced has two rows of a name
            self._take_out(row)
        for row in stale & self.rows:
            self._put_in(row)

    def _sort(self) -> None:
        entries = sorted((row.room_mib, row.name, row) for row in self.rows)
        self._blocks = [entries[at : at + BLOCK] for at in range(0, len(entries), BLOCK)]
        self._most = [_Most(block) for block in self._blocks]
        self._at = {row: room for room, _, row in entries}

    def _take_out(self, row: Row) -> None:
        key = (self._at.pop(row), row.name)
        number = self._block_of(key)
        block = self._blocks[number]
        del block[bisect_left(block, key)]
        self._most[number].loose = True
        if not block:
            del self._blocks[number], self._most[number]

    def _put_in(self, row: Row) -> None:
        self._at[row] = row.room_mib
        entry = (row.room_mib, row.name, row)
        if not self._blocks:
            self._blocks, self._most = [[entry]], [_Most([entry])]
            return
        number = min(self._block_of(entry[:2]), len(self._blocks) - 1)
        block = self._blocks[number]
        insort(block, entry)
        self._most[number].add(row)
        if len(block) > 2 * BLOCK:
            halves = [block[:BLOCK], block[BLOCK:]]
            self._blocks[number : number + 1] = halves
            self._most[number : number + 1] = map(_Most, halves)


class _Most:
    """No row of a block has more than this. `loose`: perhaps none has so much any more."""

    __slots__ = ("cpu_left", "loose", "uncommitted_mib")

    def __init__(self, block: list[Entry]) -> None:
        rows = [entry[2] for entry in block]
        self.cpu_left = [max(left) for left in zip(*[row.cpu_left for row in rows], strict=True)]
        self.uncommitted_mib = max([row.uncommitted_mib for row in rows])
        self.loose = False

    def add(self, row: Row) -> None:
        """One more in the block."""
        self.cpu_left = [left if left > most else most for left, most in zip(row.cpu_left, self.cpu_left, strict=True)]
        self.uncommitted_mib = max(self.uncommitted_mib, row.uncommitted_mib)
