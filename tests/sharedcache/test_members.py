"""What each kind of member becomes, in every tar dialect; read by the tests' own reader of EROFS images."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sharedcache.acl import encode_acl
from sharedcache.errors import BadArchive
from tests.sharedcache.image_reader import Image, Inode
from tests.sharedcache.tarkit import (
    END,
    convert,
    facts,
    header,
    make_tar,
    mounted,
    needs_mount,
    padded,
    pax_header,
    pax_record,
    raw_header,
)

HUGE = 2 << 20
DIR = {"kind": tarfile.DIRTYPE}
ACL = bytes.fromhex("0200000001000600ffffffff02000700e803000004000400ffffffff10000500ffffffff20000400ffffffff")


def image(tmp_path: Path, *members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], **options: int) -> Image:
    convert(make_tar(*members, **options), tmp_path / "blob")
    return Image(tmp_path / "blob")


def image_of(tmp_path: Path, tar: bytes) -> Image:
    convert(tar, tmp_path / "blob")
    return Image(tmp_path / "blob")


def link(name: str, target: str) -> tarfile.TarInfo:
    return header(name, kind=tarfile.SYMTYPE, linkname=target, mode=0o777)


def hard(name: str, target: str) -> tarfile.TarInfo:
    return header(name, kind=tarfile.LNKTYPE, linkname=target)


def names(found: Image) -> set[bytes]:
    return set(found.paths) - {b""}


# ── dialects ──


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_in_every_dialect(tmp_path: Path, form: int) -> None:
    found = image(
        tmp_path,
        header("d", mode=0o1750, uid=7, gid=8, mtime=9, **DIR),
        (header("d/file", mode=0o4755, uid=1000, gid=100, mtime=1_600_000_000), b"content"),
        hard("d/hard", "d/file"),
        link("d/soft", "../somewhere else"),
        header("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        header("disk", kind=tarfile.BLKTYPE, devmajor=259, devminor=70_000, mode=0o660),
        header("pipe", kind=tarfile.FIFOTYPE, mode=0o600),
        header("contiguous", kind=tarfile.CONTTYPE, size=0),
        header("p" * 99 + "/" + "n" * 100, size=0),  # fills ustar's prefix and name
        format=form,
    )
    entry = found.paths
    assert (entry[b"d"].mode, entry[b"d"].uid, entry[b"d"].gid) == (stat.S_IFDIR | 0o1750, 7, 8)
    assert (entry[b"d"].mtime_ns, entry[b"d/file"].mtime_ns) == (9 * 10**9, 1_600_000_000 * 10**9)
    assert entry[b"d/file"] is entry[b"d/hard"] and entry[b"d/file"].nlink == 2
    assert entry[b"d/file"].mode == stat.S_IFREG | 0o4755
    assert found.content(b"d/hard") == b"content"
    assert found.content(b"d/soft") == b"../somewhere else"
    assert (entry[b"null"].device, entry[b"disk"].device) == (os.makedev(1, 3), os.makedev(259, 70_000))
    assert stat.S_ISFIFO(entry[b"pipe"].mode) and stat.S_ISREG(entry[b"contiguous"].mode)
    assert b"p" * 99 + b"/" + b"n" * 100 in entry


def test_v7_knows_folders_by_their_slash(tmp_path: Path) -> None:
    tar = b"".join(
        [
            raw_header(b"old/", kind=b"\0", magic=b"", mode=b"755 \0"),
            raw_header(b"old/file", kind=b"\0", magic=b"", size=b"3 \0") + padded(b"abc"),
            raw_header(b"old/link", kind=b"2", magic=b"", link=b"file"),
            raw_header(b"old/hard", kind=b"1", magic=b"", link=b"old/file", size=b"3"),  # no data follows
            END,
        ]
    )
    found = image_of(tmp_path, tar)
    assert stat.S_ISDIR(found.paths[b"old"].mode) and found.content(b"old/hard") == b"abc"
    assert found.content(b"old/link") == b"file"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(tmp_path: Path, form: int) -> None:
    path = "/".join(["x" * 255] * 15) + "/" + "y" * 200
    deep = "/".join("d" for _ in range(256))
    target = "t/" * 2000
    found = image(tmp_path, header(path), hard("hard", path), link("soft", target), header(deep), format=form)
    assert found.paths[path.encode()] is found.paths[b"hard"]
    assert found.content(b"soft") == target.encode()
    assert deep.encode() in found.paths


def test_star_and_gnu_prefix_areas_are_no_paths(tmp_path: Path) -> None:
    star = raw_header(b"name", prefix=b"dir" + bytes(128) + b"00000000001\0", pad=b"\0" * 8 + b"tar\0")
    gnu = raw_header(b"plain", magic=b"ustar  \0", prefix=b"00000000001\x0000000000002\0")
    assert names(image_of(tmp_path, star + gnu + END)) == {b"dir", b"dir/name", b"plain"}


def test_base256_numbers_and_their_limits(tmp_path: Path) -> None:
    tar = (
        raw_header(b"a", uid=b"\x80" + (0xFFFF_FFFE).to_bytes(7, "big"), mtime=b"\xff" * 11 + b"\xfe")
        + raw_header(b"b", size=b"\x80" + (5).to_bytes(11, "big"))
        + padded(b"bytes")
        + END
    )
    found = image_of(tmp_path, tar)
    assert (found.paths[b"a"].uid, found.paths[b"a"].mtime_ns) == (0xFFFF_FFFE, -2 * 10**9)
    assert found.content(b"b") == b"bytes"


# ── attributes ──


@pytest.mark.parametrize(
    ("text", "mtime_ns"),
    [
        ("1600000000.123456789", 1_600_000_000_123_456_789),
        ("-1.5", -1_500_000_000),
        ("-0.000000001", -1),
        ("-7", -7 * 10**9),
        ("0.9999999999", 999_999_999),  # more digits than a nanosecond has are cut
        ("9223372036", 9_223_372_036 * 10**9),
    ],
)
def test_times_to_the_nanosecond_and_before_1970(tmp_path: Path, text: str, mtime_ns: int) -> None:
    info = header("f", pax_headers={"mtime": text, "atime": "1", "ctime": "2"})
    assert image(tmp_path, info).paths[b"f"].mtime_ns == mtime_ns


def test_large_owners(tmp_path: Path) -> None:
    found = image(tmp_path, header("f", uid=65_536, gid=4_294_967_294), header("g", uid=2_097_152, gid=1))
    assert (found.paths[b"f"].uid, found.paths[b"f"].gid, found.paths[b"g"].uid) == (65_536, 4_294_967_294, 2_097_152)


def with_xattrs(name: str, **values: str) -> tarfile.TarInfo:
    return header(name, pax_headers={f"SCHILY.xattr.{key.replace('__', '.')}": value for key, value in values.items()})


def test_attributes_that_linux_keeps_are_kept(tmp_path: Path) -> None:
    found = image(
        tmp_path,
        with_xattrs("f", user__a="1", trusted__b="2", security__capability="3", com__apple__provenance="4"),
        with_xattrs("g", trusted__overlay__opaque="y", user__overlay__redirect="/etc", system__nfs4_acl="x"),
        with_xattrs("big", user__v="v" * 60_000),
    )
    assert found.paths[b"f"].xattrs == {"user.a": b"1", "trusted.b": b"2", "security.capability": b"3"}
    assert found.paths[b"g"].xattrs == {}  # overlayfs's own would direct the mount, the other Linux refuses
    assert found.paths[b"big"].xattrs == {"user.v": b"v" * 60_000}


def test_acl_text_becomes_the_kernels_form(tmp_path: Path) -> None:
    text = "user::rw-,user:joe:rwx:1000,group::r--,mask::r-x,other::r--"
    found = image(tmp_path, header("f", pax_headers={"SCHILY.acl.access": text}))
    assert found.paths[b"f"].xattrs == {"system.posix_acl_access": ACL}
    assert encode_acl(b"u::rw-\no::r--\nm::r-x\ng::r--\nu:1000:rwx\n", "") == ACL


@pytest.mark.parametrize(
    "text",
    ["user:joe:rwx", "user::rwx", "user::rw", "user::rwx,group::---,other::---,user::---", "mask::rwx", "nonsense",
     "user::rwx,group::r-x,other::r-x,user:1:rwx", "user:4294967295:rwx"],
)  # fmt: skip
def test_acls_that_linux_would_refuse(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadArchive, match="ACL"):
        image(tmp_path, header("f", pax_headers={"SCHILY.acl.access": text}))


def test_raw_acls_are_checked_too(tmp_path: Path) -> None:
    for value in (b"\x02\0\0\0\x01", ACL[:-8], b"\x01" + ACL[1:], ACL[:4] + ACL[12:]):
        records = pax_record(b"SCHILY.xattr.system.posix_acl_access", value)
        with pytest.raises(BadArchive, match=r"^f: its POSIX ACL"):
            image_of(tmp_path, pax_header(records) + raw_header(b"f") + END)


def test_global_pax_headers_last_until_overridden(tmp_path: Path) -> None:
    tar = (
        pax_header(pax_record(b"mtime", b"5") + pax_record(b"comment", b"by git"), b"g")
        + raw_header(b"a")
        + pax_header(pax_record(b"mtime", b""))  # an empty value takes the global one back
        + raw_header(b"b", mtime=b"00000000007\0")
        + raw_header(b"c")
        + END
    )
    found = image_of(tmp_path, tar)
    assert [found.paths[name].mtime_ns // 10**9 for name in (b"a", b"b", b"c")] == [5, 7, 5]


# ── names ──


def test_odd_names_survive(tmp_path: Path) -> None:
    odd = ["ümlaut", "日本語", "a b\tc\nd", "-rf", "...", "..a", "\x7f\x01", "\udcff\udcfe", "é" * 127]
    assert names(image(tmp_path, *map(header, odd))) == {os.fsencode(name) for name in odd}


def test_leading_slashes_and_dots_are_dropped(tmp_path: Path) -> None:
    found = image(tmp_path, header("/abs"), header("./dot"), header("a//b/./c"), header("./", mode=0o711, **DIR))
    assert names(found) == {b"abs", b"dot", b"a", b"a/b", b"a/b/c"}
    assert found.paths[b""].mode == stat.S_IFDIR | 0o711


def test_missing_parents_are_roots_until_named(tmp_path: Path) -> None:
    found = image(tmp_path, header("a/b/f", uid=5), header("a", mode=0o700, uid=6, mtime=7, **DIR))
    shown = {path: (inode.mode & 0o7777, inode.uid, inode.mtime_ns) for path, inode in found.paths.items()}
    assert shown[b"a"] == (0o700, 6, 7 * 10**9)
    assert shown[b"a/b"] == shown[b""] == (0o755, 0, 0)


def test_an_empty_tar_is_an_empty_folder(tmp_path: Path) -> None:
    assert names(image_of(tmp_path, END)) == set()
    assert names(image_of(tmp_path, bytes(512))) == set()


@pytest.mark.parametrize("old", ["file", "folder", "link", "hard"])
@pytest.mark.parametrize("new", ["file", "folder", "link", "hard"])
def test_the_last_of_two_members_wins(tmp_path: Path, old: str, new: str) -> None:
    def members(what: str, mark: bytes) -> list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]:
        made: dict[str, list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]] = {
            "file": [(header("x", mtime=len(mark)), mark)],
            "folder": [header("x", mtime=len(mark), **DIR), header("x/" + mark.decode())],
            "link": [link("x", mark.decode())],
            "hard": [hard("x", "other")],
        }
        return made[what]

    found = image(tmp_path, (header("other"), b"other"), *members(old, b"old"), *members(new, b"newer"))
    inside = {path for path in found.paths if path.startswith(b"x/")}
    if new == "folder":
        assert inside == ({b"x/old", b"x/newer"} if old == "folder" else {b"x/newer"})
        assert found.paths[b"x"].mtime_ns == 5 * 10**9
    else:
        assert not inside
        assert found.content(b"x") == (b"other" if new == "hard" else b"newer")
    assert found.paths[b"other"].nlink == (2 if new == "hard" else 1)


def test_a_hard_link_keeps_its_inode_when_the_first_name_goes(tmp_path: Path) -> None:
    found = image(tmp_path, (header("d/a"), b"old"), hard("b", "d/a"), (header("d/a"), b"new"), hard("d", "b"))
    assert names(found) == {b"b", b"d"}  # the whole folder was replaced by a link
    assert found.content(b"b") == b"old" and found.paths[b"b"].nlink == 2


def test_hard_links_to_links_devices_and_with_attributes(tmp_path: Path) -> None:
    found = image(
        tmp_path, link("l", "t"), hard("l2", "l"), header("p", kind=tarfile.FIFOTYPE), hard("p2", "p"),
        with_xattrs("x", user__a="1"), hard("x2", "./x"), hard("x3", "/x2"),
    )  # fmt: skip
    for first, second in ((b"l", b"l2"), (b"p", b"p2"), (b"x", b"x2"), (b"x", b"x3")):
        assert found.paths[first] is found.paths[second]


# ── whiteouts ──


def whiteouts(found: Image) -> set[bytes]:
    return {path for path, inode in found.paths.items() if stat.S_ISCHR(inode.mode) and inode.device == 0}


def is_opaque(inode: Inode) -> bool:
    return inode.xattrs.get("trusted.overlay.opaque") == b"y"


def test_whiteouts_speak_of_lower_layers_only(tmp_path: Path) -> None:
    found = image(
        tmp_path,
        header(".wh.gone"), header("d/.wh.gone"), header("kept"), header(".wh.kept"), header(".wh.late"),
        header("late"), header(".wh.dir"), header("dir/inside"), header("old", **DIR), header(".wh.old"),
        header("o/.wh..wh..opq"), header("o/x"), header(".wh..wh.aufs"), header(".wh..wh.orph/x"),
    )  # fmt: skip
    assert whiteouts(found) == {b"gone", b"d/gone"}
    assert names(found) == {b"gone", b"d", b"d/gone", b"kept", b"late", b"dir", b"dir/inside", b"old", b"o", b"o/x"}
    assert {path for path, inode in found.paths.items() if is_opaque(inode)} == {b"dir", b"old", b"o"}
    assert not any(b".wh." in path for path in found.paths)


def test_the_root_can_be_opaque(tmp_path: Path) -> None:
    found = image(tmp_path, header(".wh..wh..opq"), header("x"))
    assert is_opaque(found.paths[b""])


# ── sizes ──


def test_links_are_inline_only_where_every_kernel_reads_them(tmp_path: Path) -> None:
    """Older kernels refuse a link whose inline target does not end in its inode's block; newer ones do not mind."""
    members = [link(f"l{number:04d}", "t" * (1 + number % 61)) for number in range(400)]
    for number in range(400):
        info = link(f"x{number:04d}", "t" * (1 + number % 300))
        info.pax_headers = {"SCHILY.xattr.trusted.a": "v" * (number * 17 % 4200)}
        members.append(info)
    found = image(tmp_path, *members)
    for info in members:
        assert found.content(info.name.encode()) == info.linkname.encode()


@needs_mount
def test_a_wide_folder_and_the_kernel(tmp_path: Path) -> None:
    """10,000 entries, and folders whose last block is full to the byte, as the kernel lists them."""
    members: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]] = [header("empty", **DIR)]
    members += [(header(f"wide/{number}-{'n' * (number % 200)}"), b"%d" % number) for number in range(10_000)]
    for size in range(230, 256):
        members += [header(f"full-{size}/{number:03d}{'f' * (size - 3)}") for number in range(40)]
    convert(make_tar(*members), tmp_path / "blob")
    found = Image(tmp_path / "blob")
    with mounted(tmp_path / "blob", tmp_path / "m") as mount:
        seen = {os.fsencode(os.path.relpath(Path(folder) / name, mount)): None
                for folder, folders, files in os.walk(mount) for name in folders + files}  # fmt: skip
        assert seen.keys() == names(found)
        for number in range(0, 10_000, 97):
            assert (mount / f"wide/{number}-{'n' * (number % 200)}").read_bytes() == b"%d" % number


@needs_mount
def test_the_kernel_agrees_with_the_reader(tmp_path: Path) -> None:
    found = image(
        tmp_path, with_xattrs("x", user__a="1", trusted__b="2"), link("l", "t" * 200), hard("l2", "l"),
        header("f", uid=70_000, gid=4_294_967_294, mode=0o6711, pax_headers={"mtime": "-1.25"}),
        header("a", mode=0o654, pax_headers={"SCHILY.acl.access":
               "user::rw-,user:joe:rwx:1000,group::r--,mask::r-x,other::r--"}),
        header(".wh.gone"), (header("big"), b"z" * (HUGE + 1)), (header("after"), b"in the gap"),
    )  # fmt: skip
    with mounted(tmp_path / "blob", tmp_path / "m") as mount:
        seen = facts(mount)
        for name, record in seen.items():
            inode = found.paths[b"" if name == "." else os.fsencode(name)]
            assert record["xattrs"] == inode.xattrs, name
            assert (record["mode"], record["uid"], record["gid"]) == (inode.mode, inode.uid, inode.gid)
            assert (record["mtime"], record["nlink"]) == (inode.mtime_ns, inode.nlink)
            if stat.S_ISREG(inode.mode):
                assert (mount / name).read_bytes() == found.content(os.fsencode(name))
    assert len(seen) == len(found.paths)


def test_large_files_start_at_two_mib_and_small_ones_fill_the_gaps(tmp_path: Path) -> None:
    members = [
        (header(f"{number}"), bytes([number]) * size) for number, size in enumerate([10, HUGE, 10, HUGE + 1, HUGE - 1])
    ]
    found = image(tmp_path, *members)
    starts = {name: inode.extents[0][1] for name, inode in found.paths.items() if name}
    assert starts[b"1"] % HUGE == starts[b"3"] % HUGE == 0
    assert 0 < starts[b"0"] < starts[b"2"] < starts[b"1"]
    assert (tmp_path / "blob").stat().st_size == 6 * HUGE  # the last file has 512 blocks: it is large, too


def test_one_digest_whatever_the_hash_seed(tmp_path: Path) -> None:
    members = [with_xattrs(f"d{n % 13}/f{n}", user__b=str(n), user__a="x") for n in range(300)]
    (tmp_path / "t.tar").write_bytes(make_tar(*members, header(".wh.a"), link("l", "t"), hard("h", "d0/f0")))
    program = (
        "import hashlib, sys; from pathlib import Path; from tests.sharedcache.tarkit import convert;"
        "print(convert(Path(sys.argv[1]), Path(sys.argv[2])));"
        "print(hashlib.file_digest(open(sys.argv[2], 'rb'), 'sha256').hexdigest())"
    )  # fmt: skip
    seen = set()
    for seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "t.tar"), str(tmp_path / f"blob{seed}")],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=60,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1
