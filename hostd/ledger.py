"""The sharing ledger: what each sandbox's page tables hold, split into private, shared-with-n and saved.

Measured, never computed: native._dax.page_split walks /proc/PID/pagemap of every mapping and counts, for each
physical page, how many sandboxes map it. Its sums are the host's: the distinct pages are counted once each.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostd.drivers.contract import Region
from hostd.drivers.oci.mounts import points_below
from native import _dax
from sharedcache import residency
from sharedcache.objects import ObjectKind
from sharedcache.store import Store

PAGE_BYTES = 4096


@dataclass(frozen=True)
class MemoryRow:
    """One sandbox: bytes resident, and of those: alone, by number of holders, proportional, saved; by kind."""

    uid: str
    resident_bytes: int
    private_bytes: int
    proportional_bytes: int
    shared: tuple[tuple[int, int], ...]  # (holders, bytes)
    ram_bytes: int
    layer_bytes: int
    vmm_bytes: int

    @property
    def saved_bytes(self) -> int:
        """What it would hold on top, were nothing shared."""
        return self.resident_bytes - self.proportional_bytes


@dataclass(frozen=True)
class Ledger:
    """All rows, and what they hold together, each page once."""

    rows: tuple[MemoryRow, ...]
    distinct_bytes: int


def row_of(uid: str, holders: Mapping[int, int], regions: Iterable[Region]) -> MemoryRow:
    """A row from a histogram {holders: pages} and the regions it was measured over. Pure."""
    by_kind = {"ram": 0, "layer": 0, "vmm": 0}
    for region in regions:
        by_kind[region.kind] += region.resident_kib * 1024
    return MemoryRow(
        uid=uid,
        resident_bytes=sum(holders.values()) * PAGE_BYTES,
        private_bytes=holders.get(1, 0) * PAGE_BYTES,
        proportional_bytes=round(sum(pages / n for n, pages in holders.items()) * PAGE_BYTES),
        shared=tuple((n, pages * PAGE_BYTES) for n, pages in sorted(holders.items()) if n > 1),
        ram_bytes=by_kind["ram"],
        layer_bytes=by_kind["layer"],
        vmm_bytes=by_kind["vmm"],
    )


def measure(regions: Mapping[str, Sequence[Region]]) -> Ledger:
    """The ledger of these sandboxes' regions now. Blocks for milliseconds a GiB mapped; run it in a thread."""
    uids = [uid for uid in regions if regions[uid]]
    ranges = [
        (index, region.pid, region.start, region.end) for index, uid in enumerate(uids) for region in regions[uid]
    ]
    distinct_pages, owners = _dax.page_split(ranges)
    rows = tuple(row_of(uids[owner], holders, regions[uids[owner]]) for owner, _, holders in owners)
    return Ledger(rows, distinct_pages * PAGE_BYTES)


def layer_cache_bytes(store: Store, mounts: Path | None = None) -> int:
    """How much of the store's layers the host's page cache holds now, each page once: as blobs, and as files of the
    layers that are mounted below `mounts` for OCI sandboxes. Blocks, for the mounts' part some 35 µs a file."""
    blobs = sum(
        residency.blob_residency(stored).cached_bytes for stored in store.objects() if stored.kind is ObjectKind.LAYER
    )
    return blobs + sum(mount_cache_bytes(point) for point in (points_below(mounts) if mounts else ()))


def mount_cache_bytes(mount: Path) -> int:
    """The same of one mounted layer's files."""
    cached: dict[int, int] = {}
    for folder, _, names in os.walk(mount):
        for name in names:
            path = Path(folder) / name
            with contextlib.suppress(FileNotFoundError):  # unmounted meanwhile
                info = path.lstat()
                if stat.S_ISREG(info.st_mode) and info.st_ino not in cached:
                    with path.open("rb") as file:
                        cached[info.st_ino] = residency.file_residency(file.fileno(), info.st_size).cached_bytes
    return sum(cached.values())
