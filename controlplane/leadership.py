"""Who does the work that only one control plane may do. The seam for leader election.

With the SQLite store there is one process, held by the store's lock: it leads as long as it runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol


class Leadership(Protocol):
    """Runs work only while this control plane leads."""

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` whenever leadership is won, cancels it when that is lost. Until cancelled."""
        ...


class OnlyOne:
    """Leads for as long as it runs."""

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` at once."""
        await work()
