"""Tasks with an owner: whatever is spawned in the block is cancelled and awaited when the block is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from hostd.errors import HostdError

T = TypeVar("T")

log = logging.getLogger("sandloom.hostd.tasks")


class OwnedTasks:
    """Unlike asyncio.TaskGroup it does not end its block when a task fails: the owner looks at its tasks itself.

    An error that is none of hostd's own is a bug, and goes to the log whoever looks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Starts `work`, owned by this block."""
        task = asyncio.create_task(work, name=name or None)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, HostdError | asyncio.CancelledError):
            log.error("task %s failed", task.get_name(), exc_info=error)

    async def aclose(self) -> None:
        """Cancels and awaits what still runs."""
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def __aenter__(self) -> OwnedTasks:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and goes on doing so when cancelled: for steps that must not be left half done.

    `work` bounds itself. The cancellation is raised once it is done."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                continue
        if not task.cancelled() and task.exception() is not None:
            log.error("a step that had to be finished failed", exc_info=task.exception())
        raise
