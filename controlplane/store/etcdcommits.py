"""Commits of an etcd store, those of one moment in one transaction: one flush and one call for all of them.

A transaction of etcd's may hold transactions, each with its own comparisons, and each is decided by itself. All of them
are decided on what was before the outer one, and no key may be put twice, so only commits that are independent of each
other go together: none writes what another reads or writes. The rest wait for the next one. Commits under a lease go
alone, for a lease that has run out fails a whole transaction.

Bounds are etcd's defaults: 128 operations a level (--max-txn-ops; what is nested gets what the levels above leave), and
1.5 MiB a request. A commit with more writes than a level holds is split into nested parts: still all or none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from controlplane.errors import Conflict, Invalid, OperationError, StoreError
from controlplane.store.contract import MOST_EXPECTATIONS, Expect, Put, Write
from controlplane.store.etcdlink import EtcdLink

GROUP_COMMITS = 60
PART_OPS = 60
MOST_WRITES = PART_OPS * PART_OPS
GROUP_BYTES = 1 << 20
IN_FLIGHT = 2
LINGER_S, LINGERS = 0.008, 5
"""How long commits wait for more while those keep coming, and how often; one that comes alone goes at once."""


@dataclass(frozen=True)
class Job:
    """One commit, what it touches, and where its revision goes."""

    writes: tuple[Write, ...]
    expect: tuple[Expect, ...]
    done: asyncio.Future[int] = field(compare=False)

    @property
    def size_bytes(self) -> int:
        """About what it takes in a request."""
        values = sum(len(write.value) for write in self.writes if isinstance(write, Put))
        return values + 64 * (len(self.writes) + len(self.expect))

    @property
    def alone(self) -> bool:
        """Whether it cannot share a transaction."""
        leased = any(isinstance(write, Put) and write.lease for write in self.writes)
        return leased or len(self.writes) > PART_OPS or len(self.expect) > MOST_EXPECTATIONS


def take_group(waiting: deque[Job]) -> list[Job]:
    """Removes from `waiting` the jobs that go into the next transaction, the first one always, the others in order.
    Pure but for that."""
    group = [waiting.popleft()]
    if group[0].alone:
        return group
    written = {write.key for write in group[0].writes}
    read = {expect.key for expect in group[0].expect}
    size_bytes = group[0].size_bytes
    later: list[Job] = []
    while waiting and len(group) < GROUP_COMMITS:
        job = waiting.popleft()
        writes = {write.key for write in job.writes}
        reads = {expect.key for expect in job.expect}
        size_bytes += job.size_bytes
        if size_bytes > GROUP_BYTES:
            later.append(job)
            break
        if job.alone or not written.isdisjoint(writes) or not written.isdisjoint(reads) or not read.isdisjoint(writes):
            later.append(job)
            size_bytes -= job.size_bytes
        else:
            group.append(job)
        written |= writes  # of those that wait, too: what comes after them does not overtake them
        read |= reads
    waiting.extendleft(reversed(later))
    return group


class Commits:
    """See the module. run() is its owner."""

    def __init__(self, link: EtcdLink, prefix: str) -> None:
        self._link, self._prefix = link, prefix
        self._waiting: deque[Job] = deque()
        self._work = asyncio.Event()
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._flying: set[asyncio.Future[int]] = set()

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect]) -> int:
        """The revision. See the contract."""
        if len(writes) > MOST_WRITES or len(expect) > MOST_EXPECTATIONS:
            most = f"{MOST_WRITES} and {MOST_EXPECTATIONS} are the most"
            raise Invalid("writes", f"{len(writes)} writes and {len(expect)} expectations: {most}")
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(Job(tuple(writes), tuple(expect), done))
        self._work.set()
        return await done

    async def run(self) -> None:
        """Until cancelled; what is open then fails with StoreError."""
        crowded = False
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._work.wait()
                    await self._slots.acquire()
                    if crowded:
                        await self._gather()
                    if not self._waiting:
                        self._slots.release()
                        self._work.clear()
                        continue
                    jobs = take_group(self._waiting)
                    crowded = len(jobs) > 1
                    self._flying |= {job.done for job in jobs}
                    group.create_task(self._send(jobs))
        finally:
            error = StoreError("StoreClosed", "the store is closed")
            for done in [*self._flying, *(job.done for job in self._waiting)]:
                if not done.done():
                    done.set_exception(error)

    async def _gather(self) -> None:
        for _ in range(LINGERS):
            before = len(self._waiting)
            if before >= GROUP_COMMITS:
                return
            await asyncio.sleep(LINGER_S)
            if len(self._waiting) == before:
                return

    async def _send(self, jobs: list[Job]) -> None:
        outcomes: Sequence[int | OperationError]
        try:
            outcomes = await self._transact(jobs)
        except OperationError as error:
            outcomes = [error] * len(jobs)
        finally:
            self._slots.release()
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._flying.discard(job.done)
            if job.done.done():
                continue
            if isinstance(outcome, int):
                job.done.set_result(outcome)
            else:
                job.done.set_exception(outcome)

    async def _transact(self, jobs: list[Job]) -> list[int | OperationError]:
        requests = [self._request(job) for job in jobs]
        if len(jobs) == 1:
            answer = await self._link.call("KV", "Txn", requests[0], safe=False)
            succeeded = [answer.succeeded]
        else:
            proto = self._link.proto
            outer = proto.TxnRequest(success=[proto.RequestOp(request_txn=request) for request in requests])
            answer = await self._link.call("KV", "Txn", outer, safe=False)
            succeeded = [response.response_txn.succeeded for response in answer.responses]
        revision = int(answer.header.revision)
        return [
            revision if won else Conflict("Changed", f"one of {_shown(job.expect)} has changed: read again, then retry")
            for job, won in zip(jobs, succeeded, strict=True)
        ]

    def _request(self, job: Job) -> Any:
        proto = self._link.proto
        compare = [
            proto.Compare(
                result=proto.Compare.EQUAL, target=proto.Compare.MOD, key=self._key(expect.key),
                mod_revision=expect.mod_revision,
            )
            for expect in job.expect
        ]  # fmt: skip
        operations = [self._operation(write) for write in job.writes]
        if len(operations) > PART_OPS:
            parts = [operations[at : at + PART_OPS] for at in range(0, len(operations), PART_OPS)]
            operations = [proto.RequestOp(request_txn=proto.TxnRequest(success=part)) for part in parts]
        return proto.TxnRequest(compare=compare, success=operations)

    def _operation(self, write: Write) -> Any:
        proto = self._link.proto
        key = self._key(write.key)
        if isinstance(write, Put):
            return proto.RequestOp(request_put=proto.PutRequest(key=key, value=write.value, lease=write.lease))
        return proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key))

    def _key(self, key: str) -> bytes:
        return (self._prefix + key).encode("ascii")


def _shown(expect: Iterable[Expect]) -> str:
    return ", ".join(one.key for one in expect)
