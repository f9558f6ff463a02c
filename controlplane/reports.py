"""What hosts say of their sandboxes, taken only from the host and the epoch that a sandbox has now."""

from __future__ import annotations

from controlplane import codec, lifecycle, transitions
from controlplane.errors import Conflict, NotFound, Precondition
from controlplane.model import DesiredState
from controlplane.records import Records, Stored
from controlplane.requests import Report
from controlplane.store.contract import Put, Store

ATTEMPTS = 16


class Reports:
    """See the module."""

    def __init__(self, store: Store, records: Records) -> None:
        self._store, self._records = store, records

    async def take(self, report: Report) -> None:
        """Takes what a host observed. See ReportSandbox."""
        for _ in range(ATTEMPTS):
            stored = await self._records.find_uid(report.uid)
            if stored is None:
                raise NotFound("SandboxNotFound", f"there is no sandbox {report.uid}: let go of it", uid=report.uid)
            sandbox = stored.sandbox
            leaving = bool(sandbox.leaving) and (report.host, report.epoch) == (sandbox.leaving, sandbox.leaving_epoch)
            if not leaving:
                transitions.require_current(sandbox, report)
            try:
                await (self._leaves if leaving else self._report_once)(stored, report)
            except Conflict:
                continue
            return
        raise Conflict("Busy", f"sandbox {report.uid} changes too fast: retry")

    async def _leaves(self, stored: Stored, report: Report) -> None:
        """A host that the sandbox leaves says how far it is: once it has ended there, it may begin elsewhere."""
        if report.removed or report.status.phase in lifecycle.ENDED:
            after = transitions.let_go(stored.sandbox)
            await self._store.commit([Put(stored.record.key, codec.encode(after))], [stored.expect])

    async def _report_once(self, stored: Stored, report: Report) -> None:
        sandbox = stored.sandbox
        if report.removed:
            if sandbox.desired is DesiredState.REMOVED or sandbox.spec.remove_on_exit:
                await self._records.remove(stored, "Removed", f"host {report.host} has let go of it")
            else:
                await self._records.give_up(stored, "HostLetGo", f"host {report.host} does not have it any more")
            return
        if transitions.goes_back(sandbox, report):
            was, said = sandbox.status.phase.name, report.status.phase.name
            text = f"host {report.host} says {said} of what was {was}: it lost its own record of it"
            await self._records.give_up(stored, "HostForgot", text)
            raise Precondition("BadTransition", f"sandbox {sandbox.name}: {text}; let go of it")
        after = transitions.observed(sandbox, report)
        if after != sandbox:
            await self._store.commit([Put(stored.record.key, codec.encode(after))], [stored.expect])
