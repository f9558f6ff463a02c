"""Looks again, every so often, at what the store holds: a blob that rotted on disk is found before it is needed.

`get` verifies a blob once in a hostd's life and by its identity afterwards, so that a start costs no hashing; this
walk is what finds the rest. A corrupt object goes to quarantine, where nothing serves it, and is told of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from sharedcache.errors import CacheError

log = logging.getLogger("sandloom.hostd.scrub")


class Scrubbed(Protocol):
    """What a walk needs of the store."""

    def scrub(self) -> list[str]:
        """Hashes every object; the keys of those that are in quarantine now."""
        ...


async def keep_scrubbing(
    store: Scrubbed,
    interval_s: float,
    tell: Callable[[str, str], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Walks the store every `interval_s`, for ever. A walk that fails is told of and tried again the next time."""
    while True:
        await sleep(interval_s)
        try:
            bad = await asyncio.to_thread(store.scrub)
        except (CacheError, OSError) as error:
            log.warning("the store could not be walked: %s", error)
            continue
        for key in bad:
            tell("CorruptObject", f"object {key[:12]} failed its digest and is in quarantine: import its image again")
