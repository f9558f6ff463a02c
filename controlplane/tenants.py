"""What operators can do with tenants, and what everybody asks of them: do they exist, how much may they have.

tenants/<name> is the record. `default` and the tenants that the configuration gives a quota exist without one; a record
replaces what was implied. Removing a tenant that the configuration names brings back what the configuration says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from controlplane import codec, events, keys, lifecycle, tenancy
from controlplane.errors import AlreadyExists, Conflict, Denied, NotFound, Precondition
from controlplane.model import Event, SandboxClass
from controlplane.quotas import UNBOUNDED, Quota, Usage, usage
from controlplane.store.contract import Delete, Expect, Put, Store, Write
from controlplane.tenancy import DEFAULT_TENANT, Tenant
from controlplane.view import View

VIEW_LAG_S = 5.0
ATTEMPTS = 16


class Tenants:
    """See the module. Reads are of the view, so that every call may ask."""

    def __init__(
        self, store: Store, view: View, configured: Mapping[str, Quota] | None = None,
        *, now_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._view, self._now_s = store, view, now_s
        implied = {name: Tenant(name, quota) for name, quota in (configured or {}).items()}
        implied[DEFAULT_TENANT] = replace(implied.get(DEFAULT_TENANT, Tenant(DEFAULT_TENANT)), trusted=True)
        self._implied = implied

    def find(self, name: str) -> Tenant | None:
        """The tenant, if there is one."""
        return self._view.tenants.get(name) or self._implied.get(name)

    def get(self, name: str) -> Tenant:
        """The same. NotFound."""
        found = self.find(name)
        if found is None:
            text = f"there is no tenant {name}: `sandloom tenants create {name}` makes it"
            raise NotFound("TenantNotFound", text, tenant=name)
        return found

    def quota(self, name: str) -> Quota:
        """How much a tenant may have; one that is gone has no bound, and nothing is made for it."""
        found = self.find(name)
        return found.quota if found else UNBOUNDED

    def all(self) -> list[Tenant]:
        """Every tenant, by name."""
        return [self.get(name) for name in sorted({*self._implied, *self._view.tenants})]

    def require_class(self, tenant: str, kind: SandboxClass) -> None:
        """Denied unless the tenant is trusted as far as the class needs: the host's own kernel isolates little."""
        found = self.find(tenant)
        if kind is SandboxClass.HOST_KERNEL and not (found and found.trusted):
            raise Denied(
                "TenantNotTrusted",
                f"tenant {tenant} may not run host-kernel sandboxes: they share the host's kernel, which takes an"
                " operator's trust (`sandloom tenants quota --trusted`); use guest-kernel or user-kernel",
                tenant=tenant,
            )

    def used(self, name: str) -> Usage:
        """What a tenant has now."""
        view, images = self._view, keys.images_of(name)
        return usage(
            self.quota(name),
            [s for s in view.sandboxes.values() if s.tenant == name],
            [pool for pool in view.pools.values() if pool.tenant == name],
            [image for key, image in view.images.items() if key.startswith(images)],
        )

    async def create(self, tenant: Tenant) -> Tenant:
        """See CreateTenant."""
        if tenant.name in self._implied and self._view.tenants.get(tenant.name) is None:
            text = f"tenant {tenant.name} exists without a record: change it with `sandloom tenants quota`"
            raise AlreadyExists("TenantExists", text, tenant=tenant.name)
        made = replace(tenant, created_at_s=self._now_s())
        key = keys.tenant(made.name)
        try:
            revision = await self._commit([Put(key, codec.encode(made)), self._event(made, "TenantCreated")], key, 0)
        except Conflict as error:
            raise AlreadyExists("TenantExists", f"tenant {made.name} exists already", tenant=made.name) from error
        return replace(made, revision=revision)

    async def update(self, name: str, quota: Quota, *, trusted: bool, tag: str) -> Tenant:
        """See UpdateTenant."""
        for _ in range(ATTEMPTS):
            now = self.get(name)
            if tag and tag != tenancy.etag(now):
                text = f"tenant {name} has changed since etag {tag}: read it again"
                raise Conflict("EtagMismatch", text, etag=tenancy.etag(now))
            after = replace(now, quota=quota, trusted=trusted)
            if after == now:
                return now
            key = keys.tenant(name)
            writes: list[Write] = [Put(key, codec.encode(after)), self._event(after, "TenantChanged")]
            try:
                return replace(after, revision=await self._commit(writes, key, now.revision))
            except Conflict:
                await self._catch_up()
        raise Conflict("Busy", f"tenant {name} changes too fast: retry")

    async def delete(self, name: str, *, allow_missing: bool) -> None:
        """See DeleteTenant."""
        for _ in range(ATTEMPTS):
            found = self.find(name)
            if found is None and allow_missing:
                return
            tenant = found or self.get(name)
            if name in self._implied and not tenant.revision:
                text = f"tenant {name} is there by itself (`default`, or named in the configuration) and stays"
                raise Precondition("TenantHolds", text, tenant=name)
            self._require_empty(name)
            key = keys.tenant(name)
            try:
                await self._commit([Delete(key), self._event(tenant, "TenantRemoved")], key, tenant.revision)
            except Conflict:
                await self._catch_up()
                continue
            return
        raise Conflict("Busy", f"tenant {name} changes too fast: retry")

    def _require_empty(self, name: str) -> None:
        view, images = self._view, keys.images_of(name)
        holds = {
            "sandboxes": [
                s.name for s in view.sandboxes.values() if s.tenant == name and s.status.phase not in lifecycle.ENDED
            ],
            "pools": [pool.name for pool in view.pools.values() if pool.tenant == name],
            "images": [image.name for key, image in view.images.items() if key.startswith(images)],
        }
        told = [f"{what} {', '.join(sorted(names)[:5])}" for what, names in holds.items() if names]
        if told:
            text = f"tenant {name} still has {'; '.join(told)}: remove those first"
            raise Precondition("TenantHolds", text, tenant=name)

    async def _commit(self, writes: list[Write], key: str, revision: int) -> int:
        committed = await self._store.commit(writes, [Expect(key, revision)])
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(committed)  # so that the next call of this tenant is answered by it
        return committed

    async def _catch_up(self) -> None:
        revision = (await self._store.page(keys.TENANTS, limit=1)).revision
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)

    def _event(self, tenant: Tenant, reason: str) -> Put:
        trust = "trusted" if tenant.trusted else "not trusted"
        return events.entry(Event(self._now_s(), "tenant", tenant.name, reason, trust))
