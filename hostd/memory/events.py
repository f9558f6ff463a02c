"""Memory events between who hears a guest and the one who consumes them: few are kept, the newest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from hostd.memory.values import MemoryEvent

KEPT_EVENTS = 64


class MemoryEvents:
    """A bounded queue for Engine.memory_events. tell() and close() never wait. Each call makes another listener, which
    hears what is told from then on; the one before hears no more, and its iteration ends."""

    def __init__(self) -> None:
        self._kept: deque[MemoryEvent] = deque(maxlen=KEPT_EVENTS)
        self._changed = asyncio.Event()
        self._closed = False
        self._turn = 0  # the number of the listener that hears

    def tell(self, event: MemoryEvent) -> None:
        """Takes an event; of more than KEPT_EVENTS the oldest are forgotten."""
        self._kept.append(event)
        self._changed.set()

    def close(self) -> None:
        """No more will come: iterations end once they had what is kept. Idempotent."""
        self._closed = True
        self._changed.set()

    def __call__(self) -> AsyncIterator[MemoryEvent]:
        self._kept.clear()
        self._turn += 1
        self._changed.set()
        return self._heard(self._turn)

    async def _heard(self, turn: int) -> AsyncIterator[MemoryEvent]:
        while turn == self._turn:
            if self._kept:
                yield self._kept.popleft()
                continue
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()
