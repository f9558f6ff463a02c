"""Asks the hosts now and then what their sandboxes hold, and records it by workload (usage.py).

One control plane does this at a time (leadership.py). A host that does not answer is left out; the next round asks
again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from controlplane import codec, keys, lifecycle
from controlplane.api.v1 import sandboxes_pb2
from controlplane.errors import ControlPlaneError
from controlplane.model import Host
from controlplane.relay import HostLinks, answer
from controlplane.store.contract import Delete, Put, Store, Write
from controlplane.usage import KEPT_S, Use, with_samples
from controlplane.view import View

log = logging.getLogger("sandloom.controlplane.sampling")

SAMPLE_S = 300.0
LEDGER_DEADLINE_S = 20.0
AT_ONCE = 16
MIB = 1 << 20
Workload = tuple[str, str]


class Sampler:
    """See the module. run() is its owner."""

    def __init__(
        self, store: Store, view: View, links: HostLinks, *, now_s: Callable[[], float] = time.time,
        period_s: float = SAMPLE_S,
    ) -> None:  # fmt: skip
        self._store, self._view, self._links = store, view, links
        self._now_s, self._period_s = now_s, period_s

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self.sample()
            except (ControlPlaneError, TimeoutError) as error:
                log.warning("what sandboxes use was not recorded: %s", error)

    async def sample(self) -> None:
        """One round over all READY hosts: what each workload's sandboxes hold now, and nothing of those long gone."""
        view, now_s = self._view, self._now_s()
        gate = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            names = sorted(view.alive & set(view.hosts))
            asked = [group.create_task(self._of_host(view.hosts[name], gate)) for name in names]
        seen: dict[Workload, list[float]] = {}
        for task in asked:
            for workload, size_mib in task.result():
                seen.setdefault(workload, []).append(size_mib)
        writes: list[Write] = [
            Put(
                keys.use(*workload),
                codec.encode(with_samples(view.measured.uses.get(workload, Use(*workload)), sizes, now_s)),
            )
            for workload, sizes in sorted(seen.items())
        ]
        old = [
            workload
            for workload, use in view.measured.uses.items()
            if workload not in seen and now_s - use.newest_s > KEPT_S
        ]
        writes += [Delete(keys.use(*workload)) for workload in sorted(old)]
        for at in range(0, len(writes), 64):
            await self._store.commit(writes[at : at + 64])

    async def _of_host(self, host: Host, gate: asyncio.Semaphore) -> list[tuple[Workload, float]]:
        async with gate:
            try:
                stub = await self._links.stub(host)
                request = sandboxes_pb2.GetSharingLedgerRequest(host=host.name)
                ledger: sandboxes_pb2.SharingLedger = await answer(stub.Ledger, request, host.name, LEDGER_DEADLINE_S)
            except (ControlPlaneError, TimeoutError) as error:
                log.info("host %s was not asked what its sandboxes use: %s", host.name, error)
                return []
        found = []
        for row in ledger.sandboxes:
            sandbox = self._view.sandboxes.get(row.uid)
            if sandbox is not None and sandbox.status.phase not in lifecycle.ENDED and row.guest_ram_bytes:
                found.append(((sandbox.tenant, sandbox.spec.image_digest), row.guest_ram_bytes / MIB))
        return found
