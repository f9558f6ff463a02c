"""Decompression as a stream, with bounded memory and a bound on how far data may expand.

The format is told by its first bytes: gzip 1f 8b, xz fd 37 7a 58 5a 00, zstd 28 b5 2f fd (or a skippable
frame 5x 2a 4d 18); anything else passes as it is. Several members or frames after each other are one stream.
Memory: 128 MiB at most for xz and zstd dictionaries, one read piece of output otherwise.
"""

from __future__ import annotations

import io
import lzma
import zlib
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits

_PIECE_BYTES = 1 << 18
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


class _Xz:
    def __init__(self) -> None:
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)

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
    """Concatenated gzip or xz members as one stream; zero padding after a member is skipped."""

    def __init__(self, raw: _Counting, make: type[_Gzip] | type[_Xz]) -> None:
        self._raw = raw
        self._make = make
        self._decoder: _Inflater | None = make()
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while self._decoder is not None:
            if not self._input and self._decoder.hungry:
                self._input = self._raw.read(_PIECE_BYTES) or b""
                if not self._input:
                    raise BadArchive("the compressed stream ends too early", where="", remedy=_REMEDY)
            data, self._input = self._input, b""
            piece = self._decoder.feed(data, len(view))
            if self._decoder.ended:
                self._next_member(self._decoder.rest)
            if piece:
                view[: len(piece)] = piece
                return len(piece)
        return 0

    def _next_member(self, rest: bytes) -> None:
        rest = rest.lstrip(b"\0")
        while not rest and (more := self._raw.read(_PIECE_BYTES)):
            rest = more.lstrip(b"\0")
        self._input = rest
        self._decoder = self._make() if rest else None


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
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
            raise BadArchive(f"{self._name} data is damaged: {error}", remedy=_REMEDY) from error
        self._total += n_bytes
        limits = self._limits
        if self._total > limits.total_bytes:
            raise LimitExceeded("total_bytes", allowed=limits.total_bytes, where=f"{self._name} stream")
        if self._total > max(_EXPANSION_FROM_BYTES, limits.expansion * self._raw.total):
            raise LimitExceeded("expansion", allowed=limits.expansion, where=f"{self._name} stream")
        return n_bytes


def open_stream(raw: BinaryIO, limits: Limits | None = None) -> BinaryIO:
    """The uncompressed bytes of `raw` (gzip, xz, zstd or plain, told by content), read from where it stands.

    Reading raises BadArchive for damaged or cut-short data and LimitExceeded (total_bytes, expansion) for a
    bomb; opening raises BadArchive for bzip2, which images do not use. Does not close `raw`.
    """
    limits = limits or Limits()
    counted = _Counting(raw)
    head = counted.head
    if head[:2] == b"\x1f\x8b":
        return cast(BinaryIO, _Bounded(_Members(counted, _Gzip), counted, limits, "gzip"))
    if head == b"\xfd7zXZ\x00":
        return cast(BinaryIO, _Bounded(_Members(counted, _Xz), counted, limits, "xz"))
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        decoder = zstandard.ZstdDecompressor(max_window_size=_MEMORY_BYTES)
        inner = decoder.stream_reader(
            cast(BinaryIO, counted), read_size=_PIECE_BYTES, read_across_frames=True
        )
        return cast(BinaryIO, _Bounded(inner, counted, limits, "zstd"))
    if head[:3] == b"BZh":
        raise BadArchive("bzip2 is not supported", remedy="unpack it with bunzip2, or use gzip, xz or zstd")
    return cast(BinaryIO, _Bounded(counted, counted, limits, "plain"))
