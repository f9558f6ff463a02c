"""Objects on disk: finding, hashing, removing and quarantining them. The store decides, this acts.

Owns `objects/<aa>/<key>/` after publication and `quarantine/<key>.<unix seconds>.<random>/`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from sharedcache import durable, objects
from sharedcache.digest import file_sha256
from sharedcache.domains import DomainBook
from sharedcache.layout import BLOB_MODE, BLOB_NAME, META_NAME, Layout
from sharedcache.objects import StoredObject


@dataclass(frozen=True)
class Identity:
    """Tells whether a file was touched since it was hashed. It is a tripwire, not a proof."""

    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Measured:
    """What hashing a blob showed."""

    digest: str
    identity: Identity


def identity(path: Path) -> Identity:
    """The identity of `path` itself (a symbolic link is never followed). OSError when it is gone."""
    return _identity(path.lstat())


def measure(path: Path, gid: int, *, in_passing: bool = False) -> Measured:
    """Reads all of `path` and hashes it; sets owner and mode right where they are not. `in_passing`: nobody is about to
    use it, so what nobody maps of it does not stay in the page cache.

    OSError when it is gone, unreadable, a symbolic link (ELOOP) or otherwise no regular file (ENXIO).
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb", buffering=0):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ENXIO, "it is no regular file", str(path))
        if stat.S_IMODE(status.st_mode) != BLOB_MODE or (status.st_uid, status.st_gid) != (0, gid):
            os.fchmod(fd, 0)
            os.fchown(fd, 0, gid)
            os.fchmod(fd, BLOB_MODE)
        before = _identity(os.fstat(fd))
        digest = "sha256:" + file_sha256(fd)
        if in_passing:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return Measured(digest, before)


def load(layout: Layout, book: DomainBook, now_s: float) -> dict[str, StoredObject]:
    """All objects whose record is sound, by key; the others are quarantined.

    A record is sound when its key is the key of its digest in its domain and names its own folder.
    """
    found: dict[str, StoredObject] = {}
    for folder in sorted(layout.objects.glob("??/*")):
        item = _read(folder, book)
        if item is None:
            quarantine(layout, folder, now_s)
        else:
            found[item.key] = item
    return found


def write_meta(folder: Path, item: StoredObject) -> None:
    """Puts the record of `item` into a staged folder, synced."""
    durable.write_bytes(folder / META_NAME, durable.encode(objects.encode(item)), 0o600)


def quarantine(layout: Layout, folder: Path, now_s: float) -> None:
    """Moves a bad object out of reach, kept for whoever looks into it. Who has it mapped keeps it mapped."""
    target = layout.quarantine / f"{folder.name}.{int(now_s)}.{secrets.token_hex(4)}"
    folder.rename(target)
    durable.sync_dir(folder.parent)
    durable.sync_dir(layout.quarantine)


def expire_quarantine(layout: Layout, now_s: float, keep_s: float) -> None:
    """Removes what has been in quarantine for `keep_s`."""
    for entry in layout.quarantine.iterdir():
        stamp = entry.name.rsplit(".", 2)[-2] if entry.name.count(".") >= 2 else "0"
        if stamp.isdigit() and now_s - int(stamp) < keep_s:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def detach(layout: Layout, key: str) -> Path:
    """Takes an object out of the tree in one step; its bytes wait in staging for their removal."""
    folder = layout.object(key)
    target = layout.staging / f"removed-{key}-{secrets.token_hex(4)}"
    folder.rename(target)
    durable.sync_dir(folder.parent)
    return target


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read(folder: Path, book: DomainBook) -> StoredObject | None:
    try:
        item = objects.decode(durable.read_json(folder / META_NAME), folder / BLOB_NAME)
    except (ValueError, OSError):
        return None
    record = book.find(item.domain)
    sound = record is not None and record.key(item.digest) == item.key == folder.name
    return item if sound and folder.parent.name == item.key[:2] else None
