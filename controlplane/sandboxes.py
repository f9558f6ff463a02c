"""What users can do with sandboxes: create, resize, stop, delete.

Every change is one compare-and-swap commit: the record as it was read, the guards of what was decided on (keys.py) and
the event that tells of it. A lost race is decided again on what is now; after ATTEMPTS of them Conflict goes out.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from controlplane import codec, keys, lifecycle, names, placing, scheduler, transitions
from controlplane.errors import AlreadyExists, Conflict, Exhausted, Invalid, NotFound, Precondition
from controlplane.explaining import Explanation, explain
from controlplane.images import Images
from controlplane.model import Checkpoint, DesiredState, LayerSize, Phase, Sandbox, SandboxStatus
from controlplane.quotas import UNBOUNDED, require_within
from controlplane.records import Records, Stored, stored_sandbox
from controlplane.requests import Creation, ResizeWish, UsedRequest
from controlplane.store.contract import Expect, Put, Store, Write
from controlplane.tenants import Tenants
from controlplane.view import View

ATTEMPTS = 16
VIEW_LAG_S = 5.0


class Sandboxes:
    """See the module."""

    def __init__(
        self, store: Store, view: View, records: Records, images: Images,
        tenants: Tenants, *, now_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._view, self._records, self._images, self._now_s = store, view, records, images, now_s
        self._tenants = tenants
        self._placing = asyncio.Lock()

    # Creating.

    async def create(self, tenant: str, asked: Creation) -> Sandbox:
        """Records a sandbox and places it. See CreateSandbox."""
        async with self._placing:
            for attempt in range(ATTEMPTS):
                earlier = await self._created_before(tenant, asked)
                if earlier is not None:
                    return earlier
                try:
                    return await self._create_once(tenant, asked, attempt)
                except Conflict:
                    await self._catch_up()
        raise Conflict("Busy", "too many changes at once: retry")

    async def _created_before(self, tenant: str, asked: Creation) -> Sandbox | None:
        if not asked.request_id:
            return None
        record = await self._store.get(keys.request(tenant, asked.request_id))
        if record is None:
            return None
        used = codec.decode(UsedRequest, record.value, record.key)
        if used.asked != _digest_of(asked):
            text = f"{asked.request_id!r} was used for another sandbox: a new call needs a new request_id"
            raise Invalid("request_id", text, reason="RequestIdReused")
        found = await self._store.get(used.sandbox_key)
        if found is None:
            text = f"the sandbox that request {asked.request_id!r} made has been removed since"
            raise NotFound("SandboxRemoved", text, sandbox=keys.split_sandbox(used.sandbox_key)[1])
        return stored_sandbox(found).sandbox

    async def _create_once(self, tenant: str, asked: Creation, attempt: int) -> Sandbox:
        image = await self._images.get(tenant, asked.spec.image)
        name = asked.name or names.made_up(secrets.randbelow, attempt)
        guard = await self._free_name(tenant, name)
        spec = replace(asked.spec, image_digest=image.digest)
        if not (spec.process.argv or image.config.entrypoint or image.config.cmd):
            text = f"image {image.name} has no command of its own: name one"
            raise Invalid("spec.process.argv", text, reason="NoCommand")
        sandbox = Sandbox(
            name=name,
            uid=secrets.token_hex(8),
            tenant=tenant,
            spec=spec,
            created_at_s=self._now_s(),
            vcpus=spec.resources.vcpus,
            layers=tuple(LayerSize(layer.digest, layer.size_bytes) for layer in image.layers),
        )
        self._tenants.require_class(tenant, spec.sandbox_class)
        self._require_quota(sandbox)
        placed, guards = self._place(sandbox)
        if asked.validate_only:
            return replace(placed, uid="")
        there = [Expect(keys.image(tenant, image.name), image.revision)]
        return await self._record(placed, asked, [Expect(keys.name(tenant, name), guard), *there, *guards])

    async def create_on(self, checkpoint: Checkpoint, asked: Creation) -> Sandbox:
        """Records a sandbox that goes on from a checkpoint, which only the host that has it can do. As create()."""
        async with self._placing:
            for attempt in range(ATTEMPTS):
                earlier = await self._created_before(checkpoint.tenant, asked)
                if earlier is not None:
                    return earlier
                try:
                    return await self._create_on_once(checkpoint, asked, attempt)
                except Conflict:
                    await self._catch_up()
        raise Conflict("Busy", "too many changes at once: retry")

    async def _create_on_once(self, checkpoint: Checkpoint, asked: Creation, attempt: int) -> Sandbox:
        tenant, name = checkpoint.tenant, asked.name or names.made_up(secrets.randbelow, attempt)
        guard = await self._free_name(tenant, name)
        sandbox = Sandbox(
            name=name,
            uid=secrets.token_hex(8),
            tenant=tenant,
            spec=asked.spec,
            created_at_s=self._now_s(),
            vcpus=asked.spec.resources.vcpus,
            layers=checkpoint.layers,
        )
        self._require_quota(sandbox)
        placed, guards = self._place(sandbox, only=checkpoint.host)
        return await self._record(placed, asked, [Expect(keys.name(tenant, name), guard), *guards])

    async def _record(self, placed: Sandbox, asked: Creation, expect: list[Expect]) -> Sandbox:
        tenant, key = placed.tenant, keys.sandbox(placed.tenant, placed.name, placed.uid)
        writes: list[Write] = [
            Put(key, codec.encode(placed)),
            Put(keys.uid(placed.uid), key.encode()),
            Put(keys.name(tenant, placed.name), placed.uid.encode()),
            Put(keys.image_use(tenant, placed.spec.image_digest), placed.uid.encode()),
            self._records.event(placed, *_told_placed(placed)),
        ]
        if asked.request_id:
            used = UsedRequest(key, _digest_of(asked), self._now_s())
            writes.append(Put(keys.request(tenant, asked.request_id), codec.encode(used)))
            expect = [*expect, Expect(keys.request(tenant, asked.request_id), 0)]
        revision = await self._commit_placed(placed, writes, expect)
        return replace(placed, revision=revision)

    def _require_quota(self, sandbox: Sandbox) -> None:
        quota = self._tenants.quota(sandbox.tenant)
        if quota != UNBOUNDED:
            mine = (s for s in self._view.sandboxes.values() if s.tenant == sandbox.tenant)
            pools = [pool for pool in self._view.pools.values() if pool.tenant == sandbox.tenant]
            require_within(quota, mine, sandbox, pools)

    async def _free_name(self, tenant: str, name: str) -> int:
        """The name guard's revision. AlreadyExists while a live sandbox has the name."""
        guard = await self._store.get(keys.name(tenant, name))
        if guard is None:
            return 0
        record = await self._store.get(keys.sandbox(tenant, name, guard.value.decode()))
        if record is not None and stored_sandbox(record).sandbox.status.phase not in lifecycle.ENDED:
            there = stored_sandbox(record).sandbox
            removed = there.desired is DesiredState.REMOVED
            remedy = "it is being removed, retry soon" if removed else "choose another name or remove it first"
            text = f"sandbox {name} exists already ({there.status.phase.name}): {remedy}"
            raise AlreadyExists("SandboxExists", text, sandbox=name, uid=there.uid)
        return guard.mod_revision

    # Placing.

    def _place(self, sandbox: Sandbox, *, only: str = "") -> tuple[Sandbox, list[Expect]]:
        return placing.placed(self._view, sandbox, only=only)

    def explain(self, sandbox: Sandbox, *, most: int) -> Explanation:
        """Why it is where it is, or what hosts lack for it, by the present view."""
        return explain(sandbox, self._view.survey(), most=most)

    async def _commit_placed(self, placed: Sandbox, writes: list[Write], expect: list[Expect]) -> int:
        if placed.host:
            writes.append(Put(keys.placement(placed.host), placed.uid.encode()))
        revision = await self._store.commit(writes, expect)
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)  # so that the next decision counts this one
        return revision

    async def _catch_up(self) -> None:
        revision = (await self._store.page(keys.PLACEMENTS, limit=1)).revision
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)

    async def place_pending(self, sandbox: Sandbox) -> bool:
        """Places a PENDING sandbox if the present view has room for it; whether it did."""
        async with self._placing:
            if placing.still_hopeless(self._view, sandbox):
                return False
            try:
                placed, guards = self._place(sandbox)
            except Exhausted as error:
                placed, guards = replace(sandbox, status=SandboxStatus(reason=error.reason, message=str(error))), []
            if not placed.host and placed.status.reason == sandbox.status.reason:
                return False
            key = keys.sandbox(sandbox.tenant, sandbox.name, sandbox.uid)
            writes: list[Write] = [Put(key, codec.encode(placed))]
            if placed.host:
                writes.append(self._records.event(placed, *_told_placed(placed)))
            await self._commit_placed(placed, writes, [Expect(key, sandbox.revision), *guards])
            return bool(placed.host)

    # Changing.

    async def resize(self, tenant: str, name: str, wish: ResizeWish) -> Sandbox:
        """New target sizes. See ResizeSandbox."""

        def change(sandbox: Sandbox) -> Sandbox:
            if wish.etag and wish.etag != transitions.etag(sandbox):
                text = f"sandbox {name} has changed since etag {wish.etag}: read it again"
                raise Conflict("EtagMismatch", text, etag=transitions.etag(sandbox))
            after = transitions.resized(sandbox, wish)
            self._require_quota(after)
            self._require_room(sandbox, after)
            return after

        return await self._change(tenant, name, change, "ResizeAsked", _told_sizes)

    def _require_room(self, before: Sandbox, after: Sandbox) -> None:
        """Exhausted when the host cannot guarantee the larger minimum."""
        more_mib = after.spec.resources.memory_min_mib - before.spec.resources.memory_min_mib
        view = self._view
        host = view.hosts.get(before.host)
        if more_mib <= 0 or host is None:
            return
        state = scheduler.host_state(host, True, view.on_host(before.host), ())
        if more_mib > state.unpromised_mib:
            raise Exhausted(
                "NoHostHasRoom",
                f"host {before.host} cannot guarantee {more_mib} MiB more to sandbox {before.name}:"
                f" {max(0, state.unpromised_mib)} MiB are not promised",
                needed_mib=more_mib,
                room_mib=max(0, state.unpromised_mib),
            )

    async def stop(self, tenant: str, name: str, grace_s: int) -> Sandbox:
        """Asks it to end. See StopSandbox."""
        stored = await self._records.find(tenant, name)
        sandbox = stored.sandbox
        if sandbox.spec.remove_on_exit and not sandbox.host and sandbox.status.phase not in lifecycle.ENDED:
            await self._records.remove(stored, "Removed", "stopped before it ran")
            return transitions.stopped(sandbox, grace_s, self._now_s())
        return await self._change(
            tenant, name, lambda now: transitions.stopped(now, grace_s, self._now_s()), "StopAsked", _told_grace
        )

    async def _change(
        self, tenant: str, name: str, change: Callable[[Sandbox], Sandbox], reason: str, told: Callable[[Sandbox], str]
    ) -> Sandbox:
        for _ in range(ATTEMPTS):
            stored = await self._records.find(tenant, name)
            after = change(stored.sandbox)
            if after == stored.sandbox:
                return after
            try:
                writes = [Put(stored.record.key, codec.encode(after)), self._records.event(after, reason, told(after))]
                revision = await self._store.commit(writes, [stored.expect])
            except Conflict:
                continue
            return replace(after, revision=revision)
        raise Conflict("Busy", f"sandbox {name} changes too fast: retry")

    async def delete(self, tenant: str, name: str, *, force: bool, allow_missing: bool) -> None:
        """Removes it. See DeleteSandbox."""
        for _ in range(ATTEMPTS):
            try:
                stored = await self._records.find(tenant, name)
            except NotFound:
                if allow_missing:
                    return
                raise
            if await self._delete_once(stored, force=force):
                return
        raise Conflict("Busy", f"sandbox {name} changes too fast: retry")

    async def _delete_once(self, stored: Stored, *, force: bool) -> bool:
        sandbox = stored.sandbox
        ended = sandbox.status.phase in lifecycle.ENDED
        if not ended and not force:
            text = f"sandbox {sandbox.name} is {sandbox.status.phase.name}: stop it first, or remove it with force (-f)"
            raise Precondition("SandboxLive", text, sandbox=sandbox.name, phase=sandbox.status.phase.value)
        try:
            if not sandbox.host or (ended and sandbox.host not in self._view.alive):
                gone = f"; its host {sandbox.host} is LOST and lets go of it when it returns" if sandbox.host else ""
                await self._records.remove(stored, "Removed", f"removed{gone}")
            elif sandbox.desired is not DesiredState.REMOVED:
                after = replace(sandbox, desired=DesiredState.REMOVED)
                writes = [Put(stored.record.key, codec.encode(after)), self._records.event(after, "RemoveAsked", "")]
                await self._store.commit(writes, [stored.expect])
        except Conflict:
            return False
        return True


def _digest_of(asked: Creation) -> str:
    return hashlib.sha256(codec.encode(replace(asked, validate_only=False, request_id=""))).hexdigest()


def _told_placed(sandbox: Sandbox) -> tuple[str, str]:
    if sandbox.status.phase is Phase.SCHEDULED:
        why = sandbox.status.message.partition("; ")[2]
        return "Scheduled", f"host {sandbox.host}, epoch {sandbox.epoch}{f': {why}' if why else ''}"
    return "Pending", sandbox.status.message


def _told_sizes(sandbox: Sandbox) -> str:
    sizes = sandbox.spec.resources
    memory = f"memory {sizes.memory_mib} MiB of {sizes.memory_min_mib}:{sizes.memory_max_mib}"
    return f"{memory}, cpu {sizes.cpu_milli / 1000:g}"


def _told_grace(sandbox: Sandbox) -> str:
    return f"with a grace of {sandbox.stop_grace_s} s"
