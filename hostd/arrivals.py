"""Those that wait for room on this host: admitted one day, or told that it has not come to be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hostd.admission import GUEST_OVERHEAD_MIB
from hostd.errors import ShortOfResources
from hostd.memory.brokering import Broker
from hostd.spec import SandboxSpec

ADMIT_WAIT_S, ADMIT_POLL_S = 20.0, 0.2


class Arrivals:
    """See the module. The broker makes room for `need_mib()`."""

    def __init__(self) -> None:
        self._needs: dict[str, int] = {}

    def need_mib(self) -> int:
        """What all of them need together."""
        return sum(self._needs.values())

    async def admitted(
        self, spec: SandboxSpec, holds_mib: int, broker: Broker, admit: Callable[[SandboxSpec, int], None]
    ) -> None:
        """Returns when `admit` lets it start, the broker making room meanwhile. ShortOfResources when that is hopeless,
        or has not come to be in ADMIT_WAIT_S."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + ADMIT_WAIT_S
        try:
            while True:
                try:
                    return admit(spec, holds_mib)
                except ShortOfResources as error:
                    if not error.passing or not broker.active or loop.time() >= give_up_s:
                        raise
                self._needs[spec.uid] = max(spec.resources.memory_min_mib, holds_mib) + GUEST_OVERHEAD_MIB
                broker.poke()
                await asyncio.sleep(ADMIT_POLL_S)
        finally:
            self._needs.pop(spec.uid, None)
