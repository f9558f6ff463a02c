"""The usage ledger: what each sandbox that is gone was given, and for how long. For plans and for bills.

    ledger/<tenant>/<removed_ns>-<uid>   Usage    written in the commit that removes the sandbox's record, so that no
                                                  sandbox is in both, and none that ran in neither

It keeps KEPT_S of them, and MOST of a tenant at the most; `prune` lets go of what is older.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from controlplane import codec, keys
from controlplane.model import REVISION, Resources, Sandbox, SandboxClass
from controlplane.store.contract import Delete, Put, Store, Write

KEPT_S = 30 * 86_400.0
MOST = 100_000
PAGE_RECORDS = 64


@dataclass(frozen=True)
class Usage:
    """One sandbox that is gone: `resources` as they were last, `ended_at_s` when its program or its host did."""

    name: str
    uid: str
    tenant: str
    image: str
    sandbox_class: SandboxClass
    resources: Resources
    created_at_s: float
    started_at_s: float
    ended_at_s: float
    host: str = ""
    revision: int = field(default=0, metadata=REVISION)


def usage_of(sandbox: Sandbox, now_s: float) -> Usage | None:
    """The record of a sandbox that is removed now; None when it never ran and so took nothing."""
    status = sandbox.status
    if status.started_at_s is None:
        return None
    ended_at_s = now_s if status.finished_at_s is None else status.finished_at_s
    return Usage(
        sandbox.name, sandbox.uid, sandbox.tenant, sandbox.spec.image, sandbox.spec.sandbox_class,
        sandbox.spec.resources, sandbox.created_at_s, status.started_at_s, max(status.started_at_s, ended_at_s),
        sandbox.host,
    )  # fmt: skip


def entries(sandbox: Sandbox, now_s: float) -> list[Write]:
    """What the removal of a sandbox writes here."""
    usage = usage_of(sandbox, now_s)
    if usage is None:
        return []
    return [Put(keys.ledger(sandbox.tenant, int(now_s * 1e9), sandbox.uid), codec.encode(usage))]


def doomed(found: Sequence[str], oldest_ns: int, most: int = MOST) -> list[str]:
    """The keys to let go of: those from before `oldest_ns`, and of each tenant all but the newest `most`. Pure."""
    by_tenant: dict[str, list[tuple[int, str]]] = {}
    for key in found:
        tenant, removed_ns = keys.split_ledger(key)
        by_tenant.setdefault(tenant, []).append((removed_ns, key))
    gone = []
    for rows in by_tenant.values():
        surplus = max(0, len(rows) - most)
        gone += [key for at, (removed_ns, key) in enumerate(sorted(rows)) if at < surplus or removed_ns < oldest_ns]
    return sorted(gone)


class UsageLedger:
    """See the module. One replica prunes at a time (leadership.py)."""

    def __init__(self, store: Store, *, now_s: Callable[[], float] = time.time) -> None:
        self._store, self._now_s = store, now_s

    async def prune(self) -> int:
        """Lets go of what is too old or too much; how many went."""
        found: list[str] = []
        after, more = "", True
        while more:
            page = await self._store.page(keys.LEDGER, after=after, limit=500)
            found += [record.key for record in page.records]
            more, after = page.more, found[-1] if found else ""
        gone = doomed(found, int((self._now_s() - KEPT_S) * 1e9))
        for at in range(0, len(gone), PAGE_RECORDS):
            await self._store.commit([Delete(key) for key in gone[at : at + PAGE_RECORDS]])
        return len(gone)
