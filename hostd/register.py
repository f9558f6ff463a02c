"""The host's side of HostSync: says who it is, pulls what is assigned, reports what is. Keeps trying for ever.

Each of the three loops has its own deadline a call and its own back-off, so that a control plane that is away stops
nothing on this host: sandboxes run on, and what happened meanwhile is reported when it is back (only the newest
status of each sandbox counts; events are kept up to a bound, the oldest dropped first).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from controlplane.api.status import HOST_REMOVED, Condition, parse_error
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, pools_pb2, sandboxes_pb2
from hostd import edge, poolreports
from hostd.errors import InvalidSpec
from hostd.sandboxes import Happened, Report, Sandboxes
from hostd.warmpool import PoolSpec

log = logging.getLogger("sandloom.hostd.register")

CALL_DEADLINE_S = 10.0
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
EVENTS_KEPT = 1000
STALE_EPOCH = "StaleEpoch"
STALE_END_S = 30.0
"""How long new sandboxes wait for those to end that this host must not run any more."""

WATCH_SILENCE_S = 60.0
"""A watch sends a bookmark far more often than this; longer silence is a dead peer."""


HOPELESS = frozenset({Condition.INVALID, Condition.PRECONDITION, Condition.NOT_FOUND, Condition.OUT_OF_RANGE})
"""Refusals that another try would meet again."""


@dataclass(frozen=True)
class Refused:
    """An assignment that this host cannot read: the sandbox fails before it is one."""

    uid: str
    epoch: int
    error: InvalidSpec


class Outbox:
    """What waits to be told: the newest report of each sandbox, and events in order. Filled from anywhere."""

    def __init__(self) -> None:
        self.reports: dict[str, Report | Refused] = {}
        self.events: deque[Happened] = deque(maxlen=EVENTS_KEPT)
        self._filled = asyncio.Event()

    def report(self, report: Report) -> None:
        """Replaces what was to be told of that sandbox; a removal is replaced by news of a later epoch only."""
        spec = report.record.spec
        waiting = self.reports.get(spec.uid)
        if not (isinstance(waiting, Report) and waiting.removed and waiting.record.spec.epoch >= spec.epoch):
            self.reports[spec.uid] = report
        self._filled.set()

    def refused(self, refused: Refused) -> None:
        """Tells that a sandbox can never run here."""
        self.reports[refused.uid] = refused
        self._filled.set()

    def happened(self, event: Happened) -> None:
        """Puts an event in line."""
        self.events.append(event)
        self._filled.set()

    async def wait(self) -> None:
        """Returns when something waits."""
        while not self.reports and not self.events:
            self._filled.clear()
            await self._filled.wait()


class Registration:
    """The three loops. run() is their owner."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        host: str,
        sandboxes: Sandboxes,
        outbox: Outbox,
        describe: Callable[[], Awaitable[hosts_pb2.Host]],
    ) -> None:
        self._sync = hosts_pb2_grpc.HostSyncStub(channel)
        self._host, self._sandboxes, self._outbox, self._describe = host, sandboxes, outbox, describe
        self.registered = asyncio.Event()
        self._poke = asyncio.Event()

    def poke(self) -> None:
        """Reports the host now instead of at the next heartbeat (an image came, say)."""
        self._poke.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep("heartbeat", self._heartbeat), name="heartbeat")
            group.create_task(self._keep("watch", self._watch), name="watch")
            group.create_task(self._keep("pools", self._watch_pools), name="pools")
            group.create_task(self._keep("report", self._tell), name="tell")

    async def _keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does `work` again whenever it fails or ends, with a back-off that forgets failures of long ago."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            begin_s = loop.time()
            try:
                await work()
            except grpc.aio.AioRpcError as error:
                failure = parse_error(error)
                log.warning("%s: the control plane does not take it: %s", name, failure.message)
                if failure.reason == HOST_REMOVED:  # what runs here runs elsewhere by now, or is wanted no more
                    self._sandboxes.listed({})
            except TimeoutError:
                log.warning("%s: no sign of life of the control plane", name)
            except Exception:  # a bug, or a disk that takes no record: the host's other loops and sandboxes go on
                log.exception("%s: begun again", name)
            if loop.time() - begin_s > 2 * BACKOFF_S[-1]:
                failures = 0
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1

    async def _heartbeat(self) -> None:
        while True:
            self._poke.clear()
            request = hosts_pb2.ReportHostRequest(host=await self._describe())
            answer = await self._sync.ReportHost(request, timeout=CALL_DEADLINE_S)
            self.registered.set()
            try:
                async with asyncio.timeout(max(1.0, answer.lease_s / 3)):
                    await self._poke.wait()
            except TimeoutError:
                pass

    async def _until_registered(self) -> None:
        async with asyncio.timeout(WATCH_SILENCE_S):
            await self.registered.wait()

    async def _watch(self) -> None:
        await self._until_registered()
        call = self._sync.WatchAssignments(hosts_pb2.WatchAssignmentsRequest(host=self._host))
        listing: list[sandboxes_pb2.Sandbox] | None = []
        async with _cancelled_at_end(call) as events:
            while True:
                async with asyncio.timeout(WATCH_SILENCE_S):
                    event = await anext(events, None)
                if event is None:
                    return
                if event.kind == sandboxes_pb2.SandboxEvent.BOOKMARK:
                    if listing is not None:
                        await self._take_list(listing)
                        listing = None
                elif event.kind == sandboxes_pb2.SandboxEvent.DELETE:
                    self._sandboxes.unassign(event.sandbox.uid)
                elif listing is not None:
                    listing.append(event.sandbox)
                else:
                    self._assign(event.sandbox)

    async def _take_list(self, assigned: list[sandboxes_pb2.Sandbox]) -> None:
        """First what is not ours any more is ended (another host may run it by now), then what is ours begins."""
        stale = self._sandboxes.listed({sandbox.uid: sandbox.assignment.epoch for sandbox in assigned})
        try:
            async with asyncio.timeout(STALE_END_S):
                await self._sandboxes.until_ended(stale)
        except TimeoutError:
            log.error("sandboxes of older epochs do not end in %g s: going on; hostd keeps trying", STALE_END_S)
        for sandbox in assigned:
            self._assign(sandbox)

    async def _watch_pools(self) -> None:
        await self._until_registered()
        call = self._sync.WatchPools(hosts_pb2.WatchPoolsRequest(host=self._host))
        async with _cancelled_at_end(call) as lists:
            while True:
                async with asyncio.timeout(WATCH_SILENCE_S):
                    whole = await anext(lists, None)
                if whole is None:
                    return
                self._sandboxes.pools.assign(self._pools_in(whole))

    def _pools_in(self, whole: pools_pb2.PoolAssignments) -> list[PoolSpec]:
        """Those that this host can read; of the others it keeps nothing."""
        specs: list[PoolSpec] = []
        for pool in whole.pools:
            try:
                specs.append(poolreports.parse_assignment(pool))
            except InvalidSpec as error:
                log.warning("pool %s refused: %s", pool.name, error)
        return specs

    def _assign(self, sandbox: sandboxes_pb2.Sandbox) -> None:
        try:
            self._sandboxes.assign(edge.parse_sandbox(sandbox))
        except InvalidSpec as error:
            log.warning("assignment %s refused: %s", sandbox.name, error)
            if self._sandboxes.knows(sandbox.uid):  # what runs goes on as it was
                self._outbox.happened(Happened(sandbox.name, error.reason, str(error), self._sandboxes.now_s()))
            else:
                self._outbox.refused(Refused(sandbox.uid, sandbox.assignment.epoch, error))

    async def _tell(self) -> None:
        while True:
            await self._outbox.wait()
            while self._outbox.events:
                event = self._outbox.events[0]
                await self._tell_event(event)
                if self._outbox.events and self._outbox.events[0] is event:  # else the bound pushed it out meanwhile
                    self._outbox.events.popleft()
            for uid, report in list(self._outbox.reports.items()):
                await self._tell_report(uid, report)
                if self._outbox.reports.get(uid) is report:  # else a newer one came meanwhile
                    del self._outbox.reports[uid]

    async def _tell_event(self, happened: Happened) -> None:
        event = sandboxes_pb2.Event(
            time=edge.timestamp(happened.time_s),
            kind=happened.kind,
            subject=happened.subject,
            reason=happened.reason,
            message=happened.message[:4096],
            host=self._host,
        )
        try:
            await self._sync.RecordEvent(hosts_pb2.RecordEventRequest(event=event), timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            failure = parse_error(error)
            if failure.condition not in HOPELESS:
                raise
            log.error("event %s of %s is not taken: %s", event.reason, event.subject, failure.message)

    async def _tell_report(self, uid: str, report: Report | Refused) -> None:
        try:
            await self._sync.ReportSandbox(_request(uid, self._host, report), timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            failure = parse_error(error)
            if failure.condition not in HOPELESS:
                raise
            if failure.condition is Condition.NOT_FOUND or failure.reason == STALE_EPOCH:
                epoch = report.epoch if isinstance(report, Refused) else report.record.spec.epoch
                self._sandboxes.unassign(uid, epoch)  # it is not ours any more: let go of it
            else:
                log.error("the report of sandbox %s is not taken: %s", uid, failure.message)


def _request(uid: str, host: str, report: Report | Refused) -> hosts_pb2.ReportSandboxRequest:
    if isinstance(report, Refused):
        status = edge.render_refusal(report.error, report.epoch)
        return hosts_pb2.ReportSandboxRequest(uid=uid, host=host, epoch=report.epoch, status=status)
    return hosts_pb2.ReportSandboxRequest(
        uid=uid,
        host=host,
        epoch=report.record.spec.epoch,
        status=edge.render_status(report),
        removed=report.removed,
    )


@asynccontextmanager
async def _cancelled_at_end(call: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """The answers of a server's stream, which is cancelled when the block is left."""
    try:
        yield call.__aiter__()
    finally:
        call.cancel()
