"""pax extended headers (POSIX.1-2001): pure parsing of `LENGTH KEY=VALUE\\n` records.

Keys that mean something here: path, linkpath, size, uid, gid, mtime, SCHILY.xattr.* (the attribute's raw
bytes), SCHILY.acl.access and SCHILY.acl.default (text), GNU.sparse.*. Others (atime, ctime, comment, uname,
charset, vendor keys) change nothing in an image and are left out.
"""

from __future__ import annotations

from sharedcache.errors import BadArchive

XATTR_PREFIX = b"SCHILY.xattr."
_INT64 = 1 << 63


def parse_records(body: bytes, where: str | bytes) -> list[tuple[bytes, bytes]]:
    """The records in order, duplicates included. BadArchive when a record's length does not fit."""
    records: list[tuple[bytes, bytes]] = []
    pos = 0
    end = len(body)
    while pos < end:
        if not body[pos]:  # some writers pad with NULs
            if body.count(0, pos) == end - pos:
                break
            raise BadArchive("pax header has a NUL where a record starts", where=where)
        space = body.find(b" ", pos, pos + 20)
        digits = body[pos:space] if space > 0 else b""
        if not digits.isdigit():
            raise BadArchive("pax record has no length", where=where)
        stop = pos + int(digits)
        equals = body.find(b"=", space + 1, stop)
        if stop > end or equals <= space + 1 or body[stop - 1] != 0x0A:
            raise BadArchive("pax record's length does not match its text", where=where)
        records.append((body[space + 1 : equals], body[equals + 1 : stop - 1]))
        pos = stop
    return records


def parse_size(text: bytes, what: str, where: str | bytes) -> int:
    """A non-negative decimal. BadArchive otherwise."""
    if not text.isdigit() or len(text) > 20:
        raise BadArchive(f"{what} {text[:40]!r} is not a size", where=where)
    return int(text)


def parse_time(text: bytes, where: str | bytes) -> tuple[int, int]:
    """`[-]SECONDS[.FRACTION]` → (seconds rounded down, nanoseconds 0..999999999)."""
    whole, _, fraction = text.partition(b".")
    negative = whole.startswith(b"-")
    digits = whole[1:] if negative else whole
    if not digits.isdigit() or len(digits) > 20 or (fraction and not fraction.isdigit()):
        raise BadArchive(f"mtime {text[:40]!r} is not a time", where=where)
    seconds, nanos = int(digits), int(fraction[:9].ljust(9, b"0")) if fraction else 0
    if negative:
        seconds, nanos = (-seconds - 1, 1_000_000_000 - nanos) if nanos else (-seconds, 0)
    if not -_INT64 <= seconds < _INT64:
        raise BadArchive(f"mtime {text[:40]!r} does not fit 64 bits", where=where)
    return seconds, nanos
