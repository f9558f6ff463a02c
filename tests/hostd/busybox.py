"""A small real image: a root filesystem of busybox and its applets, as a tar."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

APPLETS = (
    "sh", "cat", "echo", "printf", "sleep", "env", "pwd", "stty", "kill", "seq", "head", "dd", "ls", "id", "hostname",
    "grep", "awk", "mount", "sha256sum", "tail", "test", "true", "false", "wc", "free", "touch", "mknod", "yes", "ps",
)  # fmt: skip
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"


def busybox() -> Path | None:
    """A static busybox of this machine's; None when there is none (Debian: busybox-static)."""
    found = shutil.which("busybox")
    return Path(found) if found else None


def rootfs_tar(program: Path, extra: dict[str, bytes] | None = None) -> bytes:
    """The image's only layer. `extra` are more files, by path."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in ("bin", "etc", "root", "tmp", "proc", "sys", "dev"):
            _add(tar, folder, b"", tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755)
        _add(tar, "bin/busybox", program.read_bytes(), tarfile.REGTYPE, 0o755)
        for applet in APPLETS:
            _add(tar, f"bin/{applet}", b"", tarfile.SYMTYPE, 0o777, link="busybox")
        _add(tar, "etc/passwd", PASSWD, tarfile.REGTYPE, 0o644)
        for path, data in (extra or {}).items():
            _add(tar, path, data, tarfile.REGTYPE, 0o644)
    return out.getvalue()


def files_tar(files: dict[str, bytes]) -> bytes:
    """A layer of nothing but these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in files.items():
            _add(tar, path, data, tarfile.REGTYPE, 0o644)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes, mode: int, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.linkname = kind, mode, len(data), link
    tar.addfile(member, io.BytesIO(data) if data else None)
