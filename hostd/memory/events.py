"""Memory events between who hears a guest and the one who consumes them: few are kept, the newest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from hostd.memory.values import MemoryEvent

KEPT_EVENTS = 64


class MemoryEvents:
    """A bounded queue for Engine.memory_events. tell() and close() never wait."""

    def __init__(self) -> None:
        self._kept: deque[MemoryEvent] = deque(maxlen=KEPT_EVENTS)
        self._changed = asyncio.Event()
        self._closed = False

    def tell(self, event: MemoryEvent) -> None:
        """Takes an event; of more than KEPT_EVENTS the oldest are forgotten."""
        self._kept.append(event)
        self._changed.set()

    def close(self) -> None:
        """No more will come: iterations end once they had what is kept. Idempotent."""
        self._closed = True
        self._changed.set()

    async def __call__(self) -> AsyncIterator[MemoryEvent]:
        while True:
            while self._kept:
                yield self._kept.popleft()
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()
