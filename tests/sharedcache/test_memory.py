"""Peak memory of a conversion, as the kernel counted it (ru_maxrss of a process of its own)."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest
import zstandard

from sharedcache.convert import convert_layer
from sharedcache.decompress import open_stream
from sharedcache.errors import CacheError
from sharedcache.limits import Limits
from tests.sharedcache.tarkit import END, header, padded, pax_header, pax_record, raw_header

MIB = 1 << 20
slow = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Pieces(io.RawIOBase):
    """A stream made of generated pieces, never whole in memory."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        n_bytes = min(len(view), len(self._rest))
        view[:n_bytes] = self._rest[:n_bytes]
        self._rest = self._rest[n_bytes:]
        return n_bytes


def plain_files(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield raw_header(b"%03d/%06d" % (number % 1000, number))
    yield END


def lone_folders(count: int) -> Iterator[bytes]:
    """Each member implies a chain of 60 folders of its own."""
    for number in range(count):
        yield pax_header(pax_record(b"path", b"%d" % number + b"/a" * 60 + b"/f")) + raw_header()
    yield END


def attributes(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield pax_header(b"".join(pax_record(b"SCHILY.xattr.user.%d" % n, b"v" * 3000) for n in range(20)))
        yield raw_header(b"%d" % number)
    yield END


def tiny_attributes(count: int) -> Iterator[bytes]:
    records = b"".join(pax_record(b"SCHILY.xattr.user.%d" % n, b"") for n in range(2000))
    for number in range(count):
        yield pax_header(records) + raw_header(b"%d" % number)
    yield END


def long_links(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield pax_header(pax_record(b"linkpath", b"t" * 4095)) + raw_header(b"%d" % number, kind=b"2")
    yield END


def huge_pax(count: int) -> Iterator[bytes]:
    records = pax_header(b"".join(pax_record(b"comment%d" % n, b"c" * 1000) for n in range(1000)))
    for number in range(count):
        yield records + raw_header(b"%d" % number)
    yield END


def sparse_maps(count: int) -> Iterator[bytes]:
    text = b"20000\n" + b"".join(b"%d\n1\n" % (1024 * number) for number in range(20_000))
    body = padded(text) + b"d" * 20_000
    records = pax_header(
        pax_record(b"GNU.sparse.major", b"1") + pax_record(b"GNU.sparse.minor", b"0")
        + pax_record(b"GNU.sparse.realsize", b"%d" % (1024 * 20_000))
    )  # fmt: skip
    for number in range(count):
        yield records + raw_header(b"%d" % number, size=b"%011o\0" % len(body)) + padded(body)
    yield END


def all_holes(count: int) -> Iterator[bytes]:
    records = pax_header(
        pax_record(b"GNU.sparse.major", b"1") + pax_record(b"GNU.sparse.minor", b"0")
        + pax_record(b"GNU.sparse.realsize", b"%d" % (1 << 38))
    )  # fmt: skip
    for number in range(count):
        yield records + raw_header(b"%d" % number, size=b"%011o\0" % 512) + padded(b"0\n")
    yield END


def big_file(n_mib: int) -> Iterator[bytes]:
    yield header("big", size=n_mib * MIB).tobuf(tarfile.GNU_FORMAT)
    block = os.urandom(4096)
    for number in range(n_mib):
        yield (block if number % 512 == 0 else b"").ljust(MIB, b"\0")
    yield END


def bomb(compress: Callable[[bytes], bytes], count: int) -> Iterator[bytes]:
    """`count` members or frames of 16 MiB of zeros each, behind the header of a file that would hold them all."""
    yield compress(header("big", size=count * 16 * MIB).tobuf(tarfile.GNU_FORMAT))
    zeros = compress(bytes(16 * MIB))
    for _ in range(count):
        yield zeros


def empty_members(count: int) -> Iterator[bytes]:
    piece = gzip.compress(b"", mtime=0) * 1000
    for _ in range(count // 1000):
        yield piece
    yield gzip.compress(END)


def wide_zstd(count: int) -> Iterator[bytes]:
    """A frame that asks for a window of 2 GiB (RFC 8878: descriptor 0, window exponent 21, one raw block)."""
    yield b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3]) + (count << 3 | 1).to_bytes(3, "little") + b"x" * count


CASES: dict[str, Callable[[int], Iterator[bytes]]] = {
    "plain_files": plain_files, "lone_folders": lone_folders, "attributes": attributes, "long_links": long_links,
    "tiny_attributes": tiny_attributes, "huge_pax": huge_pax, "sparse_maps": sparse_maps, "all_holes": all_holes,
    "big_file": big_file, "gzip": lambda count: bomb(gzip.compress, count),
    "xz": lambda count: bomb(lambda data: lzma.compress(data, preset=0), count),
    "bzip2": lambda count: bomb(bz2.compress, count),
    "zstd": lambda count: bomb(zstandard.compress, count), "empty_members": empty_members, "wide_zstd": wide_zstd,
}  # fmt: skip


def child(name: str, count: int, blob: str, limits: dict[str, int]) -> None:
    """What the subprocess does: one conversion, then its peak and outcome as JSON."""
    source = cast(BinaryIO, io.BufferedReader(Pieces(CASES[name](count))))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = "converted"
    with Path(blob).open("w+b") as out:
        try:
            convert_layer(open_stream(source, Limits(**limits)), out, limits=Limits(**limits))
        except CacheError as error:
            outcome = str(error)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"grown_mib": (peak_kib - before_kib) / 1024, "outcome": outcome}))


def measure(tmp_path: Path, name: str, count: int, **limits: int) -> tuple[float, str]:
    """How much memory the conversion took in MiB, and how it ended."""
    program = "import sys, json; from tests.sharedcache.test_memory import child; child(*json.loads(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([name, count, str(tmp_path / "blob"), limits])],
        capture_output=True, text=True, timeout=280, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["grown_mib"], result["outcome"]


BUFFERS_MIB = 24  # windows, packs and what Python needs beside what the limits count


@pytest.mark.parametrize(
    ("name", "count"),
    [("lone_folders", 10_000), ("attributes", 4_000), ("all_holes", 5_000), ("long_links", 20_000),
     pytest.param("plain_files", 100_000, marks=slow), pytest.param("tiny_attributes", 1_000, marks=slow)],
)  # fmt: skip
def test_metadata_is_bounded_by_its_limit(tmp_path: Path, name: str, count: int) -> None:
    grown_mib, outcome = measure(tmp_path, name, count, metadata_bytes=16 * MIB)
    assert "over the limit metadata_bytes" in outcome
    assert grown_mib < 16 + BUFFERS_MIB


@pytest.mark.parametrize(("name", "count"), [("huge_pax", 20), pytest.param("sparse_maps", 20, marks=slow)])
def test_extension_records_are_not_kept(tmp_path: Path, name: str, count: int) -> None:
    grown_mib, outcome = measure(tmp_path, name, count)
    assert outcome == "converted"
    assert grown_mib < BUFFERS_MIB


@pytest.mark.parametrize("name", ["zstd", *(pytest.param(name, marks=slow) for name in ("gzip", "xz", "bzip2"))])
def test_a_decompression_bomb_is_stopped(tmp_path: Path, name: str) -> None:
    """It says 16 GiB; it is stopped once what came out is out of proportion to what went in."""
    grown_mib, outcome = measure(tmp_path, name, 1000, expansion=100)
    assert f"{name} stream: over the limit expansion = 100" in outcome
    assert grown_mib < BUFFERS_MIB
    assert (tmp_path / "blob").stat().st_blocks * 512 < 64 * MIB


def test_a_window_of_two_gib_is_refused(tmp_path: Path) -> None:
    grown_mib, outcome = measure(tmp_path, "wide_zstd", 1000)
    assert "zstd data is damaged" in outcome
    assert grown_mib < BUFFERS_MIB


@pytest.mark.slow
def test_a_million_empty_members_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    grown_mib, outcome = measure(tmp_path, "empty_members", 200_000)
    assert outcome == "converted"
    assert grown_mib < BUFFERS_MIB


@pytest.mark.slow
def test_a_file_of_many_gib_streams_through(tmp_path: Path) -> None:
    grown_mib, outcome = measure(tmp_path, "big_file", 6 * 1024)
    assert outcome == "converted"
    assert grown_mib < BUFFERS_MIB
    assert (tmp_path / "blob").stat().st_blocks * 512 < 64 * MIB


@pytest.mark.slow
def test_a_million_files_fit_the_standard_limits(tmp_path: Path) -> None:
    grown_mib, outcome = measure(tmp_path, "plain_files", 1_000_000)
    assert outcome == "converted"
    assert grown_mib < 512 + BUFFERS_MIB
