"""This host's templates: made in the background, kept in the store, loaded into sealed memory when they are cloned.

    store: one TEMPLATE object each, in its sharing domain; meta.name is the template's key

A key is in one of four states here: absent, being made (one task, however many starts ask for it), ready (in the
store), loaded (its sealed memfds are open). A failed making is tried again after a back-off; starts boot cold
meanwhile. What is loaded and idle is dropped; what is in the store goes by the store's own rules.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from hostd.drivers.qemu import templateblob
from hostd.drivers.qemu.template import TemplateUse, evictable, is_hot
from hostd.drivers.qemu.templateblob import FrozenGuest, TemplateMemory
from hostd.errors import HostdError, TemplateUnusable
from hostd.tasks import OwnedTasks
from sharedcache.domains import Domain
from sharedcache.errors import CacheError
from sharedcache.objects import FileMeta, ObjectKind, StoredObject
from sharedcache.store import Store

log = logging.getLogger("sandloom.hostd.templates")

RETRY_S = 30.0
STARTS_KEPT = 16
TEND_S = 60.0

Make = Callable[[], Awaitable[FrozenGuest]]
"""Boots the template and freezes it; called at most once at a time for a key."""

Verify = Callable[[TemplateMemory], Awaitable[None]]
"""Makes one clone of it and hears its agent answer. HostdError when that does not work."""

Tell = Callable[[str, str], None]
"""Takes (reason, message) for the event log."""


@dataclass
class _Loaded:
    memory: TemplateMemory
    last_used_s: float
    live_clones: int = 0


@dataclass
class _Known:
    """What is known of a key between calls."""

    stored: StoredObject | None = None
    loaded: _Loaded | None = None
    making: asyncio.Task[None] | None = None
    failed_at_s: float | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Templates:
    """Use as an async context manager: on the way out makings are cancelled and memory is let go of."""

    def __init__(self, store: Store, tell: Tell, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._tell, self._clock = store, tell, clock
        self._known: dict[str, _Known] = {}
        self._starts: dict[str, deque[float]] = {}
        self._tasks = OwnedTasks()
        self._one_at_a_time = asyncio.Semaphore(1)  # a boot is CPU-bound, and templates can wait
        for stored in store.objects():
            if stored.kind is ObjectKind.TEMPLATE and isinstance(stored.meta, FileMeta):
                self._known[stored.meta.name] = _Known(stored)

    async def __aenter__(self) -> Templates:
        await self._tasks.__aenter__()
        self._tasks.spawn(self._tend(), name="templates")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.__aexit__(None, None, None)
        for known in self._known.values():
            self._unload(known)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            self.drop_idle()

    def ready(self) -> dict[str, bool]:
        """Of each known key whether it can be cloned now; False while it is being made."""
        return {
            key: known.stored is not None
            for key, known in self._known.items()
            if known.stored is not None or known.making is not None
        }

    def note_start(self, image_digest: str) -> bool:
        """Counts a start of an image; whether it is hot enough for a template of its own now."""
        starts = self._starts.setdefault(image_digest, deque(maxlen=STARTS_KEPT))
        starts.append(self._clock())
        return is_hot(starts, self._clock())

    def want(self, key: str, domain: Domain, name: str, make: Make, verify: Verify) -> None:
        """Has the template made in the background unless it is there, on its way, or failed a moment ago."""
        known = self._known.setdefault(key, _Known())
        recently = known.failed_at_s is not None and self._clock() - known.failed_at_s < RETRY_S
        if known.stored is None and known.making is None and not recently:
            known.making = self._tasks.spawn(
                self._make(key, known, domain, name, make, verify), name=f"template {key[:12]}"
            )

    async def _make(self, key: str, known: _Known, domain: Domain, name: str, make: Make, verify: Verify) -> None:
        begin_s = self._clock()
        try:
            async with self._one_at_a_time:
                with await make() as frozen:
                    memory = await asyncio.to_thread(frozen.seal)
                    try:
                        await verify(memory)
                        stored = await asyncio.to_thread(self._publish, key, domain, memory)
                    except BaseException:
                        memory.close()
                        raise
            known.stored, known.loaded = stored, _Loaded(memory, self._clock())
        except (HostdError, CacheError, OSError) as error:
            known.failed_at_s = self._clock()
            self._tell("TemplateFailed", f"template {key[:12]} ({name}): {error}; sandboxes boot cold")
        else:
            seconds, held_mib = self._clock() - begin_s, memory.held_bytes() >> 20
            self._tell("TemplateReady", f"template {key[:12]} ({name}): {held_mib} MiB, made in {seconds:.1f} s")
        finally:
            known.making = None

    def _publish(self, key: str, domain: Domain, memory: TemplateMemory) -> StoredObject:
        with self._store.stage(memory.held_bytes()) as staging:
            templateblob.write_blob(memory, staging.file)
            meta = FileMeta(key, "template")
            return self._store.publish(staging, domain=domain, kind=ObjectKind.TEMPLATE, meta=meta)

    async def until_made(self, key: str) -> None:
        """Returns when `key` is not being made (any more), however that ended. Making bounds itself."""
        known = self._known.get(key)
        if known is not None and known.making is not None:
            await asyncio.wait({known.making})

    async def settle(self) -> None:
        """Returns when nothing is being made any more."""
        while making := [known.making for known in self._known.values() if known.making is not None]:
            await asyncio.wait(making)

    async def take(self, key: str) -> TemplateMemory:
        """Its memory, loaded and verified when it is not yet, for the caller to close: another clone's failure may
        have the template forgotten meanwhile. give() says when the clone has ended. TemplateUnusable when it is not
        there or damaged: it is forgotten then."""
        known = self._known.get(key)
        if known is None or known.stored is None:
            raise TemplateUnusable(f"there is no template {key[:12]} here")
        async with known.loading:
            if known.loaded is None:
                known.loaded = await self._load(key, known, known.stored)
            memory = known.loaded.memory.duplicate()
            known.loaded.live_clones += 1
            known.loaded.last_used_s = self._clock()
            return memory

    async def _load(self, key: str, known: _Known, stored: StoredObject) -> _Loaded:
        try:
            item = await asyncio.to_thread(self._store.get, stored.domain, stored.digest)
            memory = await asyncio.to_thread(templateblob.load, item.path)
        except (CacheError, TemplateUnusable, OSError) as error:
            known.stored = None
            raise TemplateUnusable(f"template {key[:12]}: {error}; it is made anew") from error
        return _Loaded(memory, self._clock())

    def give(self, key: str) -> None:
        """One clone less lives."""
        known = self._known.get(key)
        if known is not None and known.loaded is not None:
            known.loaded.live_clones = max(0, known.loaded.live_clones - 1)
            known.loaded.last_used_s = self._clock()

    async def adopt(self, key: str, pid: int) -> None:
        """A clone that outlived a former hostd: its template's memory is taken from it, so that the clones to come
        share pages with it. Nothing happens when the template is not in the store any more."""
        known = self._known.get(key)
        if known is None or known.stored is None:
            return
        async with known.loading:
            if known.loaded is None:
                try:
                    item = await asyncio.to_thread(self._store.get, known.stored.domain, known.stored.digest)
                    memory = await asyncio.to_thread(templateblob.from_clone, item.path, pid)
                except (CacheError, TemplateUnusable, OSError) as error:
                    log.warning("template %s of pid %d is not taken over: %s", key[:12], pid, error)
                    return
                known.loaded = _Loaded(memory, self._clock())
            known.loaded.live_clones += 1

    def forget(self, key: str) -> None:
        """It did not work: the next start makes it anew."""
        known = self._known.get(key)
        if known is not None and known.making is None:
            self._unload(known)
            known.stored, known.failed_at_s = None, self._clock()

    def drop_idle(self, *, pressed: bool = False) -> list[str]:
        """Lets go of loaded memory that nobody needs; the keys. The blobs stay in the store."""
        now_s = self._clock()
        uses = [
            TemplateUse(key, known.loaded.memory.ram_bytes, known.loaded.live_clones, False, known.loaded.last_used_s)
            for key, known in self._known.items()
            if known.loaded is not None
        ]
        keys = evictable(uses, now_s, pressed=pressed)
        for key in keys:
            self._unload(self._known[key])
        return keys

    @staticmethod
    def _unload(known: _Known) -> None:
        if known.loaded is not None:
            known.loaded.memory.close()
            known.loaded = None
