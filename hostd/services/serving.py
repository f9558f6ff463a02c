"""Where a sandbox's tools come up and go: one call for every way in which an engine gets its agent.

A service that runs on the host plugs in here: what the agent is told (SERVICES) is in hostd.services.sockets, frames of
the services port are taken there, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from controlplane.api.services import Answerer, ServicePolicy
from hostd.agentlink import AgentLink
from hostd.services.account import Account
from hostd.services.clock import clock_ns
from hostd.services.sockets import SocketsTool, needed

Tell = Callable[[str, str], None]
"""Puts a reason and a text for people into the event log."""


async def keep_clock(policy: ServicePolicy, link: AgentLink, time_ns: Callable[[], int] = time.time_ns) -> None:
    """The clock of `time: tool` shows what it should: it may have stood still, or its host's was set. AgentLost."""
    if policy.time is Answerer.TOOL:
        await link.clock(clock_ns(policy, time_ns()))


async def serve(policy: ServicePolicy, port: Path, link: AgentLink, tell: Tell) -> SocketsTool | None:
    """The tools of a sandbox whose agent answers; None when its kernel answers all. StartFailed: nothing is left."""
    if not needed(policy):
        return None
    tool = SocketsTool(policy, Account(tell=lambda text: tell("ServiceRefused", text)))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tool.aclose)
        await tool.listen()
        await tool.start(port, link.services)
        stack.pop_all()
    if tool.published:
        tell("PortsPublished", ", ".join(map(str, tool.published)))
    return tool
