"""What the control plane does of itself: places what is PENDING, gives up what a lost host had, keeps house.

Level-triggered: each round looks at the whole view and does what is missing; a round that fails is done again. One
control plane does this at a time (leadership.py), and every step is a guarded commit, so that two would do no harm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from controlplane import codec, events, keys, lifecycle
from controlplane.api.v1 import hosts_pb2
from controlplane.drains import Drains
from controlplane.errors import Conflict, ControlPlaneError
from controlplane.images import Images
from controlplane.joining import Joining
from controlplane.membership import Standing
from controlplane.model import DesiredState, Event, Phase, Residency, Sandbox
from controlplane.records import Records
from controlplane.relay import HostLinks, answer
from controlplane.requests import UsedRequest
from controlplane.sampling import Sampler
from controlplane.sandboxes import Sandboxes
from controlplane.store.contract import Delete, Store
from controlplane.usageledger import UsageLedger
from controlplane.view import View

log = logging.getLogger("sandloom.controlplane.reconciler")

ROUND_S = 5.0
"""The longest pause between two rounds when nothing happens."""

GATHER_S = 0.02
"""Changes come in bursts: one round for all of a burst."""

IMAGES_GATHER_S = 0.5
"""The same for images, which nobody waits for and which are looked at as a whole."""

PLACED_AT_ONCE, GIVEN_UP_AT_ONCE = 256, 64
REQUESTS_S, USAGE_S, READ_RECORDS = 3600.0, 3600.0, 500
HOUSE_S = 60.0
REQUEST_KEPT_S = 24 * 3600.0
FORGET_DEADLINE_S = 20.0


class Reconciler:
    """See the module. run() is its owner."""

    def __init__(
        self, store: Store, view: View, records: Records, sandboxes: Sandboxes, images: Images, links: HostLinks,
        event_log: events.EventLog, drains: Drains, joining: Joining, *, lost_grace_s: float, history_s: float,
        now_s: Callable[[], float] = time.time,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store, self._view, self._records = store, view, records
        self._sandboxes, self._images = sandboxes, images
        self._links, self._events, self._drains = links, event_log, drains
        self._joining = joining
        self._lost_grace_s, self._history_s = lost_grace_s, history_s
        self._now_s, self._clock_s = now_s, clock_s
        self._lost_since_s: dict[str, float] = {}
        self._marks: list[tuple[float, int]] = []
        self._requests_due_s = self._usage_due_s = 0.0
        self._usage = UsageLedger(store, now_s=now_s)
        self._sampler = Sampler(store, view, links, now_s=now_s)

    async def run(self) -> None:
        """Until cancelled. Begins with nothing remembered: while another one led, or nobody, hosts came and went."""
        self._lost_since_s.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self._rounds(self._lost_hosts, self._orphans, self._drains.step, self._pending), name="reconciler"
            )
            images = self._rounds(self._forget_images, gather_s=IMAGES_GATHER_S)  # may wait for hosts
            group.create_task(images, name="images")
            group.create_task(self._every(HOUSE_S, self._keep_house), name="housekeeper")
            group.create_task(self._sampler.run(), name="sampler")

    async def _rounds(self, *steps: Callable[[], Awaitable[None]], gather_s: float = GATHER_S) -> None:
        while True:
            moved = self._view.moved
            for step in steps:
                await self._tried(step)
            await asyncio.sleep(gather_s)
            try:
                async with asyncio.timeout(self._pause_s()):
                    await moved.wait()
            except TimeoutError:
                pass

    def _pause_s(self) -> float:
        now_s = self._clock_s()
        due = [since + self._lost_grace_s - now_s for since in self._lost_since_s.values()]
        return max(0.01, min([ROUND_S, *(left for left in due if left > 0)]))

    async def _every(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._tried(work)
            await asyncio.sleep(period_s)

    async def _tried(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except Conflict:
            pass  # somebody was quicker; the next round sees what is now
        except (ControlPlaneError, TimeoutError) as error:
            log.warning("%s: %s", step.__name__.strip("_"), error)

    def _open_ends(self) -> list[Sandbox]:
        return [self._view.sandboxes[uid] for uid in sorted(self._view.open_ends)]

    # Placing.

    async def _pending(self) -> None:
        """Decided one after the other, the oldest first; committed together."""
        waiting = [
            sandbox
            for sandbox in self._open_ends()
            if sandbox.status.phase is Phase.PENDING
            and sandbox.desired is DesiredState.RUNNING
            and not (sandbox.leaving and self._still_has(sandbox.leaving))  # it must have ended there first
        ]
        waiting.sort(key=lambda s: (s.created_at_s, s.uid))
        for at in range(0, len(waiting), PLACED_AT_ONCE):
            batch = [s for s in waiting[at : at + PLACED_AT_ONCE] if self._view.sandboxes.get(s.uid) is s]
            await _each(self._sandboxes.place_pending(sandbox) for sandbox in batch)

    # Lost hosts.

    async def _lost_hosts(self) -> None:
        view, now_s = self._view, self._clock_s()
        for name in sorted(view.lost - self._lost_since_s.keys()):
            self._lost_since_s[name] = now_s
            text = f"its lease ran out; what it runs is given up in {self._lost_grace_s:g} s unless it returns"
            log.warning("host %s is LOST: %s", name, text)
            await self._events.record(Event(self._now_s(), "host", name, "HostLost", text, name))
        for name in sorted(self._lost_since_s):
            if name in view.alive or name not in view.hosts:
                del self._lost_since_s[name]

    async def _orphans(self) -> None:
        """Sandboxes of hosts that are lost for longer than the grace, or that nobody will ever remove."""
        due = self._gone()
        on_lost = [sandbox for name in sorted(due) for sandbox in self._view.on_host(name)]
        given_up: list[Sandbox] = []
        for sandbox in {s.uid: s for s in [*on_lost, *self._open_ends()]}.values():
            lost = sandbox.host in due
            ended = sandbox.status.phase in lifecycle.ENDED
            left_over = not sandbox.host and ended and sandbox.spec.remove_on_exit
            removable = sandbox.desired is DesiredState.REMOVED and (not sandbox.host or (lost or self._away(sandbox)))
            if (lost and not ended) or removable or left_over:
                given_up.append(sandbox)
        for at in range(0, len(given_up), GIVEN_UP_AT_ONCE):
            await _each(self._give_up(sandbox) for sandbox in given_up[at : at + GIVEN_UP_AT_ONCE])

    def _gone(self) -> set[str]:
        """Hosts that are not to be waited for: lost for longer than the grace, or removed."""
        due = {name for name, since in self._lost_since_s.items() if self._clock_s() - since >= self._lost_grace_s}
        removed = {name for name, m in self._view.members.items() if m.standing is Standing.REMOVED}
        return due | removed

    def _still_has(self, host: str) -> bool:
        return host not in self._gone() and host in self._view.hosts

    def _away(self, sandbox: Sandbox) -> bool:
        ended = sandbox.status.phase in lifecycle.ENDED
        return ended and sandbox.host in self._lost_since_s

    async def _give_up(self, sandbox: Sandbox) -> None:
        stored = await self._records.find_uid(sandbox.uid)
        if stored is None or stored.sandbox.revision != sandbox.revision:
            return
        if not sandbox.host:
            await self._records.remove(stored, "Removed", "no host has it")
            return
        if self._view.member(sandbox.host).standing is Standing.REMOVED:
            await self._records.give_up(stored, "HostRemoved", f"host {sandbox.host} was removed")
            return
        text = f"host {sandbox.host} is LOST: its lease ran out and it did not return in {self._lost_grace_s:g} s"
        await self._records.give_up(stored, "HostLost", text)

    # Images.

    async def _forget_images(self) -> None:
        for held in self._images.unneeded():
            await self.forget(held)

    async def forget(self, held: Residency) -> None:
        """Tells a host that an image is not needed any more, and records that it was told."""
        host = self._view.hosts[held.host]
        stub = await self._links.stub(host)
        request = hosts_pb2.ForgetImageRequest(digest=held.digest, tenant=held.tenant)
        await answer(stub.ForgetImage, request, host.name, FORGET_DEADLINE_S)
        await self._images.forgotten_by(held)

    # Keeping house.

    async def _keep_house(self) -> None:
        await self._events.prune()
        await self._prune_usage()
        await self._drop_requests()
        await self._joining.drop_expired()
        await self._compact()

    async def _prune_usage(self) -> None:
        """Looks through all of it, so not at every round."""
        if self._clock_s() >= self._usage_due_s:
            await self._usage.prune()
            self._usage_due_s = self._clock_s() + USAGE_S

    async def _drop_requests(self) -> None:
        """Looks through all of them, so not at every round."""
        if self._clock_s() < self._requests_due_s:
            return
        oldest_s, after, more = self._now_s() - REQUEST_KEPT_S, "", True
        while more:
            page = await self._store.page(keys.REQUESTS, after=after, limit=READ_RECORDS)
            used = [(codec.decode(UsedRequest, record.value, record.key), record.key) for record in page.records]
            old = [Delete(key) for request, key in used if request.used_at_s < oldest_s]
            if old:
                await self._store.commit(old)
            more, after = page.more, used[-1][1] if used else ""
        self._requests_due_s = self._clock_s() + REQUESTS_S

    async def _compact(self) -> None:
        """Keeps `history_s` of history: compacts to the newest revision that was seen that long ago."""
        now_s = self._clock_s()
        self._marks.append((now_s, self._view.revision))
        old = [mark for mark in self._marks if mark[0] <= now_s - self._history_s]
        if old:
            await self._store.compact(old[-1][1])
            self._marks = [mark for mark in self._marks if mark[0] > old[-1][0]]


async def _each(steps: Iterable[Awaitable[object]]) -> None:
    """All of them at once. A lost race is no error: the next round sees what is now. Raises the first real one."""
    for outcome in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, Conflict):
            raise outcome
