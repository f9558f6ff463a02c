"""What users can do with checkpoints: take, list, delete, restore, fork.

The hosts are the truth: a checkpoint is on the host of its source, in that host's store, and nothing of it is recorded
here. A sandbox that goes on from one is a sandbox like any other, placed on that host.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from controlplane import names
from controlplane.api.v1 import checkpoints_pb2
from controlplane.edge.checkpoints import parse_checkpoint
from controlplane.errors import AlreadyExists, NotFound, OperationError, Precondition, Unavailable
from controlplane.model import Checkpoint, Host, Sandbox, SandboxSpec
from controlplane.quotas import UNBOUNDED, Quota, require_checkpoint_within
from controlplane.relay import HostLinks, answer
from controlplane.requests import Creation, Forking, Restoration
from controlplane.sandboxes import Sandboxes
from controlplane.streams import Locator
from controlplane.view import View

LIST_DEADLINE_S, REMOVE_DEADLINE_S = 10.0, 20.0
TAKE_DEADLINE_S = 600.0
"""A large guest's memory goes to the host's disk; the caller's own deadline counts when it is shorter."""


@dataclass(frozen=True)
class Listed:
    """Checkpoints, and the hosts that did not answer."""

    checkpoints: tuple[Checkpoint, ...]
    silent: tuple[str, ...]


@dataclass(frozen=True)
class Forked:
    """New sandboxes, and how long their source's processes stood still."""

    sandboxes: tuple[Sandbox, ...]
    pause_s: float


class Checkpoints:
    """See the module."""

    def __init__(
        self, sandboxes: Sandboxes, locator: Locator, view: View, links: HostLinks,
        *, quota_of: Callable[[str], Quota] = lambda _: UNBOUNDED,
    ) -> None:  # fmt: skip
        self._quota_of = quota_of
        self._sandboxes, self._locator, self._view, self._links = sandboxes, locator, view, links

    async def create(self, tenant: str, sandbox: str, name: str, request_id: str) -> Checkpoint:
        """See CreateCheckpoint."""
        return await self._take(tenant, sandbox, name, request_id, ephemeral=False)

    async def _require_quota(self, source: Sandbox) -> None:
        quota = self._quota_of(source.tenant)
        if quota.checkpoint_mib is not None:
            listed = await self.listed(source.tenant)
            require_checkpoint_within(quota, listed.checkpoints, source)

    async def _take(self, tenant: str, sandbox: str, name: str, request_id: str, *, ephemeral: bool) -> Checkpoint:
        place = await self._locator.running(tenant, sandbox)
        await self._require_quota(place.sandbox)
        known = f"{tenant}/{place.sandbox.uid}/{request_id}".encode()
        key = hashlib.sha256(known).hexdigest()[:16] if request_id else secrets.token_hex(8)
        request = checkpoints_pb2.TakeCheckpointRequest(
            uid=place.sandbox.uid,
            id=key,
            name=name or names.made_up(_chooser(key) if request_id else secrets.randbelow),
            image=place.sandbox.spec.image,
            ephemeral=ephemeral,
        )
        stub = await self._links.checkpoints(place.host)
        taken = await answer(stub.Take, request, place.host.name, TAKE_DEADLINE_S)
        return parse_checkpoint(taken, place.host.name)

    async def listed(self, tenant: str) -> Listed:
        """See ListCheckpoints."""
        hosts = list(self._view.hosts.values())
        answers = await asyncio.gather(*(self._of_host(host) for host in hosts))
        silent = tuple(sorted(host.name for host, found in zip(hosts, answers, strict=True) if found is None))
        mine = [each for found in answers for each in found or () if each.tenant == tenant]
        return Listed(tuple(sorted(mine, key=lambda each: (each.created_at_s, each.id))), silent)

    async def _of_host(self, host: Host) -> list[Checkpoint] | None:
        """None when it does not answer."""
        if host.name not in self._view.alive:
            return None
        try:
            stub = await self._links.checkpoints(host)
            request = checkpoints_pb2.ListCheckpointsRequest()
            found = await answer(stub.List, request, host.name, LIST_DEADLINE_S)
        except OperationError:
            return None
        return [parse_checkpoint(each, host.name) for each in found.checkpoints]

    async def _find(self, tenant: str, name: str) -> Checkpoint:
        listed = await self.listed(tenant)
        found = [each for each in listed.checkpoints if name in (each.id, each.name)]
        if len(found) > 1:
            where = ", ".join(f"{each.id} on {each.host}" for each in found)
            raise Precondition("AmbiguousName", f"there are several checkpoints {name}: {where}; name one by its id")
        if found:
            return found[0]
        if listed.silent:
            silent = f"{len(listed.silent)} host{'s' if len(listed.silent) != 1 else ''}"
            text = f"no checkpoint {name} where it was looked for, but {silent} did not answer"
            raise Unavailable("HostUnreachable", text)
        raise NotFound("CheckpointNotFound", f"there is no checkpoint {name}", checkpoint=name)

    async def delete(self, tenant: str, name: str, *, allow_missing: bool) -> None:
        """See DeleteCheckpoint."""
        try:
            found = await self._find(tenant, name)
        except NotFound:
            if allow_missing:
                return
            raise
        await self._remove(found)

    async def _remove(self, checkpoint: Checkpoint) -> None:
        host = self._view.hosts.get(checkpoint.host)
        if host is None:
            raise Unavailable("HostUnreachable", f"host {checkpoint.host} is not registered any more")
        stub = await self._links.checkpoints(host)
        request = checkpoints_pb2.RemoveCheckpointRequest(id=checkpoint.id)
        await answer(stub.Remove, request, host.name, REMOVE_DEADLINE_S)

    async def restore(self, tenant: str, asked: Restoration) -> Sandbox:
        """See RestoreCheckpoint."""
        found = await self._find(tenant, asked.checkpoint)
        spec = _copied(found.spec, asked.remove_on_exit)
        return await self._sandboxes.create_on(found, Creation(asked.name, spec, asked.request_id))

    async def fork(self, tenant: str, asked: Forking) -> Forked:
        """See ForkSandbox."""
        taken = await self._take(tenant, asked.sandbox, f"fork-{secrets.token_hex(6)}", "", ephemeral=True)
        spec = _copied(taken.spec, asked.remove_on_exit)
        made: list[Sandbox] = []
        try:
            prefix = asked.prefix or names.made_up(secrets.randbelow)
            for number in range(1, asked.count + 1):
                made.append(await self._sandboxes.create_on(taken, Creation(f"{prefix}-{number}", spec)))
        except OperationError as error:
            await self._undo(tenant, made, taken)
            if isinstance(error, AlreadyExists):
                raise AlreadyExists(error.reason, f"{error}; give another prefix", **dict(error.details)) from error
            raise
        return Forked(tuple(made), taken.pause_s)

    async def _undo(self, tenant: str, made: list[Sandbox], taken: Checkpoint) -> None:
        """All or none: what cannot be undone now goes by itself (the checkpoint), or is told by `ps` (a sandbox)."""
        undoing: list[Callable[[], Awaitable[None]]] = [lambda: self._remove(taken)]
        for sandbox in made:
            uid = sandbox.uid
            undoing.insert(0, lambda uid=uid: self._sandboxes.delete(tenant, uid, force=True, allow_missing=True))  # type: ignore[misc]
        for undo in undoing:
            try:
                await undo()
            except OperationError:
                continue


def _chooser(seed: str) -> Callable[[int], int]:
    """Names that a repeat of the same request makes up again."""
    rest = int(seed, 16)

    def choice(below: int) -> int:
        nonlocal rest
        rest, chosen = divmod(rest, below)
        return chosen

    return choice


def _copied(spec: SandboxSpec, remove_on_exit: bool) -> SandboxSpec:
    """A copy's spec. It publishes nothing: its source may have the ports still, and no two can."""
    return replace(spec, remove_on_exit=remove_on_exit, services=replace(spec.services, publish=()))
