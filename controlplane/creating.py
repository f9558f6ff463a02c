"""Creating and placing sandboxes. Any replica records them; the one that leads places them.

A create is one commit: record, name, uid, event and used request, each expected not to be there yet, so that names and
request ids hold across replicas without a lock. It is decided on the view at first, without reading the store; only
when that fails, by a race or because the name or the request was used before, it is decided again on what the store
has. So creates that come together share nothing and go into the store together.

The leader places in the same commit, under its fence. It counts what it has placed and not yet seen in the view
(assume), so that it need not wait for one commit to decide the next. Other replicas record PENDING, and the leader,
which sees it at once, places it.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from controlplane import codec, keys, lifecycle, names, placing
from controlplane.admission import Admission, Decided
from controlplane.api.vcpus import vcpu_ceiling
from controlplane.errors import AlreadyExists, Conflict, Exhausted, Invalid, NotFound, OperationError, StoreError
from controlplane.images import Images
from controlplane.leadership import Leadership
from controlplane.model import Checkpoint, DesiredState, LayerSize, Phase, Sandbox, SandboxSpec, SandboxStatus
from controlplane.quotas import UNBOUNDED, require_within
from controlplane.records import Records, stored_sandbox
from controlplane.requests import Creation, UsedRequest
from controlplane.store.contract import Expect, Put, Store, Write
from controlplane.tenants import Tenants
from controlplane.view import View

T = TypeVar("T")
ATTEMPTS = 16
VIEW_LAG_S = 5.0
TO_BE_PLACED = "waiting for the leading control plane to place it"


class Creator:
    """See the module."""

    def __init__(
        self, store: Store, view: View, records: Records, images: Images, tenants: Tenants, leadership: Leadership,
        admission: Admission, *, now_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._store, self._view, self._records, self._images = store, view, records, images
        self._tenants, self._leadership, self._admission, self._now_s = tenants, leadership, admission, now_s

    # Creating.

    async def create(self, tenant: str, asked: Creation) -> Sandbox:
        """Records a sandbox and places it. See CreateSandbox."""
        return await self._insist(tenant, asked, lambda attempt: self._create_once(tenant, asked, attempt))

    async def create_on(self, checkpoint: Checkpoint, asked: Creation) -> Sandbox:
        """Records a sandbox that goes on from a checkpoint, which only the host that has it can do. As create()."""
        return await self._insist(
            checkpoint.tenant, asked, lambda attempt: self._create_on_once(checkpoint, asked, attempt)
        )

    async def _insist(self, tenant: str, asked: Creation, once: Callable[[int], Awaitable[Sandbox]]) -> Sandbox:
        """On the view first, then on what the store has, until nobody was quicker."""
        for attempt in range(ATTEMPTS):
            if attempt:
                earlier = await self._created_before(tenant, asked)
                if earlier is not None:
                    return earlier
            try:
                return await once(attempt)
            except Conflict:
                await self._catch_up()
            except StoreError:
                raise
            except OperationError:  # what refuses it may be what this very request has made before
                earlier = await self._created_before(tenant, asked)
                if earlier is None:
                    raise
                return earlier
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
        image = self._images.known(tenant, asked.spec.image) if not attempt else None
        image = image or await self._images.get(tenant, asked.spec.image)
        spec = replace(asked.spec, image_digest=image.digest)
        if not (spec.process.argv or image.config.entrypoint or image.config.cmd):
            text = f"image {image.name} has no command of its own: name one"
            raise Invalid("spec.process.argv", text, reason="NoCommand")
        self._tenants.require_class(tenant, spec.sandbox_class)
        layers = tuple(LayerSize(layer.digest, layer.size_bytes) for layer in image.layers)
        wanted = self._wanted(tenant, asked.name, spec, layers, attempt)
        return await self._record(wanted, asked, attempt, [Expect(keys.image(tenant, image.name), image.revision)])

    async def _create_on_once(self, checkpoint: Checkpoint, asked: Creation, attempt: int) -> Sandbox:
        wanted = self._wanted(checkpoint.tenant, asked.name, asked.spec, checkpoint.layers, attempt)
        return await self._record(replace(wanted, only_host=checkpoint.host), asked, attempt, [])

    def _wanted(
        self, tenant: str, name: str, spec: SandboxSpec, layers: tuple[LayerSize, ...], attempt: int
    ) -> Sandbox:
        return Sandbox(
            name=name or names.made_up(secrets.randbelow, attempt),
            uid=secrets.token_hex(8),
            tenant=tenant,
            spec=spec,
            created_at_s=self._now_s(),
            vcpus=vcpu_ceiling(spec.resources.vcpus),
            layers=layers,
        )

    async def _record(self, wanted: Sandbox, asked: Creation, attempt: int, expect: list[Expect]) -> Sandbox:
        careful = attempt > 0 or asked.validate_only
        taken = await self._free_name(wanted.tenant, wanted.name) if careful else 0
        if asked.validate_only:
            async with self._admission.deciding(wanted.tenant):
                return replace(self._placed_within_quota(wanted), uid="")

        def decide(before: Sequence[Sandbox]) -> Decided:
            return self._decided(wanted, asked, taken, expect, before)

        if self._admission.is_bounded(wanted.tenant):
            recording = self._admission.together(self._store, wanted.tenant, decide)
        else:
            recording = self._record_alone(decide(()))
        placed, revision = await self._kept(wanted.uid, recording)
        return replace(placed, revision=revision)

    def _decided(
        self, wanted: Sandbox, asked: Creation, taken: int, expect: list[Expect], before: Sequence[Sandbox]
    ) -> Decided:
        """`before`: what is recorded together with it, and counts."""
        placed = self._placed_within_quota(wanted, before)
        if self._leadership.leads:
            expect = [*expect, *self._leadership.fence()]
        elif placed.host:
            placed = replace(wanted, status=SandboxStatus(message=TO_BE_PLACED))
        record = codec.encode(placed)
        writes, guards = self._commit_of(placed, record, asked, taken)
        return Decided(placed, record, tuple(writes), (*expect, *guards))

    async def _record_alone(self, decided: Decided) -> tuple[Sandbox, int]:
        if decided.sandbox.host:
            self._view.assume(decided.sandbox, decided.record)
        return decided.sandbox, await self._store.commit(decided.writes, decided.expect)

    async def _kept(self, uid: str, recording: Awaitable[T]) -> T:
        """What is placed counts from now on, unless it is refused."""
        try:
            return await recording
        except StoreError:  # it may be there all the same: it counts for as long as it takes to see it
            asyncio.get_running_loop().call_later(VIEW_LAG_S, self._view.release, uid)
            raise
        except BaseException:
            self._view.release(uid)
            raise

    def _commit_of(
        self, placed: Sandbox, record: bytes, asked: Creation, taken: int
    ) -> tuple[list[Write], list[Expect]]:
        tenant, key = placed.tenant, keys.sandbox(placed.tenant, placed.name, placed.uid)
        writes: list[Write] = [
            Put(key, record),
            Put(keys.uid(placed.uid), key.encode()),
            Put(keys.name(tenant, placed.name), placed.uid.encode()),
            self._records.event(placed, *_told_placed(placed)),
        ]
        expect = [
            Expect(keys.name(tenant, placed.name), taken),
            Expect(keys.image_removal(tenant, placed.spec.image_digest), 0),
        ]
        if asked.request_id:
            used = UsedRequest(key, _digest_of(asked), self._now_s())
            writes.append(Put(keys.request(tenant, asked.request_id), codec.encode(used)))
            expect.append(Expect(keys.request(tenant, asked.request_id), 0))
        return writes, expect

    def _placed_within_quota(self, wanted: Sandbox, before: Sequence[Sandbox] = ()) -> Sandbox:
        """The sandbox placed. One that is too much may have the place of a pool's member, if it claims one."""
        try:
            self.require_quota(wanted, before)
        except Exhausted:
            if all(pool.tenant != wanted.tenant for pool in self._view.pools.values()):
                raise
            placed = placing.placed(self._view, wanted)
            if placed.placed is None or not placed.placed.pool:
                raise
            self.require_quota(wanted, before, claimed=placed.placed.pool)
            return placed
        return placing.placed(self._view, wanted)

    def require_quota(self, sandbox: Sandbox, before: Sequence[Sandbox] = (), *, claimed: str = "") -> None:
        """Exhausted when it and what the tenant has besides (and `before`, not recorded yet) are too much; it takes the
        place of a member of the pool `claimed`. Decide so under the tenant's guard."""
        quota = self._tenants.quota(sandbox.tenant)
        if quota != UNBOUNDED:
            pools = [pool for pool in self._view.pools.values() if pool.tenant == sandbox.tenant]
            require_within(quota, [*self._view.of_tenant(sandbox.tenant), *before], sandbox, pools, claimed=claimed)

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

    async def _catch_up(self) -> None:
        revision = (await self._store.page(keys.LEADER, limit=1)).revision
        async with asyncio.timeout(VIEW_LAG_S):
            await self._view.reached(revision)

    # Placing.

    async def place_pending(self, sandbox: Sandbox) -> bool:
        """Places a PENDING sandbox if the present view has room for it; whether it did. The leader's."""
        if self._view.is_assumed(sandbox.uid) or placing.still_hopeless(self._view, sandbox):
            return False
        try:
            placed = placing.placed(self._view, sandbox)
        except Exhausted as error:
            placed = replace(sandbox, status=SandboxStatus(reason=error.reason, message=str(error)))
        if not placed.host and placed.status.reason == sandbox.status.reason:
            return False
        key = keys.sandbox(sandbox.tenant, sandbox.name, sandbox.uid)
        record = codec.encode(placed)
        told = (self._records.event(placed, *_told_placed(placed)),) if placed.host else ()
        expect = (Expect(key, sandbox.revision), *self._leadership.fence())
        await self._kept(sandbox.uid, self._record_alone(Decided(placed, record, (Put(key, record), *told), expect)))
        return bool(placed.host)


def _digest_of(asked: Creation) -> str:
    return hashlib.sha256(codec.encode(Creation(asked.name, asked.spec))).hexdigest()


def _told_placed(sandbox: Sandbox) -> tuple[str, str]:
    if sandbox.status.phase is Phase.SCHEDULED:
        why = sandbox.status.message.partition("; ")[2]
        return "Scheduled", f"host {sandbox.host}, epoch {sandbox.epoch}{f': {why}' if why else ''}"
    return "Pending", sandbox.status.message
