"""Many at once, or one alone: starts of processes go through together, a checkpoint waits for them and keeps others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turnstile:
    """Who waits is served when who is inside is through; nobody is starved, since one alone closes it at once."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def through(self) -> AsyncIterator[None]:
        """Among others, but not while somebody is alone."""
        await self._until(lambda: not self._closed)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nobody else is inside, and nobody gets in."""
        await self._until(lambda: not self._closed)
        self._closed = True
        try:
            await self._until(lambda: self._inside == 0)
            yield
        finally:
            self._closed = False
            self._tell()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
