"""The hosts as the scheduler sees them, kept up as the view changes: their states, and the index over them.

Only hosts that something changed on are counted anew, and only when somebody asks. A placement that is assumed goes
into the index as it is: counting all that a host runs for each one more would be most of what a create costs.
"""

from __future__ import annotations

from collections.abc import Callable

from controlplane.scheduler import Demand, HostState
from controlplane.scheduler_index import Index


class Census:
    """`count` gives a host's state as it is now, None when there is no such host (any more)."""

    def __init__(self, count: Callable[[str], HostState | None]) -> None:
        self._count = count
        self._states: dict[str, HostState] = {}
        self._sorted: list[HostState] | None = []
        self._index = Index()
        self._unindexed: set[str] = set()
        self._stale: set[str] = set()
        self._assumed: set[str] = set()  # the index knows, the states do not

    def touch(self, host: str) -> None:
        """Something changed there."""
        self._stale.add(host)

    def assume(self, host: str, demand: Demand) -> None:
        """One more runs there, which the host has not reported yet."""
        if host in self._stale or host in self._unindexed or host not in self._index:
            self.touch(host)
            return
        self._index.assume(host, demand)
        self._assumed.add(host)

    def clear(self) -> None:
        """Everything may have changed."""
        self._stale.update(self._states)

    def states(self) -> list[HostState]:
        """Every host's state, by name."""
        self._stale |= self._assumed
        self._recount()
        if self._sorted is None:
            self._sorted = [state for _, state in sorted(self._states.items())]
        return self._sorted

    def state(self, host: str) -> HostState | None:
        """One host's."""
        self._stale |= self._assumed & {host}
        self._recount()
        return self._states.get(host)

    def index(self) -> Index:
        """The index of the same states. It is not to be changed."""
        self._recount()
        for name in self._unindexed:
            state = self._states.get(name)
            if state is not None:
                self._index.put(state)
            elif name in self._index:
                self._index.remove(name)
        self._unindexed.clear()
        return self._index

    def settle(self, most: int) -> bool:
        """Counts and indexes up to so many hosts of those that something changed on; whether there are more."""
        stale, self._stale = self._stale, set(list(self._stale)[:most])
        later = stale - self._stale
        self.index()
        self._stale |= later
        return bool(later)

    def _recount(self) -> None:
        if not self._stale:
            return
        for name in self._stale:
            state = self._count(name)
            if state is None:
                self._states.pop(name, None)
            else:
                self._states[name] = state
        self._unindexed |= self._stale
        self._assumed -= self._stale
        self._stale.clear()
        self._sorted = None
