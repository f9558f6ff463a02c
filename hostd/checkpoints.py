"""This host's checkpoints: taken from running sandboxes, kept in the store, loaded while sandboxes are restored.

    store: one CHECKPOINT object each, in the tenant's own sharing domain; meta.name is the checkpoint's id
    pin "checkpoint/<id>": that object, and the layers that its guest has

A checkpoint is there once it is pinned: of a crash before that the next start leaves nothing. Its memory stays open
while a sandbox restored from it lives, and LINGER_S longer, so that whoever is restored next shares pages with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from hostd.checkpoint import CheckpointAbout, LayerName, Wanted
from hostd.drivers.contract import Checkpointing, CheckpointMemory, TakenCheckpoint
from hostd.errors import CannotCheckpoint, CheckpointUnusable, HostdError, InvalidSpec
from hostd.images import domain_of
from hostd.spec import Command, SandboxSpec
from hostd.tasks import to_its_end
from sharedcache.errors import CacheError, NotFound
from sharedcache.objects import FileMeta, ObjectKind, StoredObject
from sharedcache.store import Store

log = logging.getLogger("sandloom.hostd.checkpoints")

PIN_PREFIX = "checkpoint/"
LINGER_S = 60.0
TEND_S = 5.0


@dataclass(frozen=True)
class StoredCheckpoint:
    """One that is there. `size_bytes` is what its blob takes on disk."""

    about: CheckpointAbout
    stored: StoredObject
    size_bytes: int


@dataclass
class _Open:
    """`users` live from it; `borrowed` counts restores under way, which need it open; `doomed`: closed after them."""

    memory: CheckpointMemory
    users: set[str] = field(default_factory=set)
    unused_since_s: float = 0.0
    borrowed: int = 0
    doomed: bool = False

    def close(self) -> None:
        """As soon as nobody is being restored from it."""
        self.doomed = True
        if self.borrowed == 0:
            self.memory.close()


class Taking(Protocol):
    """Takes a checkpoint of one sandbox's engine."""

    async def __call__(self, checkpointing: Checkpointing) -> TakenCheckpoint: ...


class Checkpoints:
    """See the module. Its owner runs run(). `awaited` tells of which checkpoints sandboxes are about to start."""

    def __init__(
        self,
        store: Store,
        checkpointing: Callable[[], Checkpointing | None],
        now_s: Callable[[], float],
        awaited: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._store, self._driver, self._now_s, self._awaited = store, checkpointing, now_s, awaited
        self._known: dict[str, StoredCheckpoint] = {}
        self._open: dict[str, _Open] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def _checkpointing(self) -> Checkpointing:
        driver = self._driver()
        if driver is None:
            raise CannotCheckpoint("this host runs no class of sandbox that can be checkpointed")
        return driver

    # Their owner.

    async def recover(self) -> None:
        """Finds what is in the store. Before anything else."""
        if self._driver() is not None:
            await asyncio.to_thread(self._recover)

    def _recover(self) -> None:
        pins = {owner: keys for owner, keys in self._store.pins().items() if owner.startswith(PIN_PREFIX)}
        for stored in self._store.objects():
            if stored.kind is not ObjectKind.CHECKPOINT or not isinstance(stored.meta, FileMeta):
                continue
            owner = PIN_PREFIX + stored.meta.name
            if stored.key not in pins.get(owner, ()):
                self._store.remove(stored.key)  # a crash came before it was there
                continue
            try:
                about = CheckpointAbout.decode(self._checkpointing().read_about(stored.path), stored.meta.name)
            except (HostdError, OSError) as error:
                log.warning("checkpoint %s is passed over: %s", stored.meta.name, error)
                continue
            self._known[about.id] = _found(about, stored)
        for owner in pins:
            if owner.removeprefix(PIN_PREFIX) not in self._known:
                self._store.unpin(owner)

    async def run(self) -> None:
        """Lets go of memory that nobody uses any more; of all of it when cancelled."""
        try:
            while True:
                await asyncio.sleep(TEND_S)
                self.tend()
                try:
                    await self.drop_ephemeral()
                except (CacheError, OSError) as error:
                    log.warning("a fork's checkpoint cannot be removed now: %s", error)
        finally:
            for key in list(self._open):
                self._close(key)

    def tend(self) -> None:
        """Closes what nobody has used for LINGER_S."""
        for key, opened in list(self._open.items()):
            if not opened.users and self._now_s() - opened.unused_since_s >= LINGER_S:
                self._close(key)

    async def drop_ephemeral(self) -> None:
        """Removes forks' checkpoints that no sandbox is about to start from."""
        awaited = self._awaited()
        for known in self.all():
            old = self._now_s() - known.about.created_at_s >= LINGER_S
            if known.about.ephemeral and old and known.about.id not in awaited:
                await self.remove(known.about.id)

    def _close(self, key: str) -> None:
        opened = self._open.pop(key, None)
        if opened is not None:
            opened.close()

    # What is there.

    def all(self) -> list[StoredCheckpoint]:
        """Oldest first."""
        return sorted(self._known.values(), key=lambda each: (each.about.created_at_s, each.about.id))

    def find(self, key: str) -> StoredCheckpoint:
        """By id. CheckpointUnusable (reason CheckpointMissing) when it is not on this host."""
        if key not in self._known:
            raise CheckpointUnusable(f"there is no checkpoint {key} on this host", reason="CheckpointMissing")
        return self._known[key]

    # Making and removing.

    async def make(self, wanted: Wanted, spec: SandboxSpec, command: Command, taking: Taking) -> StoredCheckpoint:
        """Takes a checkpoint and keeps it. Idempotent by its id. CannotCheckpoint, CheckpointFailed, NotRunning;
        OutOfSpace of the store. Whatever fails, nothing of it stays."""
        key, name = wanted.id, wanted.name
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key in self._known:
                return self._known[key]
            if any(each.about.name == name and each.about.spec.tenant == spec.tenant for each in self.all()):
                raise InvalidSpec(f"there is a checkpoint {name} already: choose another name", reason="NameTaken")
            layers = await asyncio.to_thread(self._layers, spec)
            await asyncio.to_thread(self._store.require_space, spec.resources.memory_max_mib << 20)
            taken = await taking(self._checkpointing())
            about = CheckpointAbout(
                key, name, spec, command, layers, taken.form, taken.offsets, taken.pause_s, self._now_s(),
                wanted.image, wanted.ephemeral,
            )  # fmt: skip
            return await to_its_end(self._kept(about, taken))

    async def _kept(self, about: CheckpointAbout, taken: TakenCheckpoint) -> StoredCheckpoint:
        """In the store and known here, or neither."""
        try:
            stored = await asyncio.to_thread(self._keep, about, taken)
        except BaseException:
            taken.memory.close()
            raise
        self._open[about.id] = _Open(taken.memory, unused_since_s=self._now_s())
        self._known[about.id] = _found(about, stored)
        return self._known[about.id]

    def _layers(self, spec: SandboxSpec) -> tuple[LayerName, ...]:
        try:
            image = self._store.get_image(domain_of(spec.tenant), spec.image_digest)
        except NotFound as error:
            raise CannotCheckpoint(
                f"the image of sandbox {spec.name} was removed: import it again ({error})"
            ) from error
        return tuple(LayerName(layer.digest, layer.volume_uuid.hex(), layer.size_bytes) for layer in image.layers)

    def _keep(self, about: CheckpointAbout, taken: TakenCheckpoint) -> StoredObject:
        domain = domain_of(about.spec.tenant)
        with self._store.hold() as hold, self._store.stage(taken.memory.held_bytes()) as staging:
            taken.memory.write(about.encode(), staging.file)
            meta = FileMeta(about.id, about.name)
            stored = self._store.publish(staging, domain=domain, kind=ObjectKind.CHECKPOINT, meta=meta, hold=hold)
            layers = [self._store.get(domain, layer.digest, hold=hold).key for layer in about.layers]
            self._store.pin(PIN_PREFIX + about.id, [stored.key, *layers])
            return stored

    async def remove(self, key: str) -> None:
        """Forgets it; sandboxes restored from it live on. Idempotent. It is known until nothing of it is left, so that
        what fails on the way (CacheError, OSError) is done by the next call."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            known = self._known.get(key)
            if known is None:
                return
            self._close(key)
            await asyncio.to_thread(self._store.unpin, PIN_PREFIX + key)
            await asyncio.to_thread(self._store.remove, known.stored.key)
            del self._known[key]
        self._locks.pop(key, None)

    # Using.

    @asynccontextmanager
    async def memory(self, key: str, user: str) -> AsyncIterator[CheckpointMemory]:
        """The checkpoint's memory for sandbox `user`, loaded and verified when it is not open yet. It stays in use
        until release(), unless the block fails. CheckpointUnusable."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            opened = await to_its_end(self._opened(key))
            opened.users.add(user)
            opened.borrowed += 1
        try:
            yield opened.memory
        except BaseException:
            self.release(key, user)
            raise
        finally:
            opened.borrowed -= 1
            if opened.doomed:
                opened.close()

    async def _opened(self, key: str) -> _Open:
        stored = self.find(key).stored
        if key not in self._open:
            try:
                item = await asyncio.to_thread(self._store.get, stored.domain, stored.digest)
                memory = await asyncio.to_thread(self._checkpointing().load, item.path)
            except (CacheError, OSError) as error:
                raise CheckpointUnusable(
                    f"checkpoint {key}: {error}; make it anew", reason="CheckpointDamaged"
                ) from error
            self._open[key] = _Open(memory, unused_since_s=self._now_s())
        return self._open[key]

    def let_go(self, key: str) -> None:
        """Closes the memory of one that nobody uses, instead of keeping it for the next. Idempotent."""
        opened = self._open.get(key)
        if opened is not None and not opened.users:
            self._close(key)

    def release(self, key: str, user: str) -> None:
        """Sandbox `user` has ended. Idempotent; also of checkpoints that are gone."""
        opened = self._open.get(key)
        if opened is not None and user in opened.users:
            opened.users.discard(user)
            opened.unused_since_s = self._now_s()

    async def adopt(self, key: str, user: str, pid: int) -> None:
        """A restored sandbox outlived a former hostd: its memory is opened again from its own process."""
        if key not in self._known:
            return
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._open:
                try:
                    memory = await asyncio.to_thread(self._checkpointing().load_of, self._known[key].stored.path, pid)
                except (HostdError, OSError) as error:
                    log.warning("checkpoint %s of pid %d is not taken over: %s", key, pid, error)
                    return
                self._open[key] = _Open(memory)
            self._open[key].users.add(user)


def _found(about: CheckpointAbout, stored: StoredObject) -> StoredCheckpoint:
    return StoredCheckpoint(about, stored, stored.path.stat().st_blocks * 512)
