"""Decompression as a stream, with bounded memory and a bound on how far data may expand.

The format is told by its first bytes: gzip 1f 8b, xz fd 37 7a 58 5a 00, bzip2 "BZh", zstd 28 b5 2f fd (or a
skippable frame 5x 2a 4d 18); anything else passes as it is. Several members or frames after each other are one
stream. Memory: 128 MiB at most for xz and zstd dictionaries, one read piece of output otherwise.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits

_PIECE_BYTES = 1 << 18
_FIRST_PIECE_BYTES = 1 << 12
_MEMORY_BYTES = 128 << 20
_EXPANSION_FROM_BYTES = 256 << 20
_HEAD_BYTES = 6
_REMEDY = "the file is damaged or was cut short: copy or download it again"


class _Inflater(Protocol):
    """One member's decoder: at most `max_bytes` out per call, input kept for the next."""

    def feed(self, data: bytes, max_bytes: int) -> bytes: ...
    @property
    def ended(self) -> bool: ...
    @property
    def rest(self) -> bytes: ...
    @property
    def hungry(self) -> bool: ...


class _Gzip:
    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    def feed(self, data: bytes, max_bytes: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_bytes)

    @property
    def ended(self) -> bool:
        return self._decoder.eof

    @property
    def rest(self) -> bytes:
        return self._decoder.unused_data

    @property
    def hungry(self) -> bool:
        return not self._decoder.unconsumed_tail


class _Buffered:
    """The interface that lzma's and bz2's decoders share."""

    def __init__(self, decoder: lzma.LZMADecompressor | bz2.BZ2Decompressor) -> None:
        self._decoder = decoder

    def feed(self, data: bytes, max_bytes: int) -> bytes:
        return self._decoder.decompress(data, max_bytes)

    @property
    def ended(self) -> bool:
        return self._decoder.eof

    @property
    def rest(self) -> bytes:
        return self._decoder.unused_data

    @property
    def hungry(self) -> bool:
        return self._decoder.needs_input


def _xz() -> _Inflater:
    return _Buffered(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES))


def _bzip2() -> _Inflater:
    return _Buffered(bz2.BZ2Decompressor())


class _Counting(io.RawIOBase):
    """The compressed side: the head that was looked at, then the rest; counts what was read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._head = b""
        while len(self._head) < _HEAD_BYTES and (more := raw.read(_HEAD_BYTES - len(self._head))):
            self._head += more
        self.head = self._head
        self.total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._head[: len(view)] if self._head else self._raw.read(len(view))
        self._head = self._head[len(data) :] if self._head else b""
        view[: len(data)] = data
        self.total += len(data)
        return len(data)


class _Members(io.RawIOBase):
    """Concatenated members as one stream; zero padding after a member is skipped."""

    def __init__(self, raw: _Counting, make: Callable[[], _Inflater]) -> None:
        self._raw = raw
        self._make = make
        self._decoder: _Inflater | None = make()
        self._fetched = self._input = memoryview(b"")  # the last piece read, and what of it is still to be taken
        self._step_bytes = _FIRST_PIECE_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while self._decoder is not None:
            data = b""
            if self._decoder.hungry:
                data = self._take()
                if not data:
                    raise BadArchive("the compressed stream ends too early", remedy=_REMEDY)
            piece = self._decoder.feed(data, len(view))
            if self._decoder.ended:
                self._next_member(len(self._decoder.rest))
            if piece:
                view[: len(piece)] = piece
                return len(piece)
        return 0

    def _take(self) -> bytes:
        """Input for the decoder, little of it where members are small: what a member leaves is copied again."""
        if not self._input:
            self._fetched = memoryview(self._raw.read(_PIECE_BYTES) or b"")
            self._input = self._fetched
        data = bytes(self._input[: self._step_bytes])
        self._input = self._input[len(data) :]
        self._step_bytes = min(2 * self._step_bytes, _PIECE_BYTES)
        return data

    def _next_member(self, n_left: int) -> None:
        """Go on `n_left` bytes before the end of what the decoder was given."""
        self._input = self._fetched[len(self._fetched) - len(self._input) - n_left :]
        self._step_bytes = _FIRST_PIECE_BYTES
        self._decoder = None
        while self._decoder is None:
            if not self._input:
                self._fetched = self._input = memoryview(self._raw.read(_PIECE_BYTES) or b"")
                if not self._input:
                    return
            piece = bytes(self._input[:_FIRST_PIECE_BYTES])
            kept = len(piece.lstrip(b"\0"))
            self._input = self._input[len(piece) - kept :]
            if kept:
                self._decoder = self._make()


class _Bounded(io.RawIOBase):
    """The uncompressed side: translates decoder errors and stops bombs."""

    def __init__(self, inner: Any, raw: _Counting, limits: Limits, name: str) -> None:
        self._inner = inner
        self._raw = raw
        self._limits = limits
        self._name = name
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            n_bytes = int(self._inner.readinto(buffer))
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # bz2's own have none
                raise
            raise BadArchive(f"{self._name} data is damaged: {error}", remedy=_REMEDY) from error
        self._total += n_bytes
        limits = self._limits
        if self._total > limits.total_bytes:
            raise LimitExceeded("total_bytes", allowed=limits.total_bytes, where=f"{self._name} stream")
        if self._total > max(_EXPANSION_FROM_BYTES, limits.expansion * self._raw.total):
            raise LimitExceeded("expansion", allowed=limits.expansion, where=f"{self._name} stream")
        return n_bytes


def open_stream(raw: BinaryIO, limits: Limits | None = None) -> BinaryIO:
    """The uncompressed bytes of `raw` (gzip, xz, bzip2, zstd or plain, told by content), read from where it stands.

    Reading raises BadArchive for damaged or cut-short data and LimitExceeded (total_bytes, expansion) for a
    bomb. Does not close `raw`.
    """
    limits = limits or Limits()
    counted = _Counting(raw)
    head = counted.head
    if head[:2] == b"\x1f\x8b":
        return cast(BinaryIO, _Bounded(_Members(counted, _Gzip), counted, limits, "gzip"))
    if head == b"\xfd7zXZ\x00":
        return cast(BinaryIO, _Bounded(_Members(counted, _xz), counted, limits, "xz"))
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        decoder = zstandard.ZstdDecompressor(max_window_size=_MEMORY_BYTES)
        inner = decoder.stream_reader(cast(BinaryIO, counted), read_size=_PIECE_BYTES, read_across_frames=True)
        return cast(BinaryIO, _Bounded(inner, counted, limits, "zstd"))
    if head[:3] == b"BZh":
        return cast(BinaryIO, _Bounded(_Members(counted, _bzip2), counted, limits, "bzip2"))
    return cast(BinaryIO, _Bounded(counted, counted, limits, "plain"))
