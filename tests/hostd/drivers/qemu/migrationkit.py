"""Migration streams made by hand, as QEMU's savevm.c and ram.c write them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

PAGE_BYTES = 4096
ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
RAM_SECTION = 2
DEVICES = b"\x04" + struct.pack(">I", 7) + b"\x05timer" + struct.pack(">II", 0, 2) + b"ticks" + b"\x7e\0\0\0\x07\x00"


@dataclass(frozen=True)
class Record:
    """One page of a block; no data means a page of zeros."""

    block: str
    page: int
    data: bytes | None


def named(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def head(capabilities: Iterable[str] = ("x-ignore-shared",)) -> bytes:
    names = list(capabilities)
    body = struct.pack(">II", 0x5145564D, 3) + b"\x07" + struct.pack(">I", 10) + b"pc-q35-7.2"
    body += b"\x05" + named("configuration/capabilities") + struct.pack(">II", 1, len(names))
    return body + b"".join(map(named, names))


def section(kind: int, payload: bytes) -> bytes:
    begin = bytes([kind]) + struct.pack(">I", RAM_SECTION)
    if kind == 0x01:
        begin += named("ram") + struct.pack(">II", 0, 4)
    return begin + payload + b"\x7e" + struct.pack(">I", RAM_SECTION)


def setup(blocks: dict[str, int]) -> bytes:
    """ram's start: every block with its bytes."""
    listed = b"".join(named(name) + struct.pack(">QQ", size, 0) for name, size in blocks.items())
    return section(0x01, struct.pack(">Q", sum(blocks.values()) | MEM_SIZE) + listed + struct.pack(">Q", EOS))


def records(items: Iterable[Record], last: str = "") -> bytes:
    """A part's payload. The block is named when it is not the one before's, as QEMU does."""
    out = b""
    for item in items:
        flags = (ZERO if item.data is None else PAGE) | (CONTINUE if item.block == last else 0)
        out += struct.pack(">Q", item.page * PAGE_BYTES | flags)
        out += b"" if item.block == last else named(item.block)
        out += b"\0" if item.data is None else item.data
        last = item.block
    return out + struct.pack(">Q", EOS)


def stream(blocks: dict[str, int], items: list[Record], parts: int = 1) -> bytes:
    """A whole one, its pages spread over `parts` parts and the end."""
    cut = -(-len(items) // (parts + 1)) or 1
    pieces = [items[at : at + cut] for at in range(0, cut * (parts + 1), cut)]
    body, last = head() + setup(blocks), ""
    for index, piece in enumerate(pieces):
        body += section(0x03 if index == parts else 0x02, records(piece, last))
        last = piece[-1].block if piece else last
    return body + DEVICES
