"""Compressed streams: every format, several members, padding, damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable

import pytest
import zstandard

from sharedcache.decompress import open_stream
from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits

DATA = os.urandom(300_000) + bytes(700_000) + os.urandom(5)
FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress, "zstd": zstandard.compress,
}  # fmt: skip
formats = pytest.mark.parametrize("name", FORMATS)


def unpacked(data: bytes, limits: Limits | None = None) -> bytes:
    return open_stream(io.BytesIO(data), limits).read()


@formats
def test_one_member_and_many(name: str) -> None:
    compress = FORMATS[name]
    assert unpacked(compress(DATA)) == DATA
    assert unpacked(compress(b"")) == b""
    cut = [DATA[at : at + 50_021] for at in range(0, len(DATA), 50_021)]
    assert unpacked(b"".join(compress(piece) for piece in cut)) == DATA
    tiny = [b"%d" % number for number in range(200)]
    assert unpacked(b"".join(compress(piece) for piece in tiny)) == b"".join(tiny)


@pytest.mark.parametrize("name", ["gzip", "xz", "bzip2"])
@pytest.mark.parametrize("zeros", [4, 4_096, 600_000])
def test_zeros_between_and_behind_members_are_padding(name: str, zeros: int) -> None:
    compress = FORMATS[name]
    assert unpacked(compress(b"one") + bytes(zeros) + compress(b"two") + bytes(zeros)) == b"onetwo"


@formats
def test_damage_and_cuts_are_named(name: str) -> None:
    whole = FORMATS[name](DATA)
    for cut in (8, 20, len(whole) // 2):
        data = whole[:cut]
        if name == "zstd":  # its reader ends quietly: the tar in it is then seen to be cut
            assert len(unpacked(data)) < len(DATA)
            continue
        with pytest.raises(BadArchive, match=r"(ends too early|data is damaged).*copy or download"):
            unpacked(data)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0x55
    with pytest.raises(BadArchive, match=rf"{name} data is damaged"):
        # zstandard writes no checksum: there only damage to the structure shows, the rest is the digest's to find
        unpacked(bytes(flipped) if name != "zstd" else whole[:5] + b"\xff" * 40 + whole[45:])


@formats
def test_garbage_behind_the_last_member_is_refused(name: str) -> None:
    with pytest.raises(BadArchive, match=f"{name} data is damaged"):
        unpacked(FORMATS[name](DATA) + b"and something else, longer than any header could be")


def test_anything_else_passes_as_it_is() -> None:
    for data in (b"", b"x", b"BZ", b"\x1f", b"PK\3\4 more of it", DATA):
        assert unpacked(data) == data


def test_an_error_of_the_disk_is_not_called_damage() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 100_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    for compress in FORMATS.values():
        with pytest.raises(OSError, match="Input/output error"):
            open_stream(Broken(compress(os.urandom(600_000)))).read()


@formats
def test_bounds(name: str) -> None:
    bomb = FORMATS[name](bytes(1 << 20)) * 400
    with pytest.raises(LimitExceeded, match=rf"{name} stream: over the limit expansion = 10") as caught:
        stream = open_stream(io.BytesIO(bomb), Limits(expansion=10))
        while stream.read(1 << 20):
            pass
    assert caught.value.allowed == 10
    with pytest.raises(LimitExceeded, match="total_bytes = 1000"):
        unpacked(FORMATS[name](DATA), Limits(total_bytes=1000))
