"""The published objects of one store and what this process knows about them.

Promise: `verify` returns only for an object whose bytes this process hashed and found right; one that is
wrong leaves the shelf for the quarantine in the same call.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

from sharedcache import blobs, durable
from sharedcache.domains import DomainBook
from sharedcache.errors import CacheError, CorruptObject, NotFound
from sharedcache.layout import Layout
from sharedcache.objects import StoredObject

_HASH_LOCKS = 16
# What says that the object itself is bad; anything else (EMFILE, ENOMEM, …) is this process's own trouble.
_BAD_OBJECT = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EIO, errno.EUCLEAN, errno.EBADMSG)
)


class Shelf:
    """Objects by key. Its own short lock guards the maps; hashing happens under one lock a few keys share."""

    def __init__(self, layout: Layout, book: DomainBook, clock: Callable[[], float]) -> None:
        """Reads every object's record; damaged ones go to quarantine. Nothing is hashed yet."""
        self._layout = layout
        self._book = book
        self._clock = clock
        self._lock = threading.Lock()
        self._hash_locks = tuple(threading.Lock() for _ in range(_HASH_LOCKS))
        self._items = blobs.load(layout, book, clock())
        self._verified: dict[str, blobs.Identity] = {}

    def find(self, key: str) -> StoredObject | None:
        """The object with `key`, unverified, or None."""
        with self._lock:
            return self._items.get(key)

    def all(self) -> list[StoredObject]:
        """All objects in order of their keys, unverified."""
        with self._lock:
            return [self._items[key] for key in sorted(self._items)]

    def add(self, staged: Path, item: StoredObject, identity: blobs.Identity) -> None:
        """Publishes the synced folder `staged` as `item`, whose blob was hashed when it had `identity`.

        FileExistsError when the name is taken. Durable when this returns.
        """
        with self._lock:
            self._layout.create_shelf(item.key)
            durable.commit_dir(staged, self._layout.object(item.key))
            self._items[item.key] = item
            self._verified[item.key] = identity

    def detach(self, key: str) -> Path:
        """Takes the object away in one step; the caller removes the folder that is returned."""
        with self._lock:
            target = blobs.detach(self._layout, key)
            del self._items[key]
            self._verified.pop(key, None)
            return target

    def verify(self, item: StoredObject, *, again: bool = False) -> None:
        """Hashes `item` unless that was done and its identity is the same (with `again`: always).

        CorruptObject when it is wrong, NotFound when it was removed meanwhile, CacheError when it cannot be
        read for a reason that is not its own.
        """
        with self._hash_locks[int(item.key[:2], 16) % _HASH_LOCKS]:
            why = self._check(item, again)
        if why:
            raise CorruptObject(f"{item.kind} {item.digest} of {item.domain} is corrupt: {why}; import it again")

    def _check(self, item: StoredObject, again: bool) -> str:
        measured: blobs.Measured | None = None
        try:
            with self._lock:
                known = self._verified.get(item.key)
            if not again and known is not None and known == blobs.identity(item.path):
                return ""
            measured = blobs.measure(item.path, self._book.ensure(item.domain).gid, in_passing=again)
            why = "" if measured.digest == item.digest else f"its bytes give {measured.digest}"
        except OSError as error:
            if error.errno not in _BAD_OBJECT:
                raise CacheError(f"{item.digest}: its blob cannot be read now: {error.strerror}") from error
            why = f"its blob cannot be read: {error.strerror}"
        with self._lock:
            if self._items.get(item.key) is not item:
                raise NotFound(f"{item.digest} was removed from {item.domain} meanwhile; import it again")
            if measured is not None and not why:
                self._verified[item.key] = measured.identity
                return ""
            del self._items[item.key]
            self._verified.pop(item.key, None)
            if item.path.parent.exists():
                blobs.quarantine(self._layout, item.path.parent, self._clock())
        return why
