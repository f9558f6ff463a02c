"""The store: verified, immutable blobs, shared inside a sharing domain and nowhere else.

Promise: what `get` returns was hashed, and found right, since this process opened the store; a name is
published with all of its bytes or not at all; nothing that a live record needs is ever removed.

    root/                          0711   VM uids pass through, nobody lists
      lock                         0600   flock: one process a root
      domains/<kind>@<id>.json     0600   secret and gid of a domain              (sharedcache.domains)
      objects/<aa>/<key>/          0711   aa = the key's first two digits
        blob                       0440   root:<domain's gid>
        meta.json                  0600   digest, domain, kind, LayerMeta …       (sharedcache.objects)
      images/<key>.json            0600   an image pins its layers                (sharedcache.images)
      pins/<quoted owner>.json     0600   what sandboxes and others need          (sharedcache.pins)
      staging/<random>/            0711   in a 0700 folder; swept by the next open (sharedcache.staging)
      quarantine/<key>.<time>.<n>/        objects that failed their digest; kept for a week

Commit: write staging/<r>/blob → chown, chmod, fsync → hash it → write and fsync meta.json → fsync the folder
→ rename it to objects/<aa>/<key> → fsync objects/<aa>. A kill before the rename leaves only staging, which
the next open sweeps; after it, a whole object. Since blob and record move in one rename, there is no third
state.

Thread safe. The lock is never held while a blob is hashed or written.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sharedcache import blobs, durable, gc
from sharedcache.domains import Domain, DomainBook, DomainKind, require_operator
from sharedcache.errors import CacheError, CorruptObject, NotAllowed, NotFound, OutOfSpace
from sharedcache.layer import LayerMeta
from sharedcache.layout import BLOB_NAME, Layout
from sharedcache.live import LiveRecords
from sharedcache.objects import ObjectKind, ObjectMeta, StoredObject, is_digest
from sharedcache.shelf import Shelf
from sharedcache.staging import Staging

_MIB = 1 << 20
_QUARANTINE_KEEP_S = 7 * 24 * 3600.0

PublicGate = Callable[[ObjectKind, str], bool]


class Store(LiveRecords):
    """One root on disk, held by one process. A context manager; its methods may be called from any thread."""

    def __init__(
        self,
        layout: Layout,
        lock_fd: int,
        *,
        clock: Callable[[], float],
        min_free_bytes: int,
        grace_s: float,
        public_gate: PublicGate | None,
    ) -> None:
        durable.sweep(layout.staging)
        domains = DomainBook(layout.domains)
        super().__init__(layout, domains, Shelf(layout, domains, clock))
        self._lock_fd = lock_fd
        self._clock = clock
        self._min_free_bytes = min_free_bytes
        self._grace_s = grace_s
        self._public_gate = public_gate
        self._used_at_s: dict[str, float] = {}

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        clock: Callable[[], float] = time.time,
        min_free_bytes: int = 512 * _MIB,
        grace_s: float = 3600.0,
        public_gate: PublicGate | None = None,
    ) -> Store:
        """Opens the store at `root` (created when missing) and sweeps what a crash left.

        `min_free_bytes` of the file system stay free whatever is imported. `grace_s` protects unpinned
        objects from `collect` after their last use. `public_gate(kind, digest)` has the last word on what
        may enter the public domain, e.g. a signature check. StoreBusy when another process holds it;
        CacheError when a record is damaged or this process may not give files to the domains' groups.
        """
        if os.geteuid() != 0:
            raise CacheError(f"{root}: the store gives blobs to groups of its own: run as root")
        layout = Layout(root)
        layout.create()
        lock_fd = durable.take_lock(layout.lock)
        try:
            return cls(
                layout,
                lock_fd,
                clock=clock,
                min_free_bytes=min_free_bytes,
                grace_s=grace_s,
                public_gate=public_gate,
            )
        except BaseException:
            os.close(lock_fd)
            raise

    def close(self) -> None:
        """Gives the root back. Blobs that are mapped stay mapped."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._lock_fd)

    def now_s(self) -> float:
        """What time it is for this store, in seconds since the epoch."""
        return self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- writing

    @contextmanager
    def stage(self, expected_bytes: int = 0) -> Iterator[Staging]:
        """A file to write a blob into; gone unless it was published. OutOfSpace, also while writing."""
        self.require_space(expected_bytes)
        with self._locked():
            staging = Staging.create(self._layout.staging, self.require_space)
        try:
            yield staging
        finally:
            staging.remove()

    def publish(
        self,
        staging: Staging,
        *,
        domain: Domain,
        kind: ObjectKind,
        meta: ObjectMeta,
        operator_signed: bool = False,
        hold: str | None = None,
    ) -> StoredObject:
        """Makes the staged blob an object of `domain`; durable when this returns.

        Idempotent: equal bytes in the same domain are one object, the first one. `hold` (from `hold()`)
        keeps it from `collect` until the caller has pinned it. The public domain takes only what the
        operator signed: NotAllowed without `operator_signed`, or when the store's gate says no. OutOfSpace.
        ValueError when `meta` is not of `kind`.
        """
        if (kind is ObjectKind.LAYER) != isinstance(meta, LayerMeta):
            raise ValueError(f"a {kind} cannot have {type(meta).__name__}")
        require_operator(domain, operator_signed)
        with self._locked():
            record = self._domains.ensure(domain)
        size_bytes = staging.seal(record.gid)
        measured = blobs.measure(staging.blob, record.gid)
        digest = measured.digest
        if isinstance(meta, LayerMeta) and meta.blob_bytes != size_bytes:
            raise ValueError(f"LayerMeta says {meta.blob_bytes} bytes, the blob has {size_bytes}")
        if domain.kind is DomainKind.PUBLIC and self._public_gate and not self._public_gate(kind, digest):
            raise NotAllowed(f"{digest}: the operator has not signed this {kind} for the public domain")
        key = record.key(digest)
        path = self._layout.object(key) / BLOB_NAME
        item = StoredObject(key, digest, kind, domain, path, size_bytes, self._clock(), meta)
        blobs.write_meta(staging.folder, item)
        while True:
            with self._locked():
                if hold is not None:
                    self._holds[hold].add(key)
                if self._shelf.find(key) is None:
                    self._shelf.add(staging.folder, item, measured.identity)
                    return item
            try:
                known = self.get(domain, digest)  # the one that is there must be sound, too
            except (CorruptObject, NotFound):
                continue  # it was quarantined: this copy replaces it
            if known.kind is not kind:
                raise ValueError(f"{digest} is in {domain} as a {known.kind}, so it cannot be a {kind}")
            return known

    def publish_bytes(
        self,
        data: bytes,
        *,
        domain: Domain,
        kind: ObjectKind,
        meta: ObjectMeta,
        operator_signed: bool = False,
    ) -> StoredObject:
        """`publish` for a blob in memory."""
        with self.stage(len(data)) as staging:
            staging.file.write(data)
            return self.publish(staging, domain=domain, kind=kind, meta=meta, operator_signed=operator_signed)

    def publish_file(
        self, path: Path, *, domain: Domain, kind: ObjectKind, meta: ObjectMeta, operator_signed: bool = False
    ) -> StoredObject:
        """`publish` for a copy of the file `path`. OSError when it cannot be read."""
        with path.open("rb") as source, self.stage(path.stat().st_size) as staging:
            shutil.copyfileobj(source, staging.file, _MIB)
            return self.publish(staging, domain=domain, kind=kind, meta=meta, operator_signed=operator_signed)

    def require_space(self, need_bytes: int) -> None:
        """Collects garbage when `need_bytes` do not fit above the floor. OutOfSpace if they still do not."""
        wanted_bytes = self._min_free_bytes + need_bytes
        free_bytes = self._free_bytes()
        # A blob has holes, so what a removal gives back shows only afterwards: as often as there is garbage.
        while free_bytes < wanted_bytes and self.collect(wanted_bytes - free_bytes):
            free_bytes = self._free_bytes()
        if free_bytes < wanted_bytes:
            raise OutOfSpace(
                f"{self._layout.root}: {free_bytes // _MIB} MiB are free, {need_bytes // _MIB} MiB are needed"
                f" and {self._min_free_bytes // _MIB} MiB must stay free; remove images or enlarge the disk"
            )

    def _free_bytes(self) -> int:
        status = os.statvfs(self._layout.root)
        return status.f_bavail * status.f_frsize

    # ---- reading

    def get(self, domain: Domain, digest: str, *, hold: str | None = None) -> StoredObject:
        """The object with `digest` in `domain`, hashed since the store was opened.

        The first call of a process reads the whole blob; later ones look at its identity only, and read it
        again when that changed. `hold`: as for `publish`. NotFound; CorruptObject when its bytes are wrong
        (it is in quarantine then).
        """
        if not is_digest(digest):
            raise ValueError(f"{digest!r} is no digest: sha256: and 64 lowercase hex digits")
        with self._locked():
            record = self._domains.find(domain)
            item = self._shelf.find(record.key(digest)) if record else None
            if item is None:
                raise NotFound(f"{digest} is not in {domain}; import it there")
            self._used_at_s[item.key] = self._clock()
            if hold is not None:
                self._holds[hold].add(item.key)
        self._shelf.verify(item)
        return item

    def objects(self) -> list[StoredObject]:
        """All objects, in order of their keys; not verified: `get` is for those to be used."""
        return self._shelf.all()

    def scrub(self) -> list[str]:
        """Hashes every object. Returns the keys that were wrong and are in quarantine now."""
        bad: list[str] = []
        for item in self.objects():
            try:
                self._shelf.verify(item, again=True)
            except CorruptObject:
                bad.append(item.key)
            except NotFound:
                pass  # collected meanwhile
        return bad

    def domain_gid(self, domain: Domain) -> int:
        """The group that may read the blobs of `domain`: stable, and never given to another domain."""
        with self._locked():
            return self._domains.ensure(domain).gid

    def remove(self, key: str) -> bool:
        """Removes an object at once, however lately it was used; False when somebody needs it, or it is not there."""
        with self._locked():
            if self._shelf.find(key) is None or any(key in keys for keys in self.pins().values()):
                return False
            folder = self._shelf.detach(key)
            self._used_at_s.pop(key, None)
        shutil.rmtree(folder)
        return True

    def collect(self, need_bytes: int | None = None) -> list[str]:
        """Removes objects that nobody needs and nobody used for `grace_s`; returns their keys.

        With `need_bytes`, the longest unused ones and no more than free that much.
        """
        folders: list[Path] = []
        with self._locked():
            now_s = self._clock()
            candidates = [
                gc.Candidate(item.key, item.size_bytes, max(item.created_at_s, self._used_at_s.get(item.key, 0.0)))
                for item in self._shelf.all()
            ]
            victims = gc.choose_victims(candidates, self.pins(), now_s, self._grace_s, need_bytes)
            for key in victims:
                folders.append(self._shelf.detach(key))
                self._used_at_s.pop(key, None)
            blobs.expire_quarantine(self._layout, now_s, _QUARANTINE_KEEP_S)
        for folder in folders:
            shutil.rmtree(folder)
        return list(victims)
