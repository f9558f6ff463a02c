"""The whole conversion under random and mutated tars: an image that holds every rule, or one named error."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharedcache.convert import convert_layer
from sharedcache.decompress import open_stream
from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits
from tests.sharedcache.image_reader import Image
from tests.sharedcache.tarkit import END, header, make_tar, padded, pax_header, pax_record, raw_header

LIMITS = Limits(
    entries=500, metadata_bytes=1 << 20, extension_bytes=1 << 16, total_bytes=64 << 20, file_bytes=1 << 30,
    sparse_extents=100, path_depth=20,
)  # fmt: skip
FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def attempt(tar: bytes, blob: Path) -> Image | None:
    """Converts; the image was read by every rule. None when it was refused in one of the two allowed ways."""
    with blob.open("w+b") as out:
        try:
            meta = convert_layer(open_stream(io.BytesIO(tar), LIMITS), out, limits=LIMITS)
        except (BadArchive, LimitExceeded) as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            return None
    found = Image(blob)
    assert meta.blob_bytes == blob.stat().st_size
    assert meta.files + meta.directories + meta.symlinks + meta.others == len(found.inodes)
    assert meta.hardlinks == len(found.paths) - len(found.inodes)
    assert not any(b".." in path.split(b"/") for path in found.paths)
    return found


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "blob"


# ── well-formed headers in any order and combination ──

NAMES = st.sampled_from(
    ["a", "b", "a/b", "a/b/c", "b/a", ".", "./a", "/b", "..", "a/..", ".wh.a", "a/.wh.b", ".wh..wh..opq",
     "a/.wh..wh..opq", ".wh..wh.x/y", ".wh.b/c", "", "a//b/", "é", "x" * 120]
)  # fmt: skip
KINDS = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
MEMBERS = st.tuples(
    NAMES, KINDS, NAMES, st.sampled_from([0, 1, 511, 512, 4096, 5000]),
    st.sampled_from(["", "user.a", "trusted.overlay.opaque", "security.capability"]), st.integers(-(2**40), 2**40),
)  # fmt: skip


@FUZZ
@given(st.lists(MEMBERS, max_size=12), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_any_members_in_any_order(blob: Path, members: list[tuple[str, bytes, str, int, str, int]], form: int) -> None:
    made = []
    for name, kind, link, size, xattr, mtime in members:
        info = header(name, kind=kind, linkname=link if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "")
        info.mtime = max(mtime, 0) % 2**33 if form == tarfile.GNU_FORMAT else mtime
        if xattr and form == tarfile.PAX_FORMAT:
            info.pax_headers = {f"SCHILY.xattr.{xattr}": "v" * (size % 700)}
        made.append((info, b"d" * size) if kind == tarfile.REGTYPE else info)
    first = attempt(make_tar(*made, format=form), blob)
    if first is not None:
        again = attempt(make_tar(*made, format=form), blob)
        assert again is not None and again.paths == first.paths


# ── raw headers with any field ──

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from([bytes([c]) for c in b"01234567xgLKSVXDMN\0Z"]),
        "size": st.one_of(
            st.integers(0, 2000).map(lambda n: b"%011o\0" % n), st.binary(max_size=12),
            st.integers(-(2**80), 2**80).map(lambda n: b"\x80" + (n & (2**88 - 1)).to_bytes(11, "big")),
        ),
        "mode": st.binary(max_size=8), "uid": st.binary(max_size=8), "mtime": st.binary(max_size=12),
        "link": st.binary(max_size=20), "prefix": st.binary(max_size=155), "major": st.binary(max_size=8),
        "magic": st.sampled_from([b"ustar\00000", b"ustar  \0", b""]), "pad": st.binary(max_size=12),
    },
)  # fmt: skip


@FUZZ
@given(st.lists(st.tuples(st.binary(max_size=30), FIELDS, st.binary(max_size=1500)), max_size=5), st.booleans())
def test_any_header_fields(blob: Path, blocks: list[tuple[bytes, dict[str, bytes], bytes]], ended: bool) -> None:
    tar = b"".join(raw_header(name, **fields) + padded(body) for name, fields, body in blocks)
    attempt(tar + (END if ended else b""), blob)


# ── pax records with any value ──

KEYS = st.sampled_from(
    [b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"SCHILY.xattr.user.x", b"SCHILY.acl.access",
     b"SCHILY.xattr.system.posix_acl_access", b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.map",
     b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.name", b"GNU.sparse.offset", b"GNU.sparse.numbytes"]
)  # fmt: skip
VALUES = st.one_of(
    st.integers(-5, 5000).map(lambda n: b"%d" % n), st.binary(max_size=40), st.just(b"0,5,600,5"),
    st.just(b"user::rwx,group::r-x,other::r--"), st.just(b"1"), st.just(b"a/b"), st.just(b"1.5"),
)  # fmt: skip


@FUZZ
@given(st.lists(st.tuples(KEYS, VALUES), max_size=6), st.sampled_from([b"x", b"g"]), st.integers(0, 1100))
def test_any_pax_records(blob: Path, records: list[tuple[bytes, bytes]], kind: bytes, size: int) -> None:
    body = b"1\n0\n5\n".ljust(512, b"\0") + b"d" * 600
    tar = pax_header(b"".join(pax_record(*record) for record in records), kind)
    tar += raw_header(b"f", size=b"%011o\0" % size) + padded(body[:size]) + raw_header(b"after")
    attempt(tar + END, blob)


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes_as_pax_body(blob: Path, body: bytes) -> None:
    attempt(pax_header(body) + raw_header(b"f") + END, blob)


# ── an honest tar, damaged ──


def honest_tar() -> bytes:
    sparse = pax_header(
        pax_record(b"GNU.sparse.major", b"1") + pax_record(b"GNU.sparse.minor", b"0")
        + pax_record(b"GNU.sparse.name", b"holey") + pax_record(b"GNU.sparse.realsize", b"9000000")
    )  # fmt: skip
    body = padded(b"2\n0\n5\n8000000\n5\n") + b"helloworld"
    gnu_sparse = raw_header(
        b"old", kind=b"S", magic=b"ustar  \0", size=b"%011o\0" % 5,
        prefix=bytes(41) + b"%011o\0%011o\0" % (4096, 5) + bytes(73) + b"0000", pad=b"",
    )  # fmt: skip
    gnu_sparse = gnu_sparse[:483] + b"%011o\0" % 9000 + gnu_sparse[495:]
    gnu_sparse = gnu_sparse[:148] + b" " * 8 + gnu_sparse[156:]
    gnu_sparse = gnu_sparse[:148] + b"%06o\0 " % sum(gnu_sparse) + gnu_sparse[156:]
    members = make_tar(
        header("d", kind=tarfile.DIRTYPE), (header("d/f", pax_headers={"mtime": "1.5"}), b"x" * 700),
        header("l", kind=tarfile.SYMTYPE, linkname="t" * 130), header("h", kind=tarfile.LNKTYPE, linkname="d/f"),
        header("n" * 150), header(".wh.gone"), header("dev", kind=tarfile.BLKTYPE, devmajor=8, devminor=1),
        header("x", pax_headers={"SCHILY.xattr.user.a": "b", "SCHILY.acl.access": "user::rwx,group::r-x,other::r--"}),
    )  # fmt: skip
    return members.rstrip(b"\0") + bytes(-len(members.rstrip(b"\0")) % 512) + sparse + raw_header(
        b"s", size=b"%011o\0" % len(body)) + padded(body) + gnu_sparse + padded(b"12345") + END  # fmt: skip


def with_checksums(tar: bytearray) -> bytes:
    """Every block that says ustar gets the right checksum again, so that mutations get past it."""
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257 : at + 262] == b"ustar":
            tar[at + 148 : at + 156] = b" " * 8
            tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


def test_the_honest_tar_is_converted(blob: Path) -> None:
    found = attempt(honest_tar(), blob)
    assert found is not None
    assert found.content(b"holey")[:5] == b"hello" and found.content(b"holey")[8_000_000:8_000_005] == b"world"
    assert found.content(b"old")[4096:4101] == b"12345" and len(found.content(b"old")) == 9000


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_mutations_of_an_honest_tar(blob: Path, seed: int) -> None:
    """Bits, numbers, cuts, doubled and swapped blocks; with the header checksums made right again, and without."""
    chance = random.Random(seed)
    original = honest_tar()
    converted = 0
    for _ in range(200):
        tar = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            mutate(tar, chance)
        converted += attempt(with_checksums(tar) if chance.random() < 0.8 else bytes(tar), blob) is not None
    assert 10 < converted < 190, "mutations that always or never fail test nothing"


def mutate(tar: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(tar) // 512) * 512
    match chance.randrange(8):
        case 0:
            tar[chance.randrange(len(tar))] ^= 1 << chance.randrange(8)
        case 1:
            tar[at + 156] = chance.choice(b"01234567xgLKSV\0")
        case 2:
            tar[at + 124 : at + 136] = chance.choice([b"%011o\0" % chance.randrange(3000), b"\x80" + bytes(11)])
        case 3:
            del tar[chance.randrange(len(tar)) :]
            tar += bytes(-len(tar) % 512) + bytes(512)
        case 4:
            tar[at:at] = tar[at : at + 512]
        case 5:
            other = chance.randrange(len(tar) // 512) * 512
            tar[at : at + 512], tar[other : other + 512] = tar[other : other + 512], tar[at : at + 512]
        case 6:
            tar[at : at + 100] = chance.choice([b"../up", b"/abs", b"d/f/x", b"l/x", b".wh.d", b""]).ljust(100, b"\0")
        case 7:
            spot = chance.randrange(len(tar) - 8)
            tar[spot : spot + 8] = struct.pack("<q", chance.choice([0, -1, 2**63 - 1, 2**31]))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_damage_under_compression(blob: Path, compress: object) -> None:
    assert callable(compress)
    original = compress(honest_tar())
    chance = random.Random(7)
    for _ in range(150):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        attempt(bytes(data), blob)


@FUZZ
@given(st.binary(max_size=2000))
def test_any_bytes_at_all(blob: Path, data: bytes) -> None:
    attempt(data, blob)
