"""One 512-byte tar header, parsed: pure functions over bytes.

Layout (POSIX.1-1988 ustar; GNU and star variants as in GNU tar's manual, "Basic Tar Format"): name 100,
mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8, type 1, linkname 100, magic+version 8, uname 32,
gname 32, devmajor 8, devminor 8, prefix 155, pad 12. Numbers are octal text, or base-256 when the first
byte has its high bit (GNU, star).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from sharedcache.errors import BadArchive

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)

_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_USTAR = b"ustar\x00"
_EVEN_BYTES = int.from_bytes(b"\xff\x00" * 256, "little")
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


def parse_number(field: bytes, what: str, where: str) -> int:
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


def cut_text(field: bytes, what: str, where: str) -> bytes:
    """A NUL-padded text field. Bytes behind the first NUL are refused: readers disagree about them."""
    text = field.rstrip(b"\x00")
    if 0 in text:
        raise BadArchive(f"{what} {text!r} has a NUL byte inside", where=where)
    return text


class HeaderParser:
    """Parses headers; remembers short number fields, which repeat from entry to entry."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def parse(self, block: bytes, offset: int) -> Header:
        """`block` is 512 bytes, not all zero; `offset` names it in errors. BadArchive if it is none."""
        (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, major, minor, prefix) = (
            _FIELDS.unpack(block)
        )
        self._verify(block, checksum, offset)
        path = name.rstrip(b"\x00")
        if 0 in path:
            path = cut_text(name, "name", f"offset {offset}")
        if magic[:6] == _USTAR and prefix[0]:
            if block[508:512] == b"tar\x00":  # star keeps atime and ctime behind a shorter prefix
                prefix = prefix[:131]
            path = cut_text(prefix, "prefix", f"offset {offset}") + b"/" + path
        where = path.decode("utf-8", "backslashreplace")
        size_text = size.rstrip(b" \x00")
        return Header(
            kind,
            path,
            self._small(mode, "mode", where) & 0o7777,
            self._small(uid, "uid", where),
            self._small(gid, "gid", where),
            int(size_text, 8)
            if size_text.isdigit() and b"8" not in size_text and b"9" not in size_text
            else parse_number(size, "size", where),
            parse_number(mtime, "mtime", where),
            cut_text(link, "link name", where) if link[0] else b"",
            major,
            minor,
        )

    def _small(self, field: bytes, what: str, where: str) -> int:
        number = self._numbers.get(field)
        if number is None:
            number = parse_number(field, what, where)
            if len(self._numbers) > 4096:
                self._numbers.clear()
            self._numbers[field] = number
        return number

    def _verify(self, block: bytes, checksum: bytes, offset: int) -> None:
        # The sum of 512 bytes by wide arithmetic: bytes are added into 16-bit lanes, and a number modulo
        # 65535 is the sum of its 16-bit digits. A sum differing by exactly 65535 is told apart below.
        number = int.from_bytes(block, "little")
        lanes = (number & _EVEN_BYTES) + ((number >> 8) & _EVEN_BYTES)
        claimed = self._small(checksum, "checksum", f"offset {offset}")
        if (lanes - sum(checksum) + _BLANK_CHECKSUM - claimed) % 65535 == 0 and 0 < claimed < 65535:
            return
        if claimed == sum(block) - sum(checksum) + _BLANK_CHECKSUM:
            return
        signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])
        if claimed == signed + _BLANK_CHECKSUM:  # old Sun tars summed signed chars
            return
        raise BadArchive(
            f"header checksum is {claimed}, its bytes give {sum(block) - sum(checksum) + _BLANK_CHECKSUM}",
            where=f"offset {offset}",
            remedy="the archive is damaged or no tar: copy it again, or make it again with a current tar",
        )
