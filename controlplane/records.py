"""The records of sandboxes: finding them, and what removes one or gives one up. All changes are compare-and-swap."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from controlplane import codec, events, keys, lifecycle, membership, transitions, usageledger
from controlplane.errors import NotFound
from controlplane.model import DesiredState, Event, Sandbox
from controlplane.store.contract import Delete, Expect, Put, Record, Store, Write
from controlplane.view import View


@dataclass(frozen=True)
class Stored:
    """A record of the store with its sandbox."""

    record: Record
    sandbox: Sandbox

    @property
    def expect(self) -> Expect:
        """That it has not changed."""
        return Expect(self.record.key, self.record.mod_revision)


def stored_sandbox(record: Record) -> Stored:
    """The sandbox in a record. BadState when it is none."""
    return Stored(record, codec.decode(Sandbox, record.value, record.key, revision=record.mod_revision))


class Records:
    """See the module."""

    def __init__(self, store: Store, view: View, *, now_s: Callable[[], float] = time.time) -> None:
        self._store, self._view, self._now_s = store, view, now_s

    async def get(self, tenant: str, name_or_uid: str) -> Sandbox:
        """By name (the live one, else the newest) or uid. NotFound."""
        return (await self.find(tenant, name_or_uid)).sandbox

    async def find(self, tenant: str, name_or_uid: str) -> Stored:
        """The same, with its record."""
        page = await self._store.page(keys.sandboxes_named(tenant, name_or_uid))
        found = [stored_sandbox(record) for record in page.records]
        if not found:
            stored = await self._find_own_uid(tenant, name_or_uid)
            if stored is None:
                raise NotFound("SandboxNotFound", f"there is no sandbox {name_or_uid}", sandbox=name_or_uid)
            return stored
        return max(found, key=lambda s: (s.sandbox.status.phase not in lifecycle.ENDED, s.record.create_revision))

    async def _find_own_uid(self, tenant: str, uid: str) -> Stored | None:
        """By uid, of this tenant; another's is not read, so that it answers as soon as one that is not there."""
        pointer = await self._store.get(keys.uid(uid))
        key = pointer.value.decode() if pointer else ""
        record = await self._store.get(key) if key.startswith(keys.sandboxes_of(tenant)) else None
        return stored_sandbox(record) if record else None

    async def find_uid(self, uid: str) -> Stored | None:
        """By uid, of any tenant."""
        pointer = await self._store.get(keys.uid(uid))
        record = await self._store.get(pointer.value.decode()) if pointer else None
        return stored_sandbox(record) if record else None

    async def remove(self, stored: Stored, reason: str, message: str) -> None:
        """Deletes record, index and name, and enters it into the usage ledger; Conflict when it changed meanwhile."""
        sandbox = stored.sandbox
        writes: list[Write] = [Delete(stored.record.key), Delete(keys.uid(sandbox.uid))]
        expect = [stored.expect]
        name = await self._store.get(keys.name(sandbox.tenant, sandbox.name))
        if name is not None and name.value.decode() == sandbox.uid:
            writes.append(Delete(name.key))
            expect.append(Expect(name.key, name.mod_revision))
        writes += usageledger.entries(sandbox, self._now_s())
        await self._store.commit([*writes, self.event(sandbox, reason, message)], expect)

    async def give_up(self, stored: Stored, reason: str, message: str) -> None:
        """On no host any more, fenced against its old one: PENDING where it begins anew, else FAILED. One that
        has ended stays as it ended; what is removed when it ends is removed."""
        sandbox = stored.sandbox
        epoch = max(self._view.revision, sandbox.epoch + 1)
        if sandbox.status.phase in lifecycle.ENDED:
            after = replace(sandbox, host="", epoch=epoch)
        elif membership.begins_anew(sandbox):
            after = transitions.replaced(sandbox, message, epoch)
            told = self.event(after, "Replaced", f"begins anew from epoch {epoch} on: {message}")
            await self._store.commit([Put(stored.record.key, codec.encode(after)), told], [stored.expect])
            return
        else:
            after = transitions.failed(sandbox, reason, message, epoch, self._now_s())
        if sandbox.spec.remove_on_exit or sandbox.desired is DesiredState.REMOVED:
            await self.remove(stored, reason, message)
            return
        await self._store.commit(
            [Put(stored.record.key, codec.encode(after)), self.event(sandbox, reason, message)], [stored.expect]
        )

    def event(self, sandbox: Sandbox, reason: str, message: str) -> Put:
        """The write that tells of it."""
        return events.entry(
            Event(self._now_s(), "sandbox", sandbox.name, reason, message, sandbox.host, sandbox.tenant)
        )
