"""The input windows and the digests taken beside them."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from sharedcache.digest import file_sha256
from sharedcache.errors import LimitExceeded
from sharedcache.stream import HEAD_BYTES, WINDOW_BYTES, HashingInput

DATA = os.urandom(3 * WINDOW_BYTES + 12_345)


def hashing(data: bytes, limit_bytes: int = 1 << 40) -> HashingInput:
    return HashingInput(io.BytesIO(data), limit_bytes=limit_bytes)


@pytest.mark.parametrize("step", [1, 511, 512])
def test_what_is_needed_is_in_one_piece(step: int) -> None:
    """Also where it lies across two windows; sizes that do not divide a window, and skips in between."""
    at = 0
    with hashing(DATA) as stream:
        while at + step <= len(DATA):
            assert stream.need(step)
            assert stream.offset() == at
            assert bytes(stream.view[stream.pos : stream.pos + step]) == DATA[at : at + step]
            assert stream.skip(step + 100_003) == (at + step + 100_003 <= len(DATA))
            at += step + 100_003
        assert not stream.need(HEAD_BYTES) or stream.skip(len(DATA) - at)
        stream.drain()
        assert not stream.need(1)
    assert stream.total == len(DATA)
    assert stream.digest() == hashlib.sha256(DATA).digest()


@pytest.mark.parametrize("size", [0, 1, WINDOW_BYTES - 1, WINDOW_BYTES, WINDOW_BYTES + 1, 9 * WINDOW_BYTES])
def test_the_digest_covers_every_byte(size: int) -> None:
    data = (DATA * 4)[:size]
    with hashing(data) as stream:
        stream.drain()
    assert (stream.total, stream.digest()) == (size, hashlib.sha256(data).digest())


def test_the_limit_is_exact() -> None:
    for limit_bytes in (len(DATA), len(DATA) - 1):
        with hashing(DATA, limit_bytes) as stream:
            if limit_bytes == len(DATA):
                stream.drain()
            else:
                with pytest.raises(LimitExceeded, match=f"total_bytes = {limit_bytes}"):
                    stream.drain()


class Failing(io.RawIOBase):
    """Gives some bytes, then an error."""

    def __init__(self, good_bytes: int) -> None:
        self._left = good_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        if not self._left:
            raise OSError(5, "the disk broke")
        n_bytes = min(self._left, len(view))
        self._left -= n_bytes
        return n_bytes


@pytest.mark.parametrize("good_bytes", [0, 1000, WINDOW_BYTES, 5 * WINDOW_BYTES + 7])
def test_an_error_reaches_who_needs_the_bytes(good_bytes: int) -> None:
    with (
        pytest.raises(OSError, match="the disk broke"),
        HashingInput(cast(BinaryIO, Failing(good_bytes)), limit_bytes=1 << 40) as stream,
    ):
        assert stream.need(1) or not good_bytes
        stream.drain()


@pytest.mark.parametrize("read", [0, 1, WINDOW_BYTES + 1])
def test_no_thread_outlives_the_block(read: int) -> None:
    before = threading.active_count()
    with pytest.raises(RuntimeError), hashing(DATA * 5) as stream:
        stream.skip(read)
        raise RuntimeError
    assert threading.active_count() == before


@pytest.mark.parametrize("size", [0, 1, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 9_000_000])
def test_a_files_digest(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes((DATA * 2)[:size])
    with path.open("rb") as file:
        file.seek(size // 2)
        assert file_sha256(file.fileno()) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_holes_are_zeros(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        for at in (5_000_000, 5_100_000, 30_000_001):
            file.seek(at)
            file.write(b"data between holes")
        file.truncate(50_000_003)
    with path.open("rb") as file:
        assert file_sha256(file.fileno()) == hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("wb") as file:
        file.truncate(10_000_000)
    with path.open("rb") as file:
        assert file_sha256(file.fileno()) == hashlib.sha256(bytes(10_000_000)).hexdigest()
