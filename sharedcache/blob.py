"""Where file data goes in a blob, and getting it there with few large writes.

Blob: block 0 is the superblock; data; folder blocks; inodes; zeros up to a multiple of 2 MiB. Files of
2 MiB and more start at a multiple of 2 MiB, so that a guest can map them with huge pages. That leaves a gap
in front of each, less than 2 MiB wide; smaller files that come later fill the gaps first. What stays empty
is a hole in the host's file and costs address space only.

Placement depends on the order and sizes of files alone, so the
same tar gives the same blob everywhere.
"""

from __future__ import annotations

from typing import BinaryIO

from sharedcache.erofs_layout import BLOCK_BITS, BLOCK_BYTES, HUGE_BYTES, NO_BLOCK
from sharedcache.errors import LimitExceeded

_HUGE_BLOCKS = HUGE_BYTES // BLOCK_BYTES
_PACK_BYTES = 1 << 20
_DIRECT_BYTES = 1 << 17
_GAPS_KEPT = 64
_ZEROS = memoryview(bytes(BLOCK_BYTES))
_NOWHERE = 1 << 62  # no offset is at or behind it: the next piece starts a new run


class BlockAllocator:
    """Hands out block ranges; pure bookkeeping. `end` is the first block behind everything handed out."""

    __slots__ = ("_gaps", "_limit_blocks", "end")

    def __init__(self, limit_bytes: int) -> None:
        self.end = 1  # block 0 is the superblock's
        self._gaps: list[tuple[int, int]] = []  # (first block, blocks), oldest first
        self._limit_blocks = min(limit_bytes >> BLOCK_BITS, NO_BLOCK - 1)

    def reserve(self, n_bytes: int) -> int:
        """First block of a contiguous range for `n_bytes` > 0. LimitExceeded when the blob is full."""
        blocks = (n_bytes + BLOCK_BYTES - 1) >> BLOCK_BITS
        if blocks >= _HUGE_BLOCKS:
            return self._extend(blocks, -self.end % _HUGE_BLOCKS)
        for number, (first, free) in enumerate(self._gaps):
            if free >= blocks:
                if free == blocks:
                    del self._gaps[number]
                else:
                    self._gaps[number] = (first + blocks, free - blocks)
                return first
        return self._extend(blocks, 0)

    def _extend(self, blocks: int, gap: int) -> int:
        if gap:
            self._gaps.append((self.end, gap))
            if len(self._gaps) > _GAPS_KEPT:
                self._gaps.remove(min(self._gaps, key=lambda g: g[1]))
        first = self.end + gap
        self.end = first + blocks
        if self.end > self._limit_blocks:
            raise LimitExceeded("total_bytes", allowed=self._limit_blocks << BLOCK_BITS, where="the image")
        return first


class BlobWriter:
    """Writes at offsets of an empty file; gathers small neighbours, leaves out long runs of zeros."""

    __slots__ = ("_at", "_base", "_out", "_pack", "_used")

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        out.seek(0)
        out.truncate(0)
        self._at = 0  # where `out` stands
        self._pack = memoryview(bytearray(_PACK_BYTES))
        self._base = _NOWHERE
        self._used = 0

    def write(self, offset: int, view: memoryview) -> None:
        """Put `view` at `offset`. Offsets never overlap; bytes between pieces are zero."""
        n_bytes = len(view)
        at = offset - self._base
        gap = at - self._used
        if 0 <= gap < BLOCK_BYTES and at + n_bytes <= _PACK_BYTES:
            if gap:
                self._pack[self._used : at] = _ZEROS[:gap]
            self._pack[at : at + n_bytes] = view
            self._used = at + n_bytes
            return
        self.flush()
        if n_bytes >= _DIRECT_BYTES:
            if view[0] or view[-1] or bytes(view).count(0) != n_bytes:
                self._write_out(offset, view)
            return
        self._base, self._used = offset, n_bytes
        self._pack[:n_bytes] = view

    def flush(self) -> None:
        """Write out what was gathered."""
        if self._used:
            self._write_out(self._base, self._pack[: self._used])
        self._base, self._used = _NOWHERE, 0

    def finish(self, size_bytes: int) -> None:
        """Flush, and set the file's size."""
        self.flush()
        self._out.truncate(size_bytes)
        self._out.flush()

    def _write_out(self, offset: int, view: memoryview) -> None:
        if offset != self._at:
            self._out.seek(offset)
        self._at = offset + len(view)
        while view:
            view = view[self._out.write(view) :]
