"""What `image import` uploads, as chunks: a file, standard input, or an OCI layout folder written as a tar.

A folder becomes one tar on the fly, never on disk: headers and file bytes, names in order, no times and no owners,
so that the same folder is the same upload.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from controlplane.cli.errors import CliError

CHUNK_BYTES = 1 << 20  # the most that one message may hold
_SUFFIXES = re.compile(r"(\.(tar|oci|docker))?(\.(gz|xz|zst|zstd|bz2))?$|\.t[gx]z$", re.IGNORECASE)


@dataclass(frozen=True)
class Upload:
    """Where the bytes come from; `total_bytes` is 0 when that is not known."""

    name: str
    total_bytes: int
    path: Path | None  # None: standard input


def image_name(path: Path) -> str:
    """A name for what has none: the file's, without what says how it is packed."""
    return re.sub(r"[^a-z0-9._-]+", "-", _SUFFIXES.sub("", path.name).lower()).strip("-._")


def plan(path: Path, name: str) -> Upload:
    """CliError when the path cannot be what is uploaded: missing, no file, a folder that is no OCI layout."""
    if path == Path("-"):
        return Upload(name, 0, None)
    if path.is_dir():
        if not (path / "oci-layout").is_file() or not (path / "index.json").is_file():
            raise CliError(
                "not an OCI layout", f"{path} (no oci-layout and index.json in it)",
                f"for a root filesystem: tar -C {path} -c . | sandloom image import - --name NAME",
            )  # fmt: skip
        return Upload(name or image_name(path), sum(map(len_as_tar, layout_files(path))) + 1024, path)
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise CliError("an image cannot be read", f"{path} ({error.strerror})", "check the path") from error
    return Upload(name or image_name(path), size, path)


def layout_files(folder: Path) -> list[Path]:
    """The files of an OCI layout that count, in the order they are sent."""
    blobs = sorted(path for path in (folder / "blobs").glob("*/*") if path.is_file())
    return [folder / "oci-layout", folder / "index.json", *blobs]


def len_as_tar(path: Path) -> int:
    """A member's size in a tar: header and padded bytes."""
    return 512 + -(-path.stat().st_size // 512) * 512


def chunks(upload: Upload) -> Iterator[bytes]:
    """The bytes, at most CHUNK_BYTES at a time; standard input is not this function's. OSError, CliError."""
    assert upload.path is not None
    if upload.path.is_dir():
        yield from _as_tar(upload.path)
        return
    with upload.path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _as_tar(folder: Path) -> Iterator[bytes]:
    for path in layout_files(folder):
        with path.open("rb") as file:
            size = path.stat().st_size
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size, info.mode = size, 0o644
            yield info.tobuf(tarfile.USTAR_FORMAT)
            yield from _exactly(file, size, path)
            if size % 512:
                yield bytes(512 - size % 512)
    yield bytes(1024)


def _exactly(file: IO[bytes], size: int, path: Path) -> Iterator[bytes]:
    while size:
        data = file.read(min(CHUNK_BYTES, size))
        if not data:
            raise CliError("an image changed while it was read", f"{path} became shorter", "try again")
        size -= len(data)
        yield data
