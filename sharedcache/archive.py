"""The outer tar of an image: which members it has and where their bytes are.

Promise: nothing is extracted and no name from the archive ever reaches the host's file system: headers are
scanned for (offset, size) pairs. Memory is bounded: at most MAX_MEMBERS names, an extension record at most
`extension_bytes`.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass

from sharedcache import pax
from sharedcache.errors import BadArchive
from sharedcache.tar_header import BLOCK_BYTES, ZERO_BLOCK, Header, HeaderParser

MAX_MEMBERS = 20_000
# A member below one of these says: this is a root filesystem, not an image that has layers inside.
# fmt: off
_ROOT_NAMES = frozenset((
    "bin", "boot", "dev", "etc", "home", "lib", "lib64", "opt", "proc", "root", "run", "sbin", "srv", "sys",
    "tmp", "usr", "var",
))
# fmt: on


@dataclass(frozen=True)
class Span:
    """Where a member's bytes are in the archive."""

    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Scan:
    """What a tar holds. `is_rootfs` ends the scan early: then the other fields are of no use.

    `links` maps a symbolic or hard link to the name it means, "" when that is outside the archive.
    `odd` is the first name that is absolute or has "..", if any.
    """

    is_rootfs: bool
    spans: dict[str, Span]
    links: dict[str, str]
    odd: str = ""


def clean_name(name: str) -> str | None:
    """`name` without "." and empty components.

    None when it is absolute, has ".." or a NUL, or is not text.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or not name.isprintable():
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def scan(fd: int, size_bytes: int, extension_bytes: int) -> Scan:
    """Reads the headers of the tar in `fd`. BadArchive when they are damaged or lead outside the file.

    A tar with a device, fifo or sparse file, a member below /bin, /usr and the like, or more than MAX_MEMBERS
    members is a root filesystem: it is not scanned further, its converter checks it.
    """
    return _Scanner(fd, size_bytes, extension_bytes).run()


class _Scanner:
    def __init__(self, fd: int, size_bytes: int, extension_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._extension_bytes = extension_bytes
        self._parser = HeaderParser()
        self._spans: dict[str, Span] = {}
        self._links: dict[str, str] = {}
        self._odd = ""

    def run(self) -> Scan:
        offset = members = 0
        long_name = long_link = None  # what extension records said about the next member
        records: dict[bytes, bytes] = {}
        while offset < self._size_bytes:
            block = self._read(offset, BLOCK_BYTES, "header")
            if block == ZERO_BLOCK:
                break
            header = self._parser.parse(block, offset)
            body = offset + BLOCK_BYTES
            if header.kind in b"xgLK":
                data = self._extension(header, body)
                offset = body + _padded(len(data))
                if header.kind == b"x":
                    records = dict(pax.parse_records(data, f"offset {body}"))
                elif header.kind == b"L":
                    long_name = data.rstrip(b"\0")
                elif header.kind == b"K":
                    long_link = data.rstrip(b"\0")
                continue
            name = _text(records.get(b"path", long_name or header.path))
            link = _text(records.get(b"linkpath", long_link or header.link))
            size_bytes = self._member_size(header, records, name)
            members += 1
            if members > MAX_MEMBERS or self._is_of_rootfs(header, name, records):
                return Scan(True, {}, {})
            stored_bytes = size_bytes if header.kind in b"\x0007" else 0
            if stored_bytes > self._size_bytes - body:
                what = f"has {size_bytes} bytes, which the file does not: it is truncated"
                raise BadArchive(what, where=name, remedy="copy the archive again")
            self._keep(header, name, link, Span(body, stored_bytes))
            offset = body + _padded(stored_bytes)
            long_name = long_link = None
            records = {}
        return Scan(False, self._spans, self._links, self._odd)

    def _keep(self, header: Header, name: str, link: str, span: Span) -> None:
        clean = clean_name(name)
        if clean is None:
            self._odd = self._odd or name
            return
        self._spans.pop(clean, None)  # a later member of the same name replaces the earlier one
        self._links.pop(clean, None)
        if header.kind == b"1":
            self._links[clean] = clean_name(link) or ""
        elif header.kind == b"2":
            target = posixpath.normpath(posixpath.join(posixpath.dirname(clean), link))  # text, no file
            self._links[clean] = clean_name(target) or ""
        elif header.kind != b"5":
            self._spans[clean] = span

    def _is_of_rootfs(self, header: Header, name: str, records: dict[bytes, bytes]) -> bool:
        top = name.removeprefix("./").lstrip("/").split("/", 1)[0]
        sparse = any(key.startswith(b"GNU.sparse.") for key in records)
        return top in _ROOT_NAMES or sparse or header.kind not in b"\x00012567"

    def _member_size(self, header: Header, records: dict[bytes, bytes], name: str) -> int:
        size_bytes = header.size
        if b"size" in records:
            size_bytes = pax.parse_size(records[b"size"], "size", name)
        if size_bytes < 0:
            raise BadArchive(f"has the size {size_bytes}", where=name)
        return size_bytes

    def _extension(self, header: Header, offset: int) -> bytes:
        if not 0 <= header.size <= self._extension_bytes:
            what = f"an extension record of {header.size} bytes; at most {self._extension_bytes} are allowed"
            raise BadArchive(what, where=f"offset {offset}")
        return self._read(offset, header.size, "extension record")

    def _read(self, offset: int, n_bytes: int, what: str) -> bytes:
        data = os.pread(self._fd, n_bytes, offset)
        if len(data) < n_bytes:
            raise BadArchive(
                f"the file ends inside a {what}: it is truncated or is not a tar",
                where=f"offset {offset}",
                remedy="copy the archive again, or make it again with a current tar",
            )
        return data


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
