"""The engines' half of a watch: a bounded queue for each watcher, and how it is read. No engine's I/O.

The engine offers every commit's batch to every watcher. One that lags further than its queue is no longer live: it is
told nothing until it has caught up from what the engine keeps, so that a slow reader costs bounded memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from controlplane.errors import OperationError
from controlplane.store.contract import Batch

WATCH_QUEUE_BATCHES = 256


class Watcher:
    """One watch: `cursor` is up to where its batches were handed out or queued."""

    def __init__(self, prefix: str, after: int) -> None:
        self.prefix, self.cursor = prefix, after
        self.live = False  # batches come by `offer`; else they have to be caught up with
        self.queue: deque[Batch] = deque()
        self.woken = asyncio.Event()
        self.error: OperationError | None = None

    def filtered(self, batch: Batch) -> Batch:
        """What of a batch is under the watcher's prefix."""
        if not self.prefix:
            return batch
        return Batch(batch.revision, tuple(change for change in batch.changes if change.key.startswith(self.prefix)))

    def offer(self, batch: Batch) -> None:
        """Takes a commit's batch, unless it lags behind (it catches up with that one later) or has read it."""
        if self.live and batch.revision > self.cursor:
            mine = self.filtered(batch)
            if mine.changes and len(self.queue) >= WATCH_QUEUE_BATCHES:
                self.live = False
            else:
                self.cursor = batch.revision
                if mine.changes:
                    self.queue.append(mine)
                    self.woken.set()

    def fail(self, error: OperationError) -> None:
        """Ends the watch with `error`, after what is queued."""
        self.error = error
        self.woken.set()


async def follow(
    watcher: Watcher, progress_s: float, catch_up: Callable[[Watcher], Awaitable[list[Batch]]]
) -> AsyncIterator[Batch]:
    """The watcher's batches. `catch_up` gives the next ones of a watcher that is not live and moves its cursor, or
    makes it live; when it has nothing yet it waits a while for it."""
    while True:
        watcher.woken.clear()
        while watcher.queue:
            yield watcher.queue.popleft()
        if watcher.error is not None:
            raise watcher.error
        if not watcher.live:
            batches = await catch_up(watcher)
            for batch in batches:
                yield batch
            if not batches and not watcher.live:
                yield Batch(watcher.cursor)
            continue
        if not watcher.woken.is_set():
            try:
                async with asyncio.timeout(progress_s):
                    await watcher.woken.wait()
            except TimeoutError:
                if watcher.live and not watcher.queue and watcher.error is None:
                    yield Batch(watcher.cursor)
