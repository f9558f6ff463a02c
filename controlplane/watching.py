"""Watches as clients see them: the present state, then every change, with bookmarks while nothing happens.

The bookmark's revision is one that the client may watch from again: everything up to it was delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from controlplane import codec, keys, poolspread, transitions
from controlplane.model import Sandbox
from controlplane.poolspread import PoolShare
from controlplane.quotas import Quota
from controlplane.store.contract import Store
from controlplane.view import View

BOOKMARK_S = 10.0
"""Far below hostd's patience with a silent watch (60 s)."""
READ_RECORDS = 500
GATHER_S = 0.02
"""Changes come in bursts: pools are looked at once for all of a burst."""


@dataclass(frozen=True)
class Put:
    """A sandbox is new or has changed."""

    sandbox: Sandbox
    revision: int


@dataclass(frozen=True)
class Gone:
    """A sandbox is no more (or, to a host, no more its own)."""

    tenant: str
    name: str
    uid: str
    revision: int


@dataclass(frozen=True)
class Bookmark:
    """All up to `revision` was told."""

    revision: int


Told = Put | Gone | Bookmark


async def watch_sandboxes(
    store: Store, tenant: str, after: int, *, bookmark_s: float = BOOKMARK_S
) -> AsyncGenerator[Told, None]:
    """A tenant's sandboxes. Compacted when `after` is no longer kept; 0 begins with what is, then a bookmark."""
    prefix, last = keys.sandboxes_of(tenant), ""
    more = not after
    while more:
        page = await store.page(prefix, after=last, limit=READ_RECORDS, revision=after)
        after, more = page.revision, page.more
        for record in page.records:
            last = record.key
            yield _put(record.key, record.value, record.mod_revision)
        if not more:
            yield Bookmark(after)
    async with store.watch(prefix, after=after, progress_s=bookmark_s) as batches:
        async for batch in batches:
            for change in batch.changes:
                if change.value is None:
                    yield Gone(*keys.split_sandbox(change.key), batch.revision)
                else:
                    yield _put(change.key, change.value, batch.revision)
            if not batch.changes:
                yield Bookmark(batch.revision)


def _put(key: str, value: bytes, revision: int) -> Put:
    return Put(codec.decode(Sandbox, value, key, revision=revision), revision)


async def watch_assignments(
    view: View, host: str, *, bookmark_s: float = BOOKMARK_S, require: Callable[[], None] = lambda: None
) -> AsyncGenerator[Told, None]:
    """A host's sandboxes, from the view: states that changed again before the host took them are left out, and so is
    what only the host itself reported. What it has to end because it moves is told as STOPPED, under its old epoch.
    `require` raises when the host may be told no more."""
    with view.following() as changed:
        told: dict[str, tuple[object, ...]] = {}
        for sandbox in [*view.on_host(host), *view.leaving(host)]:
            seen = transitions.facing(sandbox, host)
            if seen is not None:
                told[sandbox.uid] = _asked(seen)
                yield Put(seen, view.revision)
        yield Bookmark(view.revision)
        while True:
            uids = await changed.take(bookmark_s)
            require()
            for uid in sorted(uids):
                now = view.sandboxes.get(uid)
                seen = None if now is None else transitions.facing(now, host)
                if seen is not None:
                    now = seen
                    if told.get(uid) != _asked(now):
                        told[uid] = _asked(now)
                        yield Put(now, view.revision)
                elif told.pop(uid, None) is not None:
                    name, tenant = (now.name, now.tenant) if now else ("", "")
                    yield Gone(tenant, name, uid, view.revision)
            if not uids:
                yield Bookmark(view.revision)


async def watch_pools(
    view: View, host: str, quota_of: Callable[[str], Quota], *, bookmark_s: float = BOOKMARK_S
) -> AsyncGenerator[tuple[PoolShare, ...], None]:
    """A host's share of every pool: now, after each change of it, and every `bookmark_s` as a sign of life."""
    told: tuple[PoolShare, ...] | None = None
    loop = asyncio.get_running_loop()
    sign_s = loop.time() + bookmark_s  # of this watch: the view itself moves with every host's report
    while True:
        moved = view.moved
        now: tuple[PoolShare, ...] = ()
        if view.pools:
            pools = poolspread.allowed(view.pools.values(), quota_of, view.of_tenant)
            now = poolspread.shares_of(host, pools, view.survey(), view.images.values())
        if now != told or loop.time() >= sign_s:
            told, sign_s = now, loop.time() + bookmark_s
            yield now
        await asyncio.sleep(GATHER_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(sign_s):
                await moved.wait()


def _asked(sandbox: Sandbox) -> tuple[object, ...]:
    """What its host has to know of a sandbox."""
    return sandbox.spec, sandbox.desired, sandbox.epoch, sandbox.stop_grace_s
