"""Parting QEMU's migration stream: pages where they belong, the rest as it was, anything unknown refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.drivers.qemu.checkpointstream import PAGE_BYTES, Split, split
from hostd.errors import CheckpointFailed
from tests.hostd.drivers.qemu.migrationkit import (
    DEVICES,
    EOS,
    MEM_SIZE,
    PAGE,
    RAM_SECTION,
    Record,
    head,
    named,
    records,
    section,
    setup,
    stream,
)

BLOCKS = {"ram0": 8 * PAGE_BYTES, "0000:00:03.0/vm0": 4 * PAGE_BYTES, "pc.bios": 2 * PAGE_BYTES}
TAKEN, KEPT = ("ram0", "0000:00:03.0/vm0"), ("pc.bios",)


@contextmanager
def targets(names: tuple[str, ...] = TAKEN) -> Iterator[dict[str, int]]:
    made = {name: os.memfd_create(name) for name in names}
    try:
        for name, descriptor in made.items():
            os.ftruncate(descriptor, BLOCKS[name])
        yield made
    finally:
        for descriptor in made.values():
            os.close(descriptor)


def parted(data: bytes, names: tuple[str, ...] = TAKEN) -> tuple[Split, dict[str, bytes]]:
    with targets(names) as made:
        result = split(data, made)
        return result, {name: os.pread(descriptor, 1 << 20, 0) for name, descriptor in made.items()}


def written(items: list[Record], names: tuple[str, ...]) -> dict[str, bytes]:
    """What the blocks hold afterwards: of a page that comes twice the last word counts."""
    content = {name: bytearray(BLOCKS[name]) for name in names}
    for item in items:
        if item.block in content:
            at = item.page * PAGE_BYTES
            content[item.block][at : at + PAGE_BYTES] = item.data or bytes(PAGE_BYTES)
    return {name: bytes(data) for name, data in content.items()}


def page(byte: int) -> bytes:
    return bytes([byte]) * PAGE_BYTES


record = st.sampled_from(list(BLOCKS)).flatmap(
    lambda block: st.builds(
        Record,
        st.just(block),
        st.integers(0, BLOCKS[block] // PAGE_BYTES - 1),
        st.one_of(st.none(), st.integers(1, 255).map(page)),
    )
)


@settings(max_examples=50)
@given(st.lists(record, max_size=30), st.integers(0, 3))
def test_pages_are_taken_out_and_all_else_stays(items: list[Record], parts: int) -> None:
    result, content = parted(stream(BLOCKS, items, parts))
    assert content == written(items, TAKEN)
    assert result.blocks == BLOCKS
    again, nothing = parted(result.rest)  # it is a stream still, without any page of the two
    assert again.rest == result.rest
    assert again.taken == {}
    assert not any(any(data) for data in nothing.values())
    assert parted(result.rest, KEPT)[1] == written(items, KEPT)
    assert result.rest.endswith(DEVICES)


@given(st.lists(record, max_size=8), st.data())
def test_a_stream_that_ends_early_is_refused_wherever_it_ends(items: list[Record], data: st.DataObject) -> None:
    whole = stream(BLOCKS, items)
    cut = data.draw(st.integers(0, len(whole) - len(DEVICES)))
    with pytest.raises(CheckpointFailed), targets() as made:
        split(whole[:cut], made)


@given(st.lists(record, max_size=8), st.data())
def test_a_damaged_stream_is_refused_or_harmless(items: list[Record], data: st.DataObject) -> None:
    damaged = bytearray(stream(BLOCKS, items))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with targets() as made:
        try:
            split(bytes(damaged), made)
        except CheckpointFailed:
            pass
        assert {name: os.fstat(descriptor).st_size for name, descriptor in made.items()} == {
            name: BLOCKS[name] for name in TAKEN
        }


START = setup(BLOCKS)
END = section(0x03, records([]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"QEVM" + struct.pack(">I", 2) + head()[8:] + START + END + DEVICES, "another head"),
        (head()[:8] + b"\x01" + START + END + DEVICES, "no configuration"),
        (head() + b"\x05" + named("configuration/uuid") + bytes(20) + START + END + DEVICES, "configuration/uuid"),
        (head() + START.replace(b"\x03ram", b"\x03dis") + END + DEVICES, "section dis"),
        (head() + START.replace(b"ram" + bytes(7) + b"\x04", b"ram" + bytes(7) + b"\x05") + END, "ram of version 5"),
        (head() + setup({"ram0": 4096, "pc.bios": 4096}).replace(b"\x07pc.bios", b"\x04ram0") + END, "'ram0' twice"),
        (head() + section(0x01, struct.pack(">QQ", MEM_SIZE, 0x40)) + END, "more than ram's blocks"),
        (head() + START[:-1] + b"\x09" + END, "no end of a section"),
        (head() + START + b"\x01" + END[1:] + DEVICES, "section type 0x1"),
        (head() + START + END[:4] + bytes([RAM_SECTION + 1]) + END[5:], "a part of a section that is not ram"),
        (head() + START + section(0x03, records([Record("ram0", 8, page(1))])) + DEVICES, "beyond its end"),
        (head() + START + section(0x03, records([Record("ram1", 0, page(1))])) + DEVICES, "block 'ram1'"),
        (head() + START + section(0x03, struct.pack(">Q", 0x40) + named("ram0")) + DEVICES, "flags 0x40"),
        (head() + START + section(0x03, struct.pack(">Q", PAGE | 0x100) + named("ram0")) + DEVICES, "flags 0x108"),
        (head() + START + section(0x03, struct.pack(">Q", 2) + named("ram0") + b"\x01") + DEVICES, "not zero"),
        (head() + START + section(0x03, struct.pack(">Q", PAGE) + b"\x02\xff\xfe") + DEVICES, "not ASCII"),
        (head() + START + section(0x03, struct.pack(">Q", PAGE) + b"\0") + DEVICES, "name of 0 bytes"),
        (head() + START + END + b"\x02" + DEVICES, "no device after ram"),
    ],
)
def test_what_is_not_known_is_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(CheckpointFailed, match=words), targets() as made:
        split(data, made)


def test_a_disk_that_takes_less_is_told() -> None:
    read_only = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            split(stream(BLOCKS, [Record("ram0", 0, page(1))]), {"ram0": read_only})
    finally:
        os.close(read_only)


def test_eos_alone_ends_a_part() -> None:
    result, _ = parted(head() + START + section(0x02, struct.pack(">Q", EOS)) + END + DEVICES)
    assert result.taken == {}
