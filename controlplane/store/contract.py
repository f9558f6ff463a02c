"""The Store contract: revisioned keys, compare-and-swap, watch, leases. Implementable on etcd v3 and on SQLite.

Promises, each held by tests/contract/test_store.py for every engine:

- Every commit that changes something gets a later revision than what it was decided on, and is durable before `commit`
  returns. Commits of one moment that touch different keys may share a revision (etcd takes them in one transaction).
- A commit's changes are seen all or none, by reads, lists and watches alike; a watch gets them within one Batch.
- A watch from a revision sees every later change once, in order; nothing is lost between a list and a watch after it.
- A list at a revision sees that revision, however long paging through it takes, until it is compacted: Compacted.
- A lease that is not kept runs out; the keys put under it are then deleted, as a change like any other.

Keys are ASCII, compared bytewise; values are bytes, at most 1 MiB. Revisions are positive and never go back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from controlplane.errors import Invalid

MAX_VALUE_BYTES = 1 << 20
MOST_EXPECTATIONS = 60
"""Of one commit that every engine takes."""
PROGRESS_S = 10.0


@dataclass(frozen=True)
class Record:
    """A key's value as of one revision. `lease` is 0 when none holds it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True)
class Page:
    """Records in key order as of `revision`; `more` when the limit cut the list."""

    records: tuple[Record, ...]
    revision: int
    more: bool = False


@dataclass(frozen=True)
class Expect:
    """The key's mod_revision must be this; 0: there must be no such key."""

    key: str
    mod_revision: int


@dataclass(frozen=True)
class Put:
    """Sets a key, under a lease unless that is 0."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True)
class Delete:
    """Removes a key; nothing happens when there is none."""

    key: str


Write = Put | Delete


@dataclass(frozen=True)
class Change:
    """A key was set (`value`) or removed (None)."""

    key: str
    value: bytes | None


@dataclass(frozen=True)
class Batch:
    """What one revision changed under the watched prefix. No changes: all up to `revision` was delivered."""

    revision: int
    changes: tuple[Change, ...] = ()


def require_committable(writes: Sequence[Write]) -> None:
    """Invalid when a key is written twice or a value is too large."""
    if len({write.key for write in writes}) != len(writes):
        raise Invalid("writes", "a key is written twice in one commit")
    for write in writes:
        if isinstance(write, Put) and len(write.value) > MAX_VALUE_BYTES:
            raise Invalid(write.key, f"its record is {len(write.value)} bytes, {MAX_VALUE_BYTES} is the most")


class Store(Protocol):
    """An open engine. Every method may raise StoreError; reads of a compacted or future revision Compacted."""

    async def get(self, key: str) -> Record | None:
        """The key's present record."""
        ...

    async def page(self, prefix: str, *, after: str = "", limit: int = 0, revision: int = 0) -> Page:
        """Records whose key begins with `prefix` and is greater than `after`; limit 0 is no limit, revision 0 now."""
        ...

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        """Applies all writes (no key twice) if every expectation holds, and returns the store's revision.

        Conflict when one does not hold, NotFound (LeaseGone) when a lease is unknown: then nothing happened. When it is
        cancelled or raises StoreError the outcome is unknown: read again."""
        ...

    def watch(
        self, prefix: str, *, after: int, progress_s: float = PROGRESS_S
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """Every change after revision `after` under `prefix`; at least every `progress_s` a Batch, empty if need be.

        Entering raises Compacted when changes after `after` are no longer all kept, or `after` is in the future."""
        ...

    async def compact(self, revision: int) -> None:
        """Forgets what was only needed for revisions before `revision`. Compacting less than before does nothing."""
        ...

    async def grant_lease(self, ttl_s: int) -> int:
        """A new lease that runs out `ttl_s` (>= 1) after it was last kept. After a restart it has its whole ttl."""
        ...

    async def keep_lease(self, lease: int) -> None:
        """Prolongs a lease. NotFound (LeaseGone) when it has run out."""
        ...

    async def revoke_lease(self, lease: int) -> None:
        """Ends a lease now: its keys are deleted. Nothing happens when it is gone."""
        ...
