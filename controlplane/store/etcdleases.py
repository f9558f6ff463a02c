"""Leases of an etcd store: granted and revoked by calls, kept over one stream for all of them.

etcd's shortest lease is one and a half election timeouts (2 s by default); a shorter one lasts that long. It counts
from when it was last kept, and begins anew in full when etcd elects a leader. Whoever keeps one that has run out gets
LeaseGone: that is the signal to stop what it stood for.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import deque
from typing import Any

import grpc.aio

from controlplane.errors import Invalid, NotFound, StoreError
from controlplane.store.etcdlink import EtcdLink, Member, backoff_s


class Leases:
    """See the module. run() is the owner of the stream."""

    def __init__(self, link: EtcdLink) -> None:
        self._link = link
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._outbox: deque[int] = deque()
        self._work = asyncio.Event()

    async def grant(self, ttl_s: int) -> int:
        """See the contract."""
        if ttl_s < 1:
            raise Invalid("ttl_s", "a lease lasts at least 1 s")
        request = self._link.proto.LeaseGrantRequest(TTL=ttl_s, ID=secrets.randbits(62) + 1)
        return int((await self._link.call("Lease", "LeaseGrant", request, safe=False)).ID)

    async def revoke(self, lease: int) -> None:
        """See the contract."""
        try:
            await self._link.call("Lease", "LeaseRevoke", self._link.proto.LeaseRevokeRequest(ID=lease), safe=True)
        except NotFound:
            return

    async def keep(self, lease: int) -> None:
        """See the contract."""
        future = self._waiting.get(lease)
        if future is None:
            future = self._waiting[lease] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: self._forget(lease, done))
            self._outbox.append(lease)
            self._work.set()
        try:
            async with asyncio.timeout(self._link.access.deadline_s):
                left_s = await asyncio.shield(future)
        except TimeoutError as error:
            raise StoreError("StoreUnavailable", f"etcd at {self._link.where} does not keep the lease") from error
        if left_s <= 0:
            raise gone(lease)

    def _forget(self, lease: int, future: asyncio.Future[int]) -> None:
        if self._waiting.get(lease) is future:
            del self._waiting[lease]
        if not future.cancelled():
            future.exception()  # it is told to those who wait, if there are any

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            await self._work.wait()
            try:
                async with self._link.stream("Lease", "LeaseKeepAlive") as (call, member):
                    try:
                        async with asyncio.TaskGroup() as group:
                            group.create_task(self._send(call))
                            while True:
                                self._take(await self._read(call, member))
                                failures = 0
                    except* (StoreError, TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as broken:
                        cause = broken.exceptions[0]
                    raise cause
            except StoreError as error:
                failures += 1
                self._fail(error)
                await asyncio.sleep(backoff_s(failures, random.random()))

    async def _read(self, call: Any, member: Member) -> Any:
        async with self._link.bounded(member, None):
            return await call.read()

    def _take(self, response: Any) -> None:
        if response is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StoreError("StoreUnavailable", "etcd ended the stream that keeps leases")
        future = self._waiting.get(response.ID)
        if future is not None and not future.done():
            future.set_result(int(response.TTL))

    async def _send(self, call: Any) -> None:
        while True:
            self._work.clear()
            while self._outbox:
                await call.write(self._link.proto.LeaseKeepAliveRequest(ID=self._outbox.popleft()))
            await self._work.wait()

    def _fail(self, error: StoreError) -> None:
        self._outbox.clear()
        self._work.clear()
        for future in tuple(self._waiting.values()):
            if not future.done():
                future.set_exception(error)


def gone(lease: int) -> NotFound:
    """The lost-lease signal."""
    return NotFound("LeaseGone", f"lease {lease} has run out: grant a new one", lease=lease)
