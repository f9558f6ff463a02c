"""POSIX ACLs from tar's text form to the kernel's xattr form (linux/posix_acl_xattr.h): pure.

GNU tar and star write `SCHILY.acl.access=user::rwx,user:joe:r-x:1000,group::r-x,mask::r-x,other::r-x`. The
kernel wants a 4-byte version (2), then per entry u16 tag, u16 permissions, u32 id, sorted by tag and id.
Names cannot be looked up (the host's users are not the image's), so an entry needs a number: as the name,
or as star's fourth field.
"""

from __future__ import annotations

import struct

from sharedcache.errors import BadArchive

_ENTRY = struct.Struct("<HHI")
_VERSION = b"\x02\x00\x00\x00"
_REQUIRED = (0x01, 0x04, 0x20)  # the owner, the group, the others
_NAMED = {0x02, 0x08}  # further users and groups: these need a mask
_MASK = 0x10
_NO_ID = 0xFFFF_FFFF
_TAGS = {  # (kind, is an id named) → tag
    (b"user", False): 0x01,
    (b"user", True): 0x02,
    (b"group", False): 0x04,
    (b"group", True): 0x08,
    (b"mask", False): 0x10,
    (b"other", False): 0x20,
}
_SHORT = {b"u": b"user", b"g": b"group", b"m": b"mask", b"o": b"other"}


def encode_acl(text: bytes, where: str | bytes) -> bytes:
    """The xattr value for an ACL text. BadArchive for a line that is none, or a name without a number."""
    entries = []
    for raw in text.replace(b"\n", b",").split(b","):
        line = raw.partition(b"#")[0].strip()
        if line:
            entries.append(_parse_entry(line, where))
    value = _VERSION + b"".join(_ENTRY.pack(*entry) for entry in sorted(entries, key=lambda e: (e[0], e[2])))
    check_acl(value, where)
    return value


def check_acl(value: bytes, where: str | bytes) -> None:
    """BadArchive unless `value` is an ACL in xattr form whose entries are known, sorted and complete."""
    entries = list(_ENTRY.iter_unpack(value[4:])) if len(value) % _ENTRY.size == 4 else []
    if value == _VERSION:  # no entry at all: as good as no ACL
        return
    tags = [tag for tag, _, _ in entries]
    sound = (
        value[:4] == _VERSION
        and entries == sorted(entries, key=lambda e: (e[0], e[2]))
        and set(tags) <= set(_TAGS.values())
        and all(permissions < 8 for _, permissions, _ in entries)
        and all(tags.count(tag) == 1 for tag in _REQUIRED)
        and tags.count(_MASK) == (1 if _NAMED & set(tags) else min(tags.count(_MASK), 1))
    )
    if not sound:
        raise BadArchive(
            "its POSIX ACL is not one that Linux accepts", where=where, remedy="set the ACL again, or leave it out"
        )


def _parse_entry(line: bytes, where: str | bytes) -> tuple[int, int, int]:
    parts = [part.strip() for part in line.split(b":")]
    if len(parts) not in (3, 4):
        raise BadArchive(f"ACL entry {line[:60]!r} is not kind:id:permissions", where=where)
    kind = _SHORT.get(parts[0], parts[0])
    tag = _TAGS.get((kind, bool(parts[1])))
    if tag is None or len(parts[2]) != 3 or any(c not in (w, 0x2D) for c, w in zip(parts[2], b"rwx", strict=True)):
        raise BadArchive(f"ACL entry {line[:60]!r} is not kind:id:permissions", where=where)
    permissions = sum(bit for c, bit in zip(parts[2], (4, 2, 1), strict=True) if c != 0x2D)
    if not parts[1]:
        return tag, permissions, _NO_ID
    number = parts[3] if len(parts) == 4 else parts[1]
    if not number.isdigit() or int(number) >= _NO_ID:
        raise BadArchive(
            f"ACL entry {line[:60]!r} names its {kind.decode()} without a number",
            where=where,
            remedy="store ACLs with numeric ids (tar --numeric-owner) or as xattrs (tar --xattrs)",
        )
    return tag, permissions, int(number)
