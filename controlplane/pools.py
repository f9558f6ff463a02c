"""What users can do with warm pools: find, create, resize, delete. The hosts fill them (hostd/pools.py).

Every change is one compare-and-swap commit of the record and the event that tells of it. A pool is bound to the digest
that its image's name meant when it was made; nothing but the record says that it is wanted.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from controlplane import codec, events, keys, poolspread
from controlplane.admission import Admission, Guard
from controlplane.edge.pools import etag
from controlplane.errors import AlreadyExists, Conflict, Invalid, NotFound
from controlplane.images import Images
from controlplane.model import Event, Pool
from controlplane.poolspread import PoolState, state_of
from controlplane.quotas import UNBOUNDED, Quota, require_pool_within
from controlplane.requests import PoolCreation, UsedRequest
from controlplane.store.contract import Delete, Expect, Put, Store, Write
from controlplane.view import View

ATTEMPTS = 16
VIEW_LAG_S = 5.0


class Pools:
    """See the module."""

    def __init__(
        self, store: Store, view: View, images: Images,
        *, quota_of: Callable[[str], Quota] = lambda _: UNBOUNDED, admission: Admission | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._view, self._images, self._now_s = store, view, images, now_s
        self._quota_of, self._admission = quota_of, admission or Admission(view, quota_of)

    async def get(self, tenant: str, name: str) -> Pool:
        """By name. NotFound."""
        record = await self._store.get(keys.pool(tenant, name))
        if record is None:
            text = f"there is no pool {name}: `sandloom pool ls` lists those there are"
            raise NotFound("PoolNotFound", text, pool=name)
        return codec.decode(Pool, record.value, record.key, revision=record.mod_revision)

    def state(self, pool: Pool) -> PoolState:
        """How the hosts are with it, as the view has it."""
        view = self._view
        its = [p for p in view.pools.values() if p.tenant == pool.tenant and p.uid != pool.uid]
        kept = {p.uid: p.spec.size for p in poolspread.allowed([*its, pool], self._quota_of, view.of_tenant)}
        return state_of(pool, view.survey(), view.hosts, view.images.values(), kept[pool.uid])

    async def create(self, tenant: str, asked: PoolCreation) -> Pool:
        """Records a pool. See CreatePool."""
        for _ in range(ATTEMPTS):
            earlier = await self._created_before(tenant, asked)
            if earlier is not None:
                return earlier
            try:
                async with self._admission.deciding(tenant) as guard:
                    return await self._create_once(tenant, asked, guard)
            except Conflict:
                continue
        raise Conflict("Busy", "too many changes at once: retry")

    async def _created_before(self, tenant: str, asked: PoolCreation) -> Pool | None:
        if not asked.request_id:
            return None
        record = await self._store.get(keys.request(tenant, asked.request_id))
        if record is None:
            return None
        used = codec.decode(UsedRequest, record.value, record.key)
        if used.asked != _digest_of(asked):
            text = f"{asked.request_id!r} was used for something else: a new call needs a new request_id"
            raise Invalid("request_id", text, reason="RequestIdReused")
        return await self.get(tenant, asked.name)

    async def _create_once(self, tenant: str, asked: PoolCreation, guard: Guard) -> Pool:
        image = await self._images.get(tenant, asked.spec.image)
        key = keys.pool(tenant, asked.name)
        if await self._store.get(key) is not None:
            text = f"pool {asked.name} exists already: choose another name, or resize it (`sandloom pool resize`)"
            raise AlreadyExists("PoolExists", text, pool=asked.name)
        spec = replace(asked.spec, image_digest=image.digest)
        pool = Pool(asked.name, secrets.token_hex(8), tenant, spec, self._now_s())
        self._require_quota(pool)
        if asked.validate_only:
            return replace(pool, uid="")
        text = f"{spec.size} members of image {image.name}, {spec.resources.memory_min_mib} MiB guaranteed to each"
        writes: list[Write] = [Put(key, codec.encode(pool)), self._event(pool, "PoolCreated", text)]
        expect = [Expect(key, 0), Expect(keys.image(tenant, image.name), image.revision)]
        if asked.request_id:
            used = keys.request(tenant, asked.request_id)
            writes.append(Put(used, codec.encode(UsedRequest(key, _digest_of(asked), self._now_s()))))
            expect.append(Expect(used, 0))
        return replace(pool, revision=await self._commit([*writes, *guard.writes], [*expect, *guard.expect]))

    async def resize(self, tenant: str, name: str, size: int, tag: str) -> Pool:
        """Another size. See ResizePool."""
        for _ in range(ATTEMPTS):
            pool = await self.get(tenant, name)
            if tag and tag != etag(pool):
                text = f"pool {name} has changed since etag {tag}: read it again"
                raise Conflict("EtagMismatch", text, etag=etag(pool))
            after = replace(pool, spec=replace(pool.spec, size=size))
            if after == pool:
                return pool
            key = keys.pool(tenant, name)
            told = self._event(after, "PoolResized", f"from {pool.spec.size} to {size} members")
            try:
                async with self._admission.deciding(tenant) as guard:
                    self._require_quota(after)
                    writes: list[Write] = [Put(key, codec.encode(after)), told, *guard.writes]
                    revision = await self._commit(writes, [Expect(key, pool.revision), *guard.expect])
            except Conflict:
                continue
            return replace(after, revision=revision)
        raise Conflict("Busy", f"pool {name} changes too fast: retry")

    async def delete(self, tenant: str, name: str, *, allow_missing: bool) -> None:
        """Removes it; hosts end its members. See DeletePool."""
        for _ in range(ATTEMPTS):
            try:
                pool = await self.get(tenant, name)
            except NotFound:
                if allow_missing:
                    return
                raise
            key = keys.pool(tenant, name)
            try:
                await self._commit([Delete(key), self._event(pool, "PoolRemoved", "")], [Expect(key, pool.revision)])
            except Conflict:
                continue
            return
        raise Conflict("Busy", f"pool {name} changes too fast: retry")

    def _require_quota(self, pool: Pool) -> None:
        quota = self._quota_of(pool.tenant)
        if quota != UNBOUNDED:
            view = self._view
            require_pool_within(
                quota, view.of_tenant(pool.tenant), [p for p in view.pools.values() if p.tenant == pool.tenant], pool
            )

    async def _commit(self, writes: list[Write], expect: list[Expect]) -> int:
        revision = await self._store.commit(writes, expect)
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)
        return revision

    def _event(self, pool: Pool, reason: str, message: str) -> Put:
        return events.entry(Event(self._now_s(), "pool", pool.name, reason, message, "", pool.tenant))


def _digest_of(asked: PoolCreation) -> str:
    return hashlib.sha256(codec.encode(replace(asked, validate_only=False, request_id=""))).hexdigest()
