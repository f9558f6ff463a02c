"""Making tars, converting them and looking at the result through the host kernel and erofs-utils."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sharedcache.convert import convert_layer
from sharedcache.layer import LayerMeta
from sharedcache.limits import Limits
from tests.sharedcache.image_reader import Image

needs_mount = pytest.mark.skipif(
    os.geteuid() != 0 or "erofs" not in Path("/proc/filesystems").read_text(),
    reason="needs root and a kernel with EROFS: the host's mount is the oracle",
)
needs_fsck = pytest.mark.skipif(shutil.which("fsck.erofs") is None, reason="needs fsck.erofs (apt install erofs-utils)")

Facts = dict[str, dict[str, Any]]


def header(name: str | bytes, **fields: Any) -> tarfile.TarInfo:
    """A TarInfo: `kind` is a type byte; other fields by tarfile's names."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.type = fields.pop("kind", tarfile.REGTYPE)
    info.mode = fields.pop("mode", 0o755 if info.type == tarfile.DIRTYPE else 0o644)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def make_tar(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], **options: Any) -> bytes:
    """A tar of headers and (header, content) pairs, in order; `options` as for tarfile.open."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", **{"format": tarfile.PAX_FORMAT, "errors": "surrogateescape", **options}
    ) as tar:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            if content:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def raw_header(name: bytes = b"f", **fields: bytes) -> bytes:
    """A 512-byte ustar header with any bytes in any field; the checksum fits unless given."""
    layout = (
        ("name", 100, name), ("mode", 8, b"0000644\0"), ("uid", 8, b"0000000\0"), ("gid", 8, b"0000000\0"),
        ("size", 12, b"00000000000\0"), ("mtime", 12, b"00000000000\0"), ("checksum", 8, b" " * 8), ("kind", 1, b"0"),
        ("link", 100, b""), ("magic", 8, b"ustar\00000"), ("uname", 32, b""), ("gname", 32, b""),
        ("major", 8, b"0000000\0"), ("minor", 8, b"0000000\0"), ("prefix", 155, b""), ("pad", 12, b""),
    )  # fmt: skip
    block = b"".join(fields.get(key, default).ljust(width, b"\0") for key, width, default in layout)
    if "checksum" in fields:
        return block
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


END = bytes(1024)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax_header(records: bytes, kind: bytes = b"x") -> bytes:
    return raw_header(b"pax", size=b"%011o\0" % len(records), kind=kind) + padded(records)


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total += len(str(total)) - len(str(length))
    return b"%d %s=%s\n" % (total, key, value)


def convert(tar: bytes | Path, blob: Path, limits: Limits | None = None) -> LayerMeta:
    """Convert into the file `blob`, and read that again by all the rules there are."""
    source = io.BytesIO(tar) if isinstance(tar, bytes) else tar.open("rb")
    with source, blob.open("w+b") as out:
        meta = convert_layer(source, out, limits=limits or Limits())
    Image(blob)
    return meta


def fsck(blob: Path, *, extract: bool = True) -> None:
    """erofs-utils checks the blob, with `extract` every file's data too (nothing is written)."""
    argv = ["fsck.erofs", *(["--extract"] if extract else []), str(blob)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def mounted(blob: Path, at: Path) -> Iterator[Path]:
    """The blob mounted read-only by the host's kernel."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", str(blob), str(at)], check=True, timeout=30)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True, timeout=30)


def facts(root: Path, *, whole_seconds: bool = False, times: bool = True) -> Facts:
    """Everything lstat, readlink, xattrs and reading tell, by path below `root` ("." for itself)."""
    found: Facts = {}
    groups: dict[tuple[int, int], str] = {}
    paths = [root, *(Path(folder) / name for folder, dirs, files in os.walk(root) for name in dirs + files)]
    for path in sorted(paths):
        info = path.lstat()
        name = str(path.relative_to(root))
        kind = stat.S_IFMT(info.st_mode)
        record: dict[str, Any] = {
            "mode": info.st_mode,
            "uid": info.st_uid,
            "gid": info.st_gid,
            "nlink": info.st_nlink,
        }
        if times:
            record["mtime"] = info.st_mtime_ns // 10**9 if whole_seconds else info.st_mtime_ns
        if kind == stat.S_IFREG:
            record.update(size=info.st_size, content=hash(path.read_bytes()) if info.st_size < 1 << 27 else None)
            record["same"] = groups.setdefault((info.st_dev, info.st_ino), name)
        elif kind == stat.S_IFLNK:
            record["target"] = path.readlink()
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            record["device"] = info.st_rdev
        names = os.listxattr(path, follow_symlinks=False)
        record["xattrs"] = {key: os.getxattr(path, key, follow_symlinks=False) for key in names}
        found[name] = record
    return found
