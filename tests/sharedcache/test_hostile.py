"""Hostile tars: a clear error, nothing published, nothing outside the store touched, nothing left in staging."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedcache.convert import convert_layer
from sharedcache.errors import BadArchive, CacheError, LimitExceeded
from sharedcache.limits import Limits
from sharedcache.oci import import_archive
from sharedcache.store import Store
from tests.sharedcache.storekit import ACME, tree
from tests.sharedcache.tarkit import END, convert, header, make_tar, padded, pax_header, pax_record, raw_header

DIR = {"kind": tarfile.DIRTYPE}


def link(name: str, target: str) -> tarfile.TarInfo:
    return header(name, kind=tarfile.SYMTYPE, linkname=target)


def hard(name: str, target: str) -> tarfile.TarInfo:
    return header(name, kind=tarfile.LNKTYPE, linkname=target)


def sized(size: bytes, **fields: bytes) -> bytes:
    return raw_header(b"f", size=size, **fields) + END


def pax(*records: tuple[bytes, bytes], body: bytes = b"") -> bytes:
    return pax_header(b"".join(pax_record(*record) for record in records)) + raw_header(b"f") + body + END


SPARSE_1 = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"1000000"))


def sparse_1(text: bytes, data: bytes = b"", real: bytes = b"1000000") -> bytes:
    """A member in GNU sparse format 1.0 whose map is `text`."""
    body = padded(text) + data
    records = b"".join(pax_record(*record) for record in SPARSE_1[:2]) + pax_record(b"GNU.sparse.realsize", real)
    return pax_header(records) + raw_header(b"f", size=b"%011o\0" % len(body)) + padded(body) + END


def old_sparse(*runs: tuple[int, int], real: int, stored: int, more: bytes = b"\0") -> bytes:
    """An old GNU sparse header."""
    cells = b"".join(b"%011o\0%011o\0" % run for run in runs).ljust(96, b"\0")
    tail = bytes(41) + cells + more + b"%011o\0" % real  # from `prefix` on: 345
    block = raw_header(b"f", kind=b"S", magic=b"ustar  \0", size=b"%011o\0" % stored, prefix=tail[:155], pad=tail[155:])
    return block + padded(b"d" * stored) + END


MALFORMED: dict[str, tuple[bytes, str]] = {
    # paths
    "dotdot": (make_tar(header("a/../../etc/passwd")), r"^a/\.\./\.\./etc/passwd: .*'\.\.'.*do not trust"),
    "dotdot last": (make_tar(header("a/..")), r"'\.\.'"),
    "dotdot folder": (make_tar(header("..", **DIR)), r"^\.\./: .*'\.\.'"),
    "dotdot in pax": (pax((b"path", b"x/../y")), r"'\.\.'"),
    "dotdot in GNU name": (raw_header(b"@", kind=b"L", size=b"5") + padded(b"../x\0") + raw_header() + END, r"'\.\.'"),
    "through a link": (make_tar(link("l", "/etc"), header("l/passwd")), r"^l/passwd: .*'l', a symbolic link.*store"),
    "through a link, folder": (make_tar(link("a", "b"), header("a/b/c", **DIR)), r"'a', a symbolic link"),
    "through a file": (make_tar(header("f"), header("f/x")), r"'f', a file"),
    "through a hard link": (make_tar(link("l", "/"), hard("h", "l"), header("h/x")), r"'h', a symbolic link"),
    "through a whiteout's own name": (make_tar(header(".wh.a/b")), r"whiteout marker, not a folder"),
    "through a device": (make_tar(header("d", kind=tarfile.CHRTYPE), header("d/x")), r"'d', a file"),
    "root is a file": (make_tar(header(".")), r"root is not a folder"),
    "root is a link": (make_tar(link("./", "/")), r"root is not a folder"),
    "no name": (raw_header(b"") + END, r"root is not a folder"),
    "whiteout of nothing": (make_tar(header("a/.wh.")), r"^a/\.wh\.: whiteout of no name"),
    "whiteout of dotdot": (make_tar(header(".wh...")), r"whiteout of no name"),
    "whiteout folder": (make_tar(header(".wh.x", **DIR)), r"marker that is a folder"),
    "NUL in name": (raw_header(b"a\0b") + END, r"^offset 0: name .*NUL"),
    "NUL in prefix": (raw_header(b"a", prefix=b"p\0q") + END, r"prefix .*NUL"),
    "NUL in link": (raw_header(b"a", kind=b"2", link=b"t\0u") + END, r"link name .*NUL"),
    "NUL in pax name": (pax((b"path", b"a\0b")), r"NUL"),
    "NUL in pax link": (pax((b"linkpath", b"a\0b")), r"NUL"),
    # links
    "hard link out": (make_tar(hard("h", "../../etc/shadow")), r"'\.\.'"),
    "hard link to nothing": (make_tar(hard("h", "nothing")), r"^h: hard link to 'nothing', which is not in this layer"),
    "hard link to a later one": (make_tar(hard("h", "f"), header("f")), r"not in this layer before it"),
    "hard link through a link": (make_tar(header("d/f"), link("l", "d"), hard("h", "l/f")), r"not in this layer"),
    "hard link to a folder": (make_tar(header("d", **DIR), hard("h", "d")), r"to the folder 'd'"),
    "hard link to the root": (make_tar(hard("h", "/")), r"to the folder"),
    "hard link to a whiteout": (make_tar(header(".wh.f"), hard("h", "f")), r"not in this layer"),
    "hard link to itself": (make_tar(header("f"), hard("f", "f")), r"itself"),
    "link to nothing": (raw_header(b"l", kind=b"2") + END, r"^l: symbolic link without a target"),
    # numbers
    "negative size": (sized(b"\xff" * 12), r"^f: size -1 is negative"),
    "huge size": (sized(b"\x80" + b"\x7f" * 11), r"^f: over the limit file_bytes"),
    "size of 8 EiB": (sized(b"\x80\0\0\0\x7f" + b"\xff" * 7), r"^f: over the limit file_bytes"),
    "size no octal": (sized(b"0000000009\0"), r"not octal"),
    "size with a sign": (sized(b"-0000000001\0"), r"not a number"),
    "size is hex": (sized(b"0x10\0"), r"not a number"),
    "pax size negative": (pax((b"size", b"-1")), r"'-1' is not a size"),
    "pax size overlong": (pax((b"size", b"9" * 400)), r"is not a size"),
    "pax size over": (pax((b"size", b"99999999999999999999")), r"file_bytes"),
    "pax uid": (pax((b"uid", b"4294967295")), r"owner 4294967295:0 is not within"),
    "uid of -1": (raw_header(b"f", uid=b"\xff" * 8) + END, r"owner -1:0"),
    "gid too large": (raw_header(b"f", gid=b"\x80\0\0\x01\0\0\0\0") + END, r"owner 0:4294967296"),
    "device too large": (raw_header(b"f", kind=b"3", major=b"0010000\0") + END, r"^f: device 4096:0"),
    "device negative": (raw_header(b"f", kind=b"4", minor=b"\xff" * 8) + END, r"device 0:-1"),
    "mtime nonsense": (pax((b"mtime", b"yesterday")), r"'yesterday' is not a time"),
    "mtime infinite": (pax((b"mtime", b"inf")), r"is not a time"),
    "mtime exponent": (pax((b"mtime", b"1e300")), r"is not a time"),
    "mtime over": (pax((b"mtime", b"99999999999999999999")), r"does not fit"),
    "mtime base-256": (raw_header(b"f", mtime=b"\x80" + b"\x7f" * 11) + END, r"does not fit 64 bits"),
    "checksum": (raw_header(b"f", checksum=b"0001234\0") + END, r"^offset 0: header checksum is 668.*copy it again"),
    "checksum no number": (raw_header(b"f", checksum=b"zzzzzz\0 ") + END, r"^offset 0: header checksum b'zzzzzz"),
    "second header": (raw_header(b"a") + b"\1" * 512 + END, r"^offset 512: "),
    # extension records
    "pax without length": (pax_header(b"path=x\n") + raw_header() + END, r"no length"),
    "pax length zero": (pax_header(b"0 path=x\n") + raw_header() + END, r"length does not match"),
    "pax length short": (pax_header(b"5 path=x\n") + raw_header() + END, r"length does not match"),
    "pax length long": (pax_header(b"99 path=x\n") + raw_header() + END, r"length does not match"),
    "pax length overlong": (pax_header(b"9" * 30 + b" path=x\n") + raw_header() + END, r"no length"),
    "pax without equals": (pax_header(b"8 pathx\n") + raw_header() + END, r"length does not match"),
    "pax empty key": (pax_header(b"5 =x\n") + raw_header() + END, r"length does not match"),
    "pax NUL": (pax_header(b"\0\0" + b"9 path=x\n") + raw_header() + END, r"NUL"),
    "pax for nothing": (pax_header(pax_record(b"path", b"x")) + END, r"ends after an extended header"),
    "global path": (pax_header(pax_record(b"path", b"x"), b"g") + END, r"sets path for every entry"),
    "global size": (pax_header(pax_record(b"size", b"1"), b"g") + raw_header() + END, r"sets size"),
    "huge pax header": (raw_header(b"p", kind=b"x", size=b"77777777777\0") + END, r"extension_bytes"),
    "negative pax header": (raw_header(b"p", kind=b"x", size=b"\xff" * 12) + END, r"extension_bytes"),
    "huge GNU name": (raw_header(b"@", kind=b"L", size=b"00010000000\0") + bytes(2 << 20), r"extension_bytes"),
    "long path": (pax((b"path", b"a/" * 2048 + b"f")), r"path_bytes = 4095"),
    "long name": (pax((b"path", b"n" * 256)), r"name_bytes = 255"),
    "deep path": (pax((b"path", b"d/" * 257 + b"f")), r"path_depth = 256"),
    "long link": (
        pax_header(pax_record(b"linkpath", b"t" * 4096)) + raw_header(b"l", kind=b"2") + END, r"path_bytes = 4095",
    ),
    "xattr name": (pax((b"SCHILY.xattr.user.", b"v")), r"extended attribute b'user\.' cannot be stored"),
    "xattr long name": (pax((b"SCHILY.xattr.user." + b"n" * 251, b"v")), r"cannot be stored"),
    "xattr NUL": (pax((b"SCHILY.xattr.user.a\0b", b"v")), r"cannot be stored"),
    "xattr sum": (pax(*((b"SCHILY.xattr.user.%d" % n, b"v" * 30_000) for n in range(3))), r"xattr_bytes = 65536"),
    # types
    "unknown type": (raw_header(b"f", kind=b"M") + END, r"^f: entry type b'M'.*plain tar"),
    "folder with data": (raw_header(b"f/", kind=b"0", size=b"5") + padded(b"12345") + END, r"^f/: a folder with data"),
    # the end
    "no end mark": (raw_header(b"f"), r"^offset 512: .*no end-of-archive mark.*copy it again"),
    "lone zero block": (raw_header(b"a") + bytes(512) + raw_header(b"b") + END, r"^offset 1024: a lone zero block"),
    "half a header": (raw_header(b"f") + raw_header(b"g")[:300], r"^offset 512: the archive ends inside a header"),
    "data cut": (raw_header(b"f", size=b"00000002000\0") + bytes(600), r"^f: the archive ends inside this entry"),
    "pax cut": (raw_header(b"p", kind=b"x", size=b"00000002000\0") + bytes(600), r"^p: .*ends inside this extended"),
    # sparse maps that lie
    "sparse out of order": (sparse_1(b"2\n600\n5\n0\n5\n", b"0123456789"), r"^f: sparse map has a run at 0"),
    "sparse overlap": (sparse_1(b"2\n0\n6\n5\n4\n", b"0123456789"), r"run at 5 of 4 bytes, out of order"),
    "sparse over the end": (sparse_1(b"1\n999999\n2\n", b"01"), r"run at 999999"),
    "sparse too little": (sparse_1(b"1\n0\n5\n", b"0123456789"), r"describes 5 bytes but 10 are stored"),
    "sparse too much": (sparse_1(b"1\n0\n50\n", b"0123456789"), r"describes 50 bytes but 10"),
    "sparse no number": (sparse_1(b"x\n"), r"'x' is not a size"),
    "sparse count lies": (sparse_1(b"7\n0\n5\n", b"01234"), r"map does not end within"),
    "sparse count huge": (sparse_1(b"9999999\n0\n5\n"), r"sparse_extents"),
    "sparse negative": (sparse_1(b"1\n-5\n5\n", b"01234"), r"is not a size"),
    "sparse size huge": (sparse_1(b"0\n", real=b"99999999999999"), r"file_bytes"),
    "sparse without size": (pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")), r"sparse size"),
    "sparse 0.1 odd": (pax((b"GNU.sparse.map", b"1,2,3"), (b"GNU.sparse.size", b"9")), r"odd number"),
    "sparse folder": (
        pax_header(pax_record(b"GNU.sparse.map", b"") + pax_record(b"GNU.sparse.size", b"9"))
        + raw_header(b"d", kind=b"5") + END, r"on something that is not a file",
    ),
    "old sparse short": (old_sparse((0, 5), real=100, stored=600), r"describes 5 bytes but 600"),
    "old sparse over": (old_sparse((90, 20), real=100, stored=20), r"run at 90"),
    "old sparse chain": (old_sparse((0, 5), real=100, stored=5, more=b"\1"), r"sparse_extents|not a number"),
    "old sparse chain without end": (old_sparse(real=9, stored=0, more=b"\1")[:512] + (
        b"%011o\0%011o\0" % (0, 0) * 21 + b"\1" + bytes(7)) * 4000, r"sparse_extents"),
    # no tar at all
    "text": (b"#!/bin/sh\necho hello\n" * 100, r"^offset 0: .*no tar"),
    "short": (b"hello", r"ends inside a"),
    "zip": (b"PK\3\4" + bytes(2000), r"^offset 0: "),
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the store that must not change; the working directory is in it."""
    folder = tmp_path / "outside"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc" / "passwd").write_text("root")
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    was = snapshot(folder)
    yield folder
    os.chdir(before)
    assert snapshot(folder) == was


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_archive_is_refused_and_leaves_nothing(
    store: Store, root: Path, tmp_path: Path, outside: Path, name: str
) -> None:
    tar, said = MALFORMED[name]
    with pytest.raises((BadArchive, LimitExceeded)) as caught:
        convert(tar, tmp_path / "blob")
    message = str(caught.value)
    assert re.search(said, message), message
    assert "; " in message, "it says what to do"
    assert message.isprintable()
    archive = tmp_path / "image.tar"
    archive.write_bytes(tar)
    with pytest.raises((BadArchive, LimitExceeded)):
        import_archive(store, archive, domain=ACME)
    assert not store.objects() and not store.images()
    assert tree(root / "staging") == tree(root / "objects") == tree(root / "images") == []


def test_a_message_never_carries_control_bytes_or_a_novel(tmp_path: Path) -> None:
    name = "a/\x1b[2J\n" + "x" * 200 + "/\udcff/" + "y" * 3000 + "/../z"
    with pytest.raises(BadArchive) as caught:
        convert(make_tar(header(name)), tmp_path / "blob")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert str(caught.value).startswith("a/\\x1b[2J\\n")


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    """Every prefix at a block's boundary, and a byte to both sides of it, is an error: none is taken for whole."""
    info = header("pax/" + "n" * 200, pax_headers={"SCHILY.xattr.user.a": "v" * 600})
    tar = make_tar((info, b"x" * 700), link("l", "t" * 150), (header("last"), b"y" * 512), format=tarfile.PAX_FORMAT)
    end = tar.index(b"y" * 512) + 512
    cuts = {cut + off for cut in range(0, end + 1, 512) for off in (-1, 0, 1) if 0 <= cut + off <= end + 1}
    for cut in sorted(cuts):
        with pytest.raises(BadArchive, match=r"ends|no end-of-archive|no tar"):
            convert(tar[:cut], tmp_path / "blob")
    convert(tar[: end + 512], tmp_path / "blob")
    convert(tar[: end + 700], tmp_path / "blob")


def test_only_who_checks_the_digest_may_do_without_the_end_mark(tmp_path: Path) -> None:
    tar = make_tar((header("a"), b"x" * 600))[: 512 * 3]
    with (tmp_path / "blob").open("w+b") as out:
        meta = convert_layer(io.BytesIO(tar), out, limits=Limits(), end_mark=False)
        assert meta.files == 1
        assert convert_layer(io.BytesIO(b""), out, limits=Limits(), end_mark=False).files == 0
        assert convert_layer(io.BytesIO(tar[: 512 + 600]), out, limits=Limits(), end_mark=False).files == 1
        for cut in (300, 512, 512 + 599):
            with pytest.raises(BadArchive, match="ends inside"):
                convert_layer(io.BytesIO(tar[:cut]), out, limits=Limits(), end_mark=False)


def test_what_stands_behind_the_end_is_digested_only(tmp_path: Path) -> None:
    tar = make_tar(header("a"))
    first = convert(tar, tmp_path / "a")
    second = convert(tar + raw_header(b"../x") + b"junk", tmp_path / "b")
    assert first.source_digest != second.source_digest
    assert first.files == second.files == 1


def test_a_million_entries(tmp_path: Path) -> None:
    """More members than allowed end the import at the limit, not after the last one."""
    tar = io.BytesIO()
    for number in range(3_000):
        tar.write(raw_header(b"%d" % number))
    tar.write(END)
    with pytest.raises(LimitExceeded, match=r"^2500: over the limit entries = 2500"):
        convert(tar.getvalue(), tmp_path / "blob", Limits(entries=2_500))
    deep = make_tar(*(header("/".join([str(n), *"abcdefghij"] * 2)) for n in range(100)))
    with pytest.raises(LimitExceeded, match="entries = 1000"):
        convert(deep, tmp_path / "blob", Limits(entries=1_000))


def test_each_limit_stops_the_conversion(tmp_path: Path) -> None:
    tar = make_tar((header("f"), b"x" * 100_000))
    for limits, named in (
        (Limits(total_bytes=50_000), "total_bytes"),
        (Limits(file_bytes=99_999), "file_bytes"),
        (Limits(metadata_bytes=100), "metadata_bytes"),
    ):
        with pytest.raises(LimitExceeded, match=named) as caught:
            convert(tar, tmp_path / "blob", limits)
        assert (caught.value.limit, caught.value.allowed) == (named, getattr(limits, named))
    with pytest.raises(ValueError, match="entries must be positive"):
        Limits(entries=0)


def test_holes_cannot_blow_up_the_blob(tmp_path: Path) -> None:
    """2,000 bytes of tar that would make every later hash read 64 GiB of zeros."""
    runs = b"".join(b"%d\n1\n" % (number << 28) for number in range(1000))
    tar = sparse_1(b"1000\n" + runs, b"x" * 1000, real=b"%d" % (1 << 38))
    with pytest.raises(LimitExceeded, match=r"^f: over the limit blob_growth = 8") as caught:
        convert(tar, tmp_path / "blob")
    assert caught.value.remedy
    with pytest.raises(LimitExceeded, match="total_bytes"):
        convert(tar, tmp_path / "blob", Limits(blob_growth=1 << 40, total_bytes=1 << 30))


@pytest.mark.parametrize("cut", [3, 12, 200, -9])
def test_a_damaged_gzip_is_refused(store: Store, root: Path, tmp_path: Path, cut: int) -> None:
    data = gzip.compress(make_tar((header("bin/sh"), os.urandom(3000))))
    (tmp_path / "a.tar.gz").write_bytes(data[:cut])
    with pytest.raises(CacheError, match="copy"):
        import_archive(store, tmp_path / "a.tar.gz", domain=ACME)
    assert tree(root / "staging") == tree(root / "objects") == []
