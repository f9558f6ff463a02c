"""Files that survive a crash: the only place of this package that orders writes by fsync.

Promise: after `write_json` or `commit_dir` returned, the new name is on disk with all its bytes; a crash
before that leaves the old state (or the old name), never a part of the new one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

from sharedcache.errors import CacheError, OutOfSpace, StoreBusy

_MAX_RECORD_BYTES = 4 << 20
_PART = ".part"


class full_disk_named:
    """Turns ENOSPC and EDQUOT into OutOfSpace."""

    def __init__(self, path: object) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"{self._path}: the disk is full while writing; free space and retry") from error


def sync_dir(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(folder: Path, mode: int) -> None:
    """Creates `folder` (its parent exists) with exactly `mode`, whatever the umask; fine when it is there."""
    try:
        with full_disk_named(folder):
            folder.mkdir()
    except FileExistsError:
        if folder.is_symlink() or not folder.is_dir():
            raise CacheError(f"{folder}: is not a folder; move it away") from None
        folder.chmod(mode)
        return
    folder.chmod(mode)
    sync_dir(folder.parent)


def write_bytes(path: Path, data: bytes, mode: int) -> None:
    """A new file with `data`, synced; its name is not yet durable (sync its folder). OutOfSpace: it is not there."""
    with full_disk_named(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def encode(body: object) -> bytes:
    """Canonical JSON: sorted keys, no blanks, so that equal values are equal bytes."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("utf-8")


def write_json(path: Path, body: object) -> None:
    """Replaces `path` (0600) by `body` atomically and durably. One writer a path at a time. OutOfSpace."""
    part = path.with_name(path.name + _PART)
    part.unlink(missing_ok=True)
    write_bytes(part, encode(body), 0o600)
    part.replace(path)
    sync_dir(path.parent)


def read_json(path: Path) -> object:
    """The JSON in `path`; None when it is not (all of) a JSON text: the caller says what that means."""
    with path.open("rb") as file:
        data = file.read(_MAX_RECORD_BYTES + 1)
    if len(data) > _MAX_RECORD_BYTES:
        return None
    try:
        body: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body


def remove_file(path: Path) -> None:
    """Removes `path` durably; fine when it is gone."""
    path.unlink(missing_ok=True)
    sync_dir(path.parent)


def commit_dir(staged: Path, final: Path) -> None:
    """Moves the folder `staged` (its files synced) to `final` in one step.

    FileExistsError when it is taken; OutOfSpace.
    """
    sync_dir(staged)
    try:
        with full_disk_named(final):
            staged.rename(final)
    except OSError as error:
        if final.exists():
            raise FileExistsError(error.errno, "exists", str(final)) from error
        raise
    sync_dir(final.parent)


def sweep(folder: Path) -> None:
    """Removes everything in `folder`: what a crash left behind."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sweep_parts(folder: Path) -> None:
    """Removes what an interrupted `write_json` left in `folder`."""
    for entry in folder.glob(f"*{_PART}"):
        entry.unlink()


def take_lock(path: Path) -> int:
    """Locks the file `path` for as long as the returned descriptor is open. StoreBusy names who has it; OutOfSpace."""
    with full_disk_named(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise StoreBusy(f"{path.parent}: process {holder} has this store open; stop it or wait for it") from None
        except BaseException:
            os.close(fd)
            raise
    return fd
