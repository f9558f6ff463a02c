"""The image against three judges: the host kernel's mount, fsck.erofs and dump.erofs."""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from sharedcache.convert import convert_layer, volume_uuid
from sharedcache.erofs_layout import BLOCK_BYTES, HUGE_BYTES, crc32c, split_names
from sharedcache.limits import Limits
from tests.sharedcache.image_reader import Image
from tests.sharedcache.tarkit import convert, facts, fsck, header, make_tar, mounted, needs_fsck, needs_mount

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep, revision 2
ACL = bytes.fromhex("0200000001000700ffffffff02000500e803000004000500ffffffff10000500ffffffff20000500ffffffff")


def build_corpus(root: Path) -> None:
    """A folder with one of everything; needs root."""
    root.mkdir()
    (root / "empty").touch()
    (root / "small").write_bytes(b"hello\n")
    (root / "block").write_bytes(b"b" * 4096)
    (root / "odd").write_bytes(os.urandom(123_457))
    (root / "huge").write_bytes(os.urandom(3 << 20) + b"tail")
    (root / "after-huge").write_bytes(b"fills the gap in front of huge")
    os.link(root / "small", root / "linked")
    deep = root.joinpath(*["d" * 60] * 12)
    deep.mkdir(parents=True)
    (deep / ("n" * 255)).write_bytes(b"long")
    (root / "!before-dot").write_bytes(b"sorts before . and ..")
    (root / "ümlaut \n\x7f").write_bytes(b"odd name")
    (root / "long-link").symlink_to("../" * 40 + "x" * 200)
    (root / "link").symlink_to("small")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mkfifo(root / "fifo", 0o600)
    (root / "wide").mkdir()
    for number in range(700):
        (root / "wide" / f"{number:03d}-{'w' * (number % 90)}").write_bytes(b"%d" % number)
    (root / "hollow").mkdir(mode=0o1777)
    os.chown(root / "small", 70_000, 4_294_967_294)
    (root / "odd").chmod(0o6755)
    os.setxattr(root / "odd", "security.capability", CAPABILITY)
    os.setxattr(root / "empty", "user.note", b"\x00binary\xff" * 20)
    os.setxattr(root / "empty", "user.none", b"")
    os.setxattr(root / "wide", "trusted.mark", b"folder")
    os.setxattr(root / "hollow", "system.posix_acl_access", ACL)
    os.setxattr(root / "hollow", "system.posix_acl_default", ACL)
    os.setxattr(root / "link", "trusted.on-link", b"x" * 3000, follow_symlinks=False)
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + number * 10**9), follow_symlinks=False)
    os.utime(root / "block", ns=(0, -5_500_000_000))


def tar_of(root: Path, tar: Path, *options: str) -> Path:
    subprocess.run(["tar", "-C", str(root), "-cf", str(tar), *options, "."], check=True, timeout=60)
    return tar


@needs_mount
@needs_fsck
@pytest.mark.parametrize(
    ("options", "whole_seconds"),
    [
        (["--format=pax", "--xattrs", "--xattrs-include=*"], False),
        (["--format=gnu"], True),
        (["--format=pax", "--sort=name", "--no-xattrs"], False),
    ],
)
def test_corpus_equals_its_source(tmp_path: Path, options: list[str], whole_seconds: bool) -> None:
    build_corpus(tmp_path / "src")
    before = (tmp_path / "src").stat().st_mtime_ns
    with socket.socket(socket.AF_UNIX) as bound:  # tar leaves sockets out, so the image has none
        bound.bind(str(tmp_path / "src" / "socket"))
        os.utime(tmp_path / "src", ns=(before, before))
        tar = tar_of(tmp_path / "src", tmp_path / "t.tar", *options)
    (tmp_path / "src" / "socket").unlink()
    os.utime(tmp_path / "src", ns=(before, before))
    meta = convert(tar, tmp_path / "blob")
    expected = facts(tmp_path / "src", whole_seconds=whole_seconds)
    if "--xattrs" not in options:
        for record in expected.values():
            record["xattrs"] = {}
    fsck(tmp_path / "blob")
    with mounted(tmp_path / "blob", tmp_path / "m") as mount:
        assert facts(mount, whole_seconds=whole_seconds) == expected
    assert meta.blob_bytes == (tmp_path / "blob").stat().st_size
    assert meta.blob_bytes % HUGE_BYTES == 0
    assert meta.source_digest == "sha256:" + hashlib.sha256(tar.read_bytes()).hexdigest()
    assert meta.files + meta.directories + meta.symlinks + meta.others + meta.hardlinks == len(expected)
    assert (meta.hardlinks, meta.symlinks, meta.others) == (1, 2, 3)


@needs_mount
@needs_fsck
@pytest.mark.parametrize("flags", ["gnu", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_sparse_formats(tmp_path: Path, flags: str) -> None:
    """Few holes stay flat, many become chunks; both read as the source does, in all four formats."""
    source = tmp_path / "src"
    source.mkdir()
    for name, holes in (("few", 2), ("many", 40), ("only-hole", 0)):
        with (source / name).open("wb") as file:
            for number in range(holes):
                file.seek(number * 300_000)
                file.write(os.urandom(5_000 + number))
            file.truncate(holes * 300_000 + 20_000_000 if holes != 2 else 700_001)
    with (source / "vast").open("wb") as file:
        file.seek(6 << 30)
        file.write(b"end of six GiB")
    form, _, version = flags.partition(" ")
    tar = tar_of(
        source,
        tmp_path / "t.tar",
        f"--format={form}",
        "--sparse",
        *([f"--sparse-version={version}"] if version else []),
    )
    assert tar.stat().st_size < 1 << 20, "tar itself must have found the holes"
    meta = convert(tar, tmp_path / "blob")
    assert meta.blob_bytes < 128 << 20
    fsck(tmp_path / "blob", extract=False)  # it would read the hole of six GiB
    (source / "vast").unlink()
    with mounted(tmp_path / "blob", tmp_path / "m") as mount:
        with (mount / "vast").open("rb") as file:
            file.seek((6 << 30) - 4)
            assert file.read() == bytes(4) + b"end of six GiB"
        found = facts(mount, whole_seconds=True)
        assert found.pop("vast")["size"] == (6 << 30) + 14
        expected = facts(source, whole_seconds=True)
        expected["."]["mtime"] = found["."]["mtime"]
        assert found == expected


@needs_mount
@needs_fsck
def test_whiteouts_and_opaque_folders_work_in_overlayfs(tmp_path: Path) -> None:
    folder = {"kind": tarfile.DIRTYPE}
    lower = make_tar(
        header("keep", **folder), (header("keep/old"), b"1"), (header("keep/gone"), b"1"), header("reset", **folder),
        (header("reset/old"), b"1"), header("swap", **folder), (header("swap/old"), b"1"), (header("file"), b"1"),
    )  # fmt: skip
    upper = make_tar(
        header("keep", **folder), header("keep/.wh.gone"), header("keep/.wh.never-was"), header("reset", **folder),
        header("reset/.wh..wh..opq"), (header("reset/new"), b"2"), header(".wh.swap"), header("swap", **folder),
        (header("swap/new"), b"2"), header(".wh.file"), header(".wh..wh.plnk", **folder),
    )  # fmt: skip
    for name, tar in (("lower", lower), ("upper", upper)):
        convert(tar, tmp_path / name)
        fsck(tmp_path / name)
    (tmp_path / "merged").mkdir()
    with (
        mounted(tmp_path / "lower", tmp_path / "l") as low,
        mounted(tmp_path / "upper", tmp_path / "u") as up,
    ):
        assert stat.S_ISCHR((up / "file").lstat().st_mode) and (up / "file").lstat().st_rdev == 0
        assert os.getxattr(up / "reset", "trusted.overlay.opaque") == b"y"
        assert sorted(path.name for path in up.iterdir()) == ["file", "keep", "reset", "swap"]
        options = f"lowerdir={up}:{low}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(tmp_path / "merged")], check=True)
        try:
            found = sorted(str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*"))
        finally:
            subprocess.run(["umount", str(tmp_path / "merged")], check=True)
    assert found == ["keep", "keep/old", "reset", "reset/new", "swap", "swap/new"]


@needs_mount
@needs_fsck
@pytest.mark.slow
def test_hundred_thousand_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number in range(100_000):
            content = b"%d" % number * (number % 50)
            info = header(f"usr/{number // 5000:02d}/file-{number}", size=len(content), mtime=number)
            tar.addfile(info, io.BytesIO(content))
    meta = convert(tmp_path / "t.tar", tmp_path / "blob")
    assert (meta.files, meta.directories) == (100_000, 22)
    fsck(tmp_path / "blob")
    seen = 0
    with mounted(tmp_path / "blob", tmp_path / "m") as mount:
        for folder in (mount / "usr").iterdir():
            for path in folder.iterdir():
                number = int(path.name.rpartition("-")[2])
                assert path.stat().st_mtime == number
                assert path.read_bytes() == b"%d" % number * (number % 50)
                seen += 1
    assert seen == 100_000


@needs_mount
@pytest.mark.slow
def test_multi_gigabyte_file_leaves_zeros_out(tmp_path: Path) -> None:
    """A plain (not sparse) 5 GiB member of zeros with marks: its blob takes little disk."""
    size = 5 << 30
    with (tmp_path / "t.tar").open("wb") as tar:
        info = header("big", size=size)
        tar.write(info.tobuf(tarfile.GNU_FORMAT))
        start = tar.tell()
        for at in (0, (4 << 30) + 1, size - 7):
            tar.seek(start + at)
            tar.write(b"mark at")
        tar.truncate(start + size + 1024)
    convert(tmp_path / "t.tar", tmp_path / "blob")
    assert (tmp_path / "blob").stat().st_blocks * 512 < 16 << 20
    with mounted(tmp_path / "blob", tmp_path / "m") as mount, (mount / "big").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == size
        for at in (0, (4 << 30) + 1, size - 7):
            file.seek(at)
            assert file.read(7) == b"mark at"


class Dribble(io.RawIOBase):
    """Gives the stream in pieces of awkward sizes."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self._turn = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        self._turn += 1
        view = memoryview(cast(bytearray, buffer))
        piece = self._data.read(min(len(view), (1, 511, 513, 4097, 70_000)[self._turn % 5]))
        view[: len(piece)] = piece
        return len(piece)


def sample_tar() -> bytes:
    members = [(header(f"d{n % 7}/f{n}", mtime=n), bytes([n % 251]) * (n * 997 % 90_000)) for n in range(200)]
    return make_tar(*members, (header("big"), bytes(range(256)) * 9000), (header("late"), b"x"))


def test_same_tar_same_blob_however_it_arrives(tmp_path: Path) -> None:
    tar = sample_tar()
    first = convert(tar, tmp_path / "a")
    with (tmp_path / "b").open("w+b", buffering=0) as out:
        out.write(b"what was there before" * 5_000_000)
        second = convert_layer(cast(BinaryIO, Dribble(tar)), cast(BinaryIO, out), limits=Limits())
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.volume_uuid == volume_uuid(hashlib.sha256(tar).digest())


def test_large_files_are_aligned_for_huge_pages(tmp_path: Path) -> None:
    convert(sample_tar(), tmp_path / "a")
    blob = (tmp_path / "a").read_bytes()
    at = blob.index((bytes(range(256)) * 9000)[: 1 << 20])
    assert at % HUGE_BYTES == 0
    assert len(blob) < 3 * HUGE_BYTES + 200 * 45_000 + (200 << 12)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    tar = sample_tar()
    seen: list[int] = []
    with (tmp_path / "a").open("w+b") as out:
        convert_layer(io.BytesIO(tar), out, limits=Limits(), progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == len(tar)


@pytest.mark.skipif(not Path("/usr/bin/dump.erofs").exists(), reason="needs dump.erofs (apt install erofs-utils)")
def test_superblock_as_dump_erofs_reads_it(tmp_path: Path) -> None:
    meta = convert(sample_tar(), tmp_path / "a")
    done = subprocess.run(["dump.erofs", str(tmp_path / "a")], capture_output=True, text=True, timeout=30, check=True)
    text = done.stdout
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in text.splitlines()}
    assert fields["Filesystem features"] == "sb_csum mtime"
    assert int(fields["Filesystem blocks"]) * BLOCK_BYTES == meta.blob_bytes
    assert int(fields["Filesystem inode count"]) == meta.files + meta.directories
    assert fields["Filesystem UUID"].replace("-", "") == meta.volume_uuid.hex()


@pytest.mark.skipif(not Path("/usr/bin/dump.erofs").exists(), reason="needs dump.erofs (apt install erofs-utils)")
def test_files_as_dump_erofs_reads_them(tmp_path: Path) -> None:
    """Size, links, owner, mode and every extent, for a small file, a large one, a folder and a link."""
    link = header("link", kind=tarfile.SYMTYPE, linkname="big")
    convert(make_tar((header("d/small", uid=70_000, mode=0o640), b"s" * 5000), link,
                     (header("big"), b"b" * 5_000_000)), tmp_path / "a")  # fmt: skip
    found = Image(tmp_path / "a")
    for path in (b"d/small", b"big", b"d", b"link"):
        inode = found.paths[path]
        argv = ["dump.erofs", "-e", f"--path=/{path.decode()}", str(tmp_path / "a")]
        text = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
        assert re.search(rf"NID: {inode.nid} +Links: {inode.nlink} ", text), text
        assert re.search(rf"Uid: {inode.uid} +Gid: {inode.gid} +Access: 0*{stat.S_IMODE(inode.mode):o}/", text), text
        assert re.search(rf"Size: {inode.size} ", text), text
        shown = re.findall(r"^ +\d+: +(\d+)\.\. +\d+ \| +\d+ : +(\d+)\.\.", text, re.MULTILINE)
        assert [tuple(map(int, row)) for row in shown] == [(at, offset) for at, offset, _ in inode.extents], text


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") ^ 0xFFFF_FFFF == 0xE3069283  # the catalogue's check value


def test_directory_blocks_are_filled_to_the_byte() -> None:
    assert split_names([b"a" * 244] * 16) == [16]
    assert split_names([b"a" * 244] * 17) == [16, 1]
    assert split_names([b"a" * 244] * 15 + [b"a" * 245, b"b"]) == [15, 2]
