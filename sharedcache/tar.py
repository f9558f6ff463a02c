"""A streaming tar reader: a byte stream in, `Entry` values and their data out, once, in order.

Reads v7, ustar, pax (local and global headers), GNU (long names, old and new sparse) and star. Names and
values stay bytes. It promises: bounded memory whatever the input; every entry fully validated when it is
yielded; BadArchive or LimitExceeded that names the entry otherwise. Paths are not interpreted here
(`tree` does that), apart from NUL bytes and length.

The size field of links, folders, devices and fifos is ignored and no data is skipped for them, as Go's
archive/tar does; a pax size, path or linkpath in a *global* header is refused.
"""

from __future__ import annotations

from sharedcache import pax, sparse
from sharedcache.acl import check_acl, encode_acl
from sharedcache.entry import BLOCK, CHARACTER, DIRECTORY, FIFO, HARDLINK, REGULAR, SYMLINK, Entry, Xattrs
from sharedcache.errors import BadArchive, LimitExceeded, printable
from sharedcache.limits import Limits
from sharedcache.stream import HashingInput
from sharedcache.tar_header import BLOCK_BYTES, ZERO_BLOCK, Header, HeaderParser, cut_text, parse_number

_KINDS = {
    b"0": REGULAR, b"\x00": REGULAR, b"7": REGULAR, b"S": REGULAR, b"1": HARDLINK, b"2": SYMLINK,
    b"3": CHARACTER, b"4": BLOCK, b"5": DIRECTORY, b"6": FIFO,
}  # fmt: skip
_EXTENSIONS = frozenset((b"x", b"g", b"L", b"K", b"X", b"V"))
_OVERLAY_PREFIXES = (b"trusted.overlay.", b"user.overlay.")
# What Linux file systems store. Docker, too, leaves out what the kernel refuses (macOS' com.apple.*, for one).
_NAMESPACES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")
_TRUNCATED = "the archive was cut short: copy it again"
_LAST_ID = 0xFFFF_FFFE  # -1 means "nobody" to the kernel and "leave it" to chown


class TarReader:
    """Iterate for entries; between two, `chunk()` hands out the current one's data in order."""

    def __init__(self, stream: HashingInput, limits: Limits, end_mark: bool = True) -> None:
        """Without `end_mark` the stream may end after an entry's data."""
        self.limits = self._limits = limits
        self._stream = stream
        self._end_mark = end_mark
        self._headers = HeaderParser()
        self._globals: dict[bytes, bytes] = {}
        self._left = 0  # data bytes of the current entry not handed out yet
        self._pad = 0
        self._entry_count = 0
        self._path = b""

    def __iter__(self) -> TarReader:
        return self

    def __next__(self) -> Entry:
        """The next entry; what is left of the previous one's data is skipped."""
        if self._left and not self._stream.skip(self._left):
            raise self._cut_off()
        if self._pad and not self._stream.skip(self._pad) and self._end_mark:
            raise self._cut_off()
        self._left = self._pad = 0
        block = self._next_block()
        if block is None:
            raise StopIteration
        header = self._headers.parse(block, self._stream.offset() - BLOCK_BYTES)
        records: list[tuple[bytes, bytes]] = []
        budget = self._limits.extension_bytes
        while header.kind in _EXTENSIONS:
            budget -= header.size
            if header.size < 0 or budget < 0:
                allowed = self._limits.extension_bytes
                raise LimitExceeded("extension_bytes", allowed=allowed, where=header.path)
            self._read_extension(header, records)
            block = self._next_block()
            if block is None:
                what = "the archive ends after an extended header, before its entry"
                raise BadArchive(what, where=f"offset {self._stream.offset()}", remedy=_TRUNCATED)
            header = self._headers.parse(block, self._stream.offset() - BLOCK_BYTES)
        self._entry_count += 1
        if self._entry_count > self._limits.entries:
            raise LimitExceeded("entries", allowed=self._limits.entries, where=header.path)
        if records or self._globals or header.kind == b"S":
            return self._build_extended(header, block, records)
        return self._build(header, header.path, header.link, header.size, (header.mtime_s, 0), (), None)

    def chunk(self, limit_bytes: int) -> memoryview:
        """The next 1..`limit_bytes` bytes of the current entry's data, as many as are at hand; valid until
        the next call. `limit_bytes` never goes beyond the entry's size."""
        stream = self._stream
        pos = stream.pos
        have = stream.end - pos
        if not have:
            if not stream.need(1):
                raise self._cut_off()
            pos = stream.pos
            have = stream.end - pos
        n_bytes = limit_bytes if limit_bytes < have else have
        stream.pos = pos + n_bytes
        self._left -= n_bytes
        return stream.view[pos : pos + n_bytes]

    # ── headers ──

    def _next_block(self) -> bytes | None:
        """The next header block, or None at the end-of-archive mark (one zero block, then another or EOF)."""
        stream = self._stream
        if stream.end - stream.pos < BLOCK_BYTES and not stream.need(BLOCK_BYTES):
            if not self._end_mark and stream.end == stream.pos:
                return None
            what = "ends inside a header" if stream.end - stream.pos else "has no end-of-archive mark"
            raise BadArchive(f"the archive {what}", where=f"offset {stream.offset()}", remedy=_TRUNCATED)
        pos = stream.pos
        block = bytes(stream.view[pos : pos + BLOCK_BYTES])
        stream.pos = pos + BLOCK_BYTES
        if block != ZERO_BLOCK:
            return block
        if stream.need(BLOCK_BYTES) and stream.view[stream.pos : stream.pos + BLOCK_BYTES] != ZERO_BLOCK:
            raise BadArchive("a lone zero block between entries", where=f"offset {stream.offset()}")
        return None

    def _read_extension(self, header: Header, records: list[tuple[bytes, bytes]]) -> None:
        if header.kind == b"V":  # a volume label is no member
            return
        body = self._take(header.size, header.path)
        if header.kind in (b"L", b"K"):
            text = cut_text(body, "GNU long name", body[:100])
            records.insert(0, (b"path" if header.kind == b"L" else b"linkpath", text))
            return
        parsed = pax.parse_records(body, header.path)
        if header.kind != b"g":
            records.extend(parsed)
            return
        for key, value in parsed:
            if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
                raise BadArchive(f"global pax header sets {printable(key)} for every entry", where=header.path)
            self._globals[key] = value
        if sum(len(key) + len(value) for key, value in self._globals.items()) > self._limits.extension_bytes:
            raise LimitExceeded("extension_bytes", allowed=self._limits.extension_bytes, where="global pax header")

    def _take(self, n_bytes: int, where: str | bytes) -> bytes:
        """`n_bytes` of data and its padding, copied out (they may be more than the window holds)."""
        padded = -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES
        parts = []
        while padded:
            if not self._stream.need(1):
                raise BadArchive("the archive ends inside this extended header", where=where, remedy=_TRUNCATED)
            stream = self._stream
            step = min(padded, stream.end - stream.pos)
            parts.append(bytes(stream.view[stream.pos : stream.pos + step]))
            stream.pos += step
            padded -= step
        return b"".join(parts)[:n_bytes]

    # ── entries ──

    def _build_extended(self, header: Header, block: bytes, records: list[tuple[bytes, bytes]]) -> Entry:
        merged = {**self._globals, **dict(records)}
        where = merged.get(b"path") or header.path
        path = merged.get(b"GNU.sparse.name") or merged.get(b"path") or header.path
        link = merged.get(b"linkpath") or header.link
        if 0 in path or 0 in link:
            raise BadArchive("a name has a NUL byte inside", where=where)
        size = pax.parse_size(merged[b"size"], "size", where) if merged.get(b"size") else header.size
        mtime = pax.parse_time(merged[b"mtime"], where) if merged.get(b"mtime") else (header.mtime_s, 0)
        if merged.get(b"uid"):
            header = header._replace(uid=pax.parse_size(merged[b"uid"], "uid", where))
        if merged.get(b"gid"):
            header = header._replace(gid=pax.parse_size(merged[b"gid"], "gid", where))
        xattrs = self._collect_xattrs(merged, where)
        holes = self._sparse_map(header, block, size, records, where)
        return self._build(header, path, link, size, mtime, xattrs, holes)

    def _build(
        self, header: Header, path: bytes, link: bytes, size: int, mtime: tuple[int, int],
        xattrs: Xattrs, holes: sparse.SparseMap | None,
    ) -> Entry:  # fmt: skip
        kind = _KINDS.get(header.kind)
        if kind is None:
            raise BadArchive(
                f"entry type {header.kind!r} is not a file, folder, link, device or fifo",
                where=path,
                remedy="multi-volume and dump archives are not images: make a plain tar",
            )
        self._path = path
        if kind == REGULAR:
            if size < 0:
                raise BadArchive(f"size {size} is negative", where=path)
            apparent = holes.size if holes is not None else size
            if apparent > self._limits.file_bytes or size > self._limits.file_bytes:
                raise LimitExceeded("file_bytes", allowed=self._limits.file_bytes, where=path)
            if path.endswith(b"/") and header.kind in (b"0", b"\x00"):  # v7 tar marks folders by name only
                kind = DIRECTORY
                if size:
                    raise BadArchive("a folder with data", where=path)
            stored = sum(length for _, length in holes.extents) if holes is not None else size
            self._left, self._pad = stored, -stored % BLOCK_BYTES
            size = stored
        else:
            size = 0
        if not (0 <= header.uid <= _LAST_ID and 0 <= header.gid <= _LAST_ID):
            raise BadArchive(f"owner {header.uid}:{header.gid} is not within 0..{_LAST_ID}", where=path)
        if not -(1 << 63) <= mtime[0] < 1 << 63:
            raise BadArchive(f"mtime {mtime[0]} does not fit 64 bits", where=path)
        device = self._device(header, path) if kind in (CHARACTER, BLOCK) else (0, 0)
        return Entry(kind, path, header.mode, header.uid, header.gid, *mtime, size, link, device, xattrs, holes)

    def _device(self, header: Header, path: bytes) -> tuple[int, int]:
        major = parse_number(header.dev_major, "device major", path)
        minor = parse_number(header.dev_minor, "device minor", path)
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise BadArchive(f"device {major}:{minor} is not a Linux device number", where=path)
        return major, minor

    def _collect_xattrs(self, merged: dict[bytes, bytes], where: str | bytes) -> Xattrs:
        """Extended attributes by name. overlayfs's own are dropped: they direct a mount.

        A POSIX ACL is checked whichever way it came: the kernel would refuse the whole file with a bad one.
        """
        found: dict[bytes, bytes] = {}
        for key, value in merged.items():
            if key.startswith(pax.XATTR_PREFIX):
                name = key[len(pax.XATTR_PREFIX) :]
                if name.startswith(_NAMESPACES) and not name.startswith(_OVERLAY_PREFIXES):
                    found[name] = value
        for key, name in ((b"access", b"system.posix_acl_access"), (b"default", b"system.posix_acl_default")):
            text = merged.get(b"SCHILY.acl." + key)
            if name in found:
                check_acl(found[name], where)
            elif text:
                found[name] = encode_acl(text, where)
        if not found:
            return ()
        if sum(len(name) + len(value) for name, value in found.items()) > self._limits.xattr_bytes:
            raise LimitExceeded("xattr_bytes", allowed=self._limits.xattr_bytes, where=where)
        return tuple(sorted(found.items()))

    # ── sparse ──

    def _sparse_map(
        self, header: Header, block: bytes, size: int, records: list[tuple[bytes, bytes]], where: bytes
    ) -> sparse.SparseMap | None:
        if header.kind == b"S":
            return self._old_gnu_map(block, size, where)
        keys = {key: value for key, value in records if key.startswith(b"GNU.sparse.")}
        if not keys:
            return None
        if _KINDS.get(header.kind) != REGULAR:
            raise BadArchive("sparse map on something that is not a file", where=where)
        real = pax.parse_size(
            keys.get(b"GNU.sparse.realsize") or keys.get(b"GNU.sparse.size", b""), "sparse size", where
        )
        if keys.get(b"GNU.sparse.major", b"0") == b"1":
            runs, used = self._take_map(size, where)
            return sparse.make_map(real, runs, size - used, self._limits, where)
        if b"GNU.sparse.map" in keys:
            numbers = [text for text in keys[b"GNU.sparse.map"].split(b",") if text]
        else:
            numbers = [value for key, value in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        return sparse.make_map(real, sparse.parse_pairs(numbers, where), size, self._limits, where)

    def _old_gnu_map(self, block: bytes, size: int, where: str | bytes) -> sparse.SparseMap:
        runs = sparse.parse_gnu_runs(block, 386, 4, where)
        real = parse_number(block[483:495], "sparse size", where)
        more = block[482] != 0
        while more:
            block = self._take(BLOCK_BYTES, where)
            runs.extend(sparse.parse_gnu_runs(block, 0, 21, where))
            more = block[504] != 0
            if len(runs) > self._limits.sparse_extents or (more and not block[0]):
                raise LimitExceeded("sparse_extents", allowed=self._limits.sparse_extents, where=where)
        return sparse.make_map(real, runs, size, self._limits, where)

    def _take_map(self, size: int, where: str | bytes) -> tuple[list[tuple[int, int]], int]:
        """The 1.0 map in front of the data: decimal lines (count, then pairs). Returns runs, bytes used."""
        text = bytearray()
        lines, needed = 0, 1
        while lines < needed:
            if len(text) + BLOCK_BYTES > min(size, self._limits.extension_bytes):
                raise BadArchive("sparse map does not end within the file's data", where=where)
            text += self._take(BLOCK_BYTES, where)
            lines += text.count(b"\n", len(text) - BLOCK_BYTES)
            if needed == 1 and lines:
                count = pax.parse_size(bytes(text.partition(b"\n")[0]), "sparse run count", where)
                if count > self._limits.sparse_extents:
                    raise LimitExceeded("sparse_extents", allowed=self._limits.sparse_extents, where=where)
                needed = 1 + 2 * count
        return sparse.parse_pairs(bytes(text).split(b"\n")[1:needed], where), len(text)

    def _cut_off(self) -> BadArchive:
        return BadArchive("the archive ends inside this entry's data", where=self._path, remedy=_TRUNCATED)
