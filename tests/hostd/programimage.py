"""A layer of this machine's own programs, with the libraries that they load: for tests with real software in it."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

PATH = "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"
LEFT_OUT = re.compile(
    r"/(__pycache__|test|tests|idlelib|ensurepip|lib2to3|tkinter|pydoc_data|dist-packages|distutils)/"
)
ACCOUNTS = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n"
GROUPS = b"root:x:0:\nnogroup:x:65534:\nwww-data:x:33:\n"


def which(name: str) -> Path | None:
    """Where a program is; None when this machine has it not."""
    found = shutil.which(name, path=PATH)
    return Path(found) if found else None


def libraries(program: Path) -> set[Path]:
    """What the loader says that it needs, the loader itself too."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=60, check=False)
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)}


def programs_tar(names: Iterable[str], folders: Iterable[Path] = (), extra: dict[str, bytes] | None = None) -> bytes:
    """A layer with `names`, all that they load, and what is in `folders` (a standard library) but for its tests."""
    programs = [path for path in map(which, names) if path is not None]
    inside = [path for folder in folders for path in sorted(folder.rglob("*")) if not LEFT_OUT.search(f"{path}/")]
    wanted = {*programs, *inside}
    for path in [*programs, *(one for one in inside if ".so" in one.name)]:
        wanted |= libraries(path)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in sorted(wanted):
            if path.is_file():  # what a link leads to, under the link's name
                _add(tar, str(path).lstrip("/"), path.read_bytes(), path.stat().st_mode & 0o755)
        files = {"etc/passwd": ACCOUNTS, "etc/group": GROUPS, **(extra or {})}
        for name, data in files.items():
            _add(tar, name, data, 0o755)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))
