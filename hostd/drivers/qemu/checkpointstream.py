"""QEMU's migration stream with guest RAM taken out of it, so that RAM can be mapped instead of loaded.

What a stopped guest saves with x-ignore-shared still has the pages of RAM that is mapped privately (share=off), as all
RAM of a clone or a fork is. `split` hands those pages out and gives back the stream without them, which a QEMU takes
whose RAM already holds what it should. Pages of other blocks (firmware, ACPI tables) stay in it.

    "QEVM" u32 version=3 | CONFIGURATION | sections… ; big endian (QEMU's migration/savevm.c, ram.c, 7.2 to 10.0)
    CONFIGURATION  0x07 | u32 length, machine | 0x05 subsections: u8 length, name | u32 version | by name
    section        0x01 start, 0x04 full: u32 id | u8 length, name | u32 instance | u32 version | payload
                   0x02 part, 0x03 end:   u32 id | payload
                   each ends with         0x7e | u32 id
    ram's payload  records: u64 page address | flags; unless CONTINUE: u8 length, block; up to EOS
                   MEM_SIZE: per block u8 length, name | u64 bytes | u64 guest address
                   ZERO: one byte 0;  PAGE: 4096 bytes

Strict: what is not in this list ends in CheckpointFailed, never in a guess. Once `ram` has ended only full sections may
follow; they belong to devices and are kept as they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from hostd.errors import CheckpointFailed

PAGE_BYTES = 4096
MAGIC, VERSION = 0x5145564D, 3
FOOTER = 0x7E
START, PART, END, FULL, SUBSECTION, CONFIGURATION = 0x01, 0x02, 0x03, 0x04, 0x05, 0x07
ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
RAM_VERSION = 4
MOST_NAME_BYTES, MOST_CAPABILITIES, MOST_BLOCKS = 256, 256, 4096
PAGES_AT_ONCE = 256

_ZEROS = memoryview(bytes(PAGE_BYTES))
_U32, _U64 = struct.Struct(">I"), struct.Struct(">Q")


@dataclass(frozen=True)
class Split:
    """`rest` is the stream without the taken blocks' pages; `blocks` are all RAM blocks with their sizes in bytes;
    `taken` counts the pages handed out of each block that had any (pages of zeros not)."""

    rest: bytes
    blocks: Mapping[str, int]
    taken: Mapping[str, int]


def split(stream: memoryview | bytes, targets: Mapping[str, int]) -> Split:
    """Writes the pages of each block in `targets` to its descriptor (a file of zeros, as large as the block; a page of
    zeros is left out). CheckpointFailed when the stream is not what the module says. OSError of writing."""
    return _Splitter(memoryview(stream), targets).run()


@dataclass
class _Run:
    """Pages of one block that follow each other and are not written yet."""

    block: str = ""
    start: int = 0
    pages: list[memoryview] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + PAGE_BYTES * len(self.pages)


class _Splitter:
    def __init__(self, data: memoryview, targets: Mapping[str, int]) -> None:
        self._data, self._targets, self._at = data, targets, 0
        self._rest: list[memoryview] = []
        self._kept = 0  # what is before it is in _rest, or taken
        self._blocks: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        self._written: dict[str, bytearray] = {}  # of each target's pages, whether it has been handed out
        self._block = ""
        self._run = _Run()

    # Reading, never past the end.

    def _bytes(self, count: int, what: str) -> memoryview:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise CheckpointFailed(f"QEMU's state ends inside {what}, at byte {len(self._data)}")
        return self._data[start : self._at]

    def _u8(self, what: str) -> int:
        return self._bytes(1, what)[0]

    def _u32(self, what: str) -> int:
        return int(_U32.unpack(self._bytes(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack(self._bytes(8, what))[0])

    def _name(self, length: int, what: str) -> str:
        if not 0 < length <= MOST_NAME_BYTES:
            raise self._unknown(f"a name of {length} bytes in {what}")
        try:
            return str(self._bytes(length, what), "ascii")
        except UnicodeDecodeError:
            raise self._unknown(f"a name that is not ASCII in {what}") from None

    def _unknown(self, what: str) -> CheckpointFailed:
        return CheckpointFailed(f"QEMU's state has {what} at byte {self._at}, which this hostd does not know")

    # The stream.

    def run(self) -> Split:
        if self._u32("its head") != MAGIC or self._u32("its head") != VERSION:
            raise self._unknown("another head than QEVM 3")
        self._configuration()
        section, ended = self._ram_start(), False
        while not ended:
            kind = self._u8("a section")
            if kind not in (PART, END):
                raise self._unknown(f"section type {kind:#x} before the end of ram")
            if self._u32("a section") != section:
                raise self._unknown("a part of a section that is not ram")
            self._records()
            self._footer(section)
            ended = kind == END
        if self._u8("the devices") not in (FULL, 0):
            raise self._unknown("something that is no device after ram")
        self._flush()
        self._rest.append(self._data[self._kept :])
        return Split(b"".join(self._rest), self._blocks, self._taken)

    def _configuration(self) -> None:
        if self._u8("the configuration") != CONFIGURATION:
            raise self._unknown("no configuration")
        self._name(self._u32("the configuration"), "the configuration")
        while self._data[self._at : self._at + 1] == bytes([SUBSECTION]):
            self._at += 1
            name = self._name(self._u8("the configuration"), "the configuration")
            self._u32(name)
            if name == "configuration/capabilities":
                count = self._u32(name)
                if count > MOST_CAPABILITIES:
                    raise self._unknown(f"{count} capabilities")
                for _ in range(count):
                    self._name(self._u8(name), name)
            elif name == "configuration/target-page-bits":
                self._u32(name)
            else:
                raise self._unknown(f"subsection {name}")

    def _ram_start(self) -> int:
        if self._u8("a section") != START:
            raise self._unknown("a section that does not start")
        section = self._u32("a section")
        name = self._name(self._u8("a section"), "a section")
        if name != "ram":
            raise self._unknown(f"section {name}, which streams its own state,")
        self._bytes(4, name)
        version = self._u32(name)
        if version != RAM_VERSION:
            raise self._unknown(f"ram of version {version}")
        total = self._u64(name)
        if total % PAGE_BYTES != MEM_SIZE:
            raise self._unknown("ram without its blocks")
        self._block_list(total - MEM_SIZE)
        if self._u64(name) != EOS:
            raise self._unknown("more than ram's blocks")
        self._footer(section)
        return section

    def _block_list(self, total_bytes: int) -> None:
        while total_bytes > 0:
            name = self._name(self._u8("ram's blocks"), "ram's blocks")
            size_bytes = self._u64("ram's blocks")
            self._u64("ram's blocks")  # its guest address
            if name in self._blocks or len(self._blocks) >= MOST_BLOCKS or not 0 < size_bytes <= total_bytes:
                raise self._unknown(f"block {name!r} twice, or larger than all of ram")
            self._blocks[name] = size_bytes
            total_bytes -= size_bytes

    def _footer(self, section: int) -> None:
        if self._u8("a section's end") != FOOTER or self._u32("a section's end") != section:
            raise self._unknown("no end of a section")

    # ram's pages.

    def _records(self) -> None:
        while True:
            begin = self._at
            word = self._u64("ram's pages")
            if word == EOS:
                return
            flags, address = word % PAGE_BYTES, word - word % PAGE_BYTES
            if not flags & CONTINUE:
                self._block = self._name(self._u8("ram's pages"), "ram's pages")
            if address + PAGE_BYTES > self._blocks.get(self._block, 0):
                raise self._unknown(f"page {address:#x} of block {self._block!r}, beyond its end")
            kind = flags & ~CONTINUE
            if kind == ZERO:
                page = None
                if self._u8("a page of zeros") != 0:
                    raise self._unknown("a page of one byte that is not zero")
            elif kind == PAGE:
                page = self._bytes(PAGE_BYTES, "a page")
            else:
                raise self._unknown(f"a page with flags {flags:#x}")
            if self._block in self._targets:
                self._take(begin, address, page)

    def _take(self, begin: int, address: int, page: memoryview | None) -> None:
        if begin > self._kept:
            self._rest.append(self._data[self._kept : begin])
        self._kept = self._at
        written = self._written.setdefault(self._block, bytearray(self._blocks[self._block] // PAGE_BYTES))
        if page is None:
            if not written[address // PAGE_BYTES]:
                return
            page = _ZEROS
        written[address // PAGE_BYTES] = 1
        run = self._run
        if run.block != self._block or run.end != address or len(run.pages) >= PAGES_AT_ONCE:
            self._flush()
            run = self._run = _Run(self._block, address)
        run.pages.append(page)

    def _flush(self) -> None:
        run, self._run = self._run, _Run()
        if run.pages:
            written = os.pwritev(self._targets[run.block], run.pages, run.start)
            if written != PAGE_BYTES * len(run.pages):
                raise CheckpointFailed(f"only {written} bytes of a checkpoint's memory could be written")
            self._taken[run.block] = self._taken.get(run.block, 0) + len(run.pages)
