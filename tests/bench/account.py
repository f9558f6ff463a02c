"""Where a VMM's memory is, by kind of mapping, from /proc/PID/smaps and the page tables' own size."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from native import _dax

RAM = "guest RAM: template's pages"
COPIED = "guest RAM: written, its own"
SHARED_RAM = "guest RAM: memory files of its own"
LAYERS = "layers"
TCG = "TCG's translations"
HEAP = "QEMU's heap"
ANON = "QEMU: arenas, stacks, tables"
CODE = "QEMU and libraries: file pages"
RELOCATED = "QEMU and libraries: written pages"
PAGE_TABLES = "page tables"
KINDS = (COPIED, SHARED_RAM, TCG, HEAP, ANON, RELOCATED, PAGE_TABLES, RAM, CODE, LAYERS)


@dataclass(frozen=True)
class Held:
    """KiB: this process's share of all (PSS), and what nobody else maps."""

    pss_kib: int = 0
    private_kib: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.pss_kib + other.pss_kib, self.private_kib + other.private_kib)


def split(mapping: _dax.Mapping) -> list[tuple[str, Held]]:
    """One mapping's memory by kind. Pages of its own and pages of a file are told apart: they cost differently."""
    private_kib = mapping.private_clean_kib + mapping.private_dirty_kib
    whole = Held(mapping.pss_kib, private_kib)
    if mapping.path.startswith("/memfd:memory-backend-memfd"):
        return [(SHARED_RAM, whole)]
    if mapping.path.endswith("/blob"):
        return [(LAYERS, whole)]
    if mapping.path.startswith("[heap]"):
        return [(HEAP, whole)]
    if mapping.path.startswith("/"):
        own = Held(mapping.anonymous_kib, mapping.anonymous_kib)
        rest = Held(mapping.pss_kib - own.pss_kib, private_kib - own.private_kib)
        ram = mapping.path.startswith("/memfd:sandloom-template")
        return [(COPIED if ram else RELOCATED, own), (RAM if ram else CODE, rest)]
    return [(TCG if "x" in mapping.perms and not mapping.path else ANON, whole)]


def account(mappings: Iterable[_dax.Mapping], page_tables_kib: int) -> dict[str, Held]:
    """All of a process, by kind. Pure."""
    held = {kind: Held() for kind in KINDS}
    held[PAGE_TABLES] = Held(page_tables_kib, page_tables_kib)
    for mapping in mappings:
        for kind, part in split(mapping):
            held[kind] += part
    return held


def account_of(pid: int) -> dict[str, Held]:
    """The same of a process that runs."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    tables = re.search(r"^VmPTE:\s+(\d+) kB", status, re.MULTILINE)
    return account(_dax.smaps(pid), int(tables.group(1)) if tables else 0)


def total(held: dict[str, Held]) -> Held:
    return sum(held.values(), Held())
