"""One 512-byte tar header, parsed: pure functions over bytes.

Layout (POSIX.1-1988 ustar; GNU and star variants as in GNU tar's manual, "Basic Tar Format"): name 100,
mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8, type 1, linkname 100, magic+version 8, uname 32,
gname 32, devmajor 8, devminor 8, prefix 155, pad 12. Numbers are octal text, or base-256 when the first
byte has its high bit (GNU, star).
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import adler32

from sharedcache.errors import BadArchive

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)

_FIELDS = struct.Struct("100s24s12s12s8sc100s8s64x8s8s155s12x")
_USTAR = b"ustar\x00"
_NUMBERS_KEPT = 4096
_EXTENSIONS = b"xgLK"
_NO_TAR = "the archive is damaged or no tar: copy it again, or make it again with a current tar"
_BLANK_CHECKSUM = 8 * 0x20


class Header(NamedTuple):
    """A header's own words, before pax or GNU records override them."""

    kind: bytes
    path: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_s: int
    link: bytes
    dev_major: bytes
    dev_minor: bytes


def parse_number(field: bytes, what: str, where: str | bytes) -> int:
    """A numeric field: octal text or base-256 (two's complement, may be negative). BadArchive otherwise."""
    digits = field.rstrip(b" \x00").lstrip(b" ")
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:
            raise BadArchive(f"{what} {field!r} is not octal", where=where) from None
    if not digits:
        return 0
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return number - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else number
    raise BadArchive(f"{what} {field!r} is not a number", where=where)


def cut_text(field: bytes, what: str, where: str | bytes) -> bytes:
    """A NUL-padded text field. Bytes behind the first NUL are refused: readers disagree about them."""
    text = field.rstrip(b"\x00")
    if 0 in text:
        raise BadArchive(f"{what} {text[:100]!r} has a NUL byte inside", where=where)
    return text


class HeaderParser:
    """Parses headers; remembers number fields, which repeat from entry to entry."""

    __slots__ = ("_checksums", "_owners")

    def __init__(self) -> None:
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._checksums: dict[bytes, int] = {}

    def parse(self, block: bytes, offset: int) -> Header:
        """`block` is 512 bytes, not all zero; `offset` names it in errors. BadArchive if it is none."""
        name, owner, size, mtime, checksum, kind, link, magic, major, minor, prefix = _FIELDS.unpack(block)
        self._verify(block, checksum, offset)
        path = name.rstrip(b"\x00")
        if 0 in path:
            path = cut_text(name, "name", f"offset {offset}")
        if magic[:6] == _USTAR and prefix[0]:
            if block[508:512] == b"tar\x00":  # star keeps atime and ctime behind a shorter prefix
                prefix = prefix[:131]
            path = cut_text(prefix, "prefix", f"offset {offset}") + b"/" + path
        if kind in _EXTENSIONS:  # of these nothing else counts
            return Header(kind, path, 0, 0, 0, parse_number(size, "size", path), 0, b"", b"", b"")
        mode_uid_gid = self._owners.get(owner) or self._parse_owner(owner, path)
        return Header(
            kind,
            path,
            *mode_uid_gid,
            parse_number(size, "size", path),
            parse_number(mtime, "mtime", path),
            cut_text(link, "link name", path) if link[0] else b"",
            major,
            minor,
        )

    def _parse_owner(self, field: bytes, where: bytes) -> tuple[int, int, int]:
        if len(self._owners) >= _NUMBERS_KEPT:
            self._owners.clear()
        numbers = self._owners[field] = (
            parse_number(field[:8], "mode", where) & 0o7777,
            parse_number(field[8:16], "uid", where),
            parse_number(field[16:], "gid", where),
        )
        return numbers

    def _verify(self, block: bytes, checksum: bytes, offset: int) -> None:
        claimed = self._checksums.get(checksum)
        if claimed is None:
            if len(self._checksums) >= _NUMBERS_KEPT:
                self._checksums.clear()
            try:
                claimed = self._checksums[checksum] = parse_number(checksum, "header checksum", f"offset {offset}")
            except BadArchive as error:
                raise BadArchive(error.what, where=error.where, remedy=_NO_TAR) from None
        # Adler-32's lower half is the sum of all bytes plus one, modulo 65521: the fastest sum that Python has.
        # Headers whose true sum is not below that (names of 0xff bytes) are summed out.
        if adler32(block) & 0xFFFF == claimed - _BLANK_CHECKSUM + sum(checksum) + 1 and claimed > 0:
            return
        total = sum(block) - sum(checksum) + _BLANK_CHECKSUM
        signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if claimed not in (total, signed):  # old Sun tars summed signed chars
            raise BadArchive(
                f"header checksum is {claimed}, its bytes give {total}",
                where=f"offset {offset}",
                remedy=_NO_TAR,
            )
