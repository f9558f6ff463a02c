"""Sparse files in tar: pure parsing of the maps of all four GNU formats.

old GNU (type S): 4 runs in the header at 386, then blocks of 21; 0.0: repeated GNU.sparse.offset and
numbytes; 0.1: GNU.sparse.map "offset,length,…"; 1.0: decimal lines in front of the data, padded to 512.
(GNU tar manual, "Storing Sparse Files".)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits
from sharedcache.pax import parse_size
from sharedcache.tar_header import parse_number


@dataclass(frozen=True, slots=True)
class SparseMap:
    """`size` is the apparent size; `extents` are (offset, length) runs of data, ascending, never empty."""

    size: int
    extents: tuple[tuple[int, int], ...]


def make_map(size: int, runs: Iterable[tuple[int, int]], stored: int, limits: Limits, where: str | bytes) -> SparseMap:
    """Check a map against the file: runs ascend, stay inside `size`, and add up to the `stored` bytes."""
    extents = tuple((offset, length) for offset, length in runs if length)
    if len(extents) > limits.sparse_extents:
        raise LimitExceeded("sparse_extents", allowed=limits.sparse_extents, where=where)
    edge = total = 0
    for offset, length in extents:
        if offset < edge or length < 0 or offset + length > size:
            raise BadArchive(f"sparse map has a run at {offset} of {length} bytes, out of order or size", where=where)
        edge = offset + length
        total += length
    if total != stored:
        raise BadArchive(f"sparse map describes {total} bytes but {stored} are stored", where=where)
    return SparseMap(size, extents)


def parse_gnu_runs(block: bytes, start: int, count: int, where: str | bytes) -> list[tuple[int, int]]:
    """`count` pairs of 12-byte numbers at `start` of a header or its continuation; an empty one ends them."""
    runs = []
    for at in range(start, start + 24 * count, 24):
        if not block[at]:
            break
        offset = parse_number(block[at : at + 12], "sparse offset", where)
        runs.append((offset, parse_number(block[at + 12 : at + 24], "sparse length", where)))
    return runs


def parse_pairs(numbers: list[bytes], where: str | bytes) -> list[tuple[int, int]]:
    """Decimal texts offset, length, offset, length… as pairs."""
    if len(numbers) % 2:
        raise BadArchive("sparse map has an odd number of fields", where=where)
    values = [parse_size(text, "sparse map field", where) for text in numbers]
    return list(zip(values[::2], values[1::2], strict=True))
