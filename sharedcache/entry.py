"""One member of a layer's tar, fully validated: what `tar` yields and `tree` takes."""

from __future__ import annotations

from typing import NamedTuple

from sharedcache.sparse import SparseMap

# Entry kinds. 1..7 are the file types of a directory entry on disk too.
REGULAR, DIRECTORY, CHARACTER, BLOCK, FIFO, SOCKET, SYMLINK, HARDLINK = range(1, 9)

Xattrs = tuple[tuple[bytes, bytes], ...]


class Entry(NamedTuple):
    """One member. `path` as stored. `size` counts the stored data bytes; a sparse file's apparent size
    is `sparse.size`. `link` is a hard link's target path or a symbolic link's target, `device` (major, minor).
    """

    kind: int
    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_s: int
    mtime_ns: int
    size: int
    link: bytes
    device: tuple[int, int]
    xattrs: Xattrs
    sparse: SparseMap | None
