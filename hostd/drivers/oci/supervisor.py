"""Services of a sandbox on the host's own kernel: the agent's program beside it, as the monitor's child.

    RUN/<uid>/serve.sock      the agent protocol, as far as SERVICES (guestagent/src/host.c)
              services.sock   the services port
              notify.sock     where the OCI runtime brings the listener of each process's filter

The supervisor is in the sandbox's cgroup and network namespace, which the monitor makes for both. It and the monitor
live and die together, and without them the sandbox's processes are killed: nothing of it runs unsupervised. Callers
that wait when it ends get ENOSYS at once, from the kernel.
"""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

from controlplane.api.services import ServicePolicy
from guestagent.binary import binary_path
from guestagent.errors import AgentMissing
from hostd.agentlink import AgentLink
from hostd.drivers.oci.place import AGENT_SOCKET, RUNTIME_SOCKET, SERVICES_SOCKET
from hostd.drivers.oci.runtime import Runtime
from hostd.errors import AgentLost, InvalidSpec, StartFailed
from hostd.process import WatchedProcess
from hostd.services.notified import notified_calls
from hostd.services.serving import Tell, serve
from hostd.services.sockets import SocketsTool, needed

CONNECT_DEADLINE_S = 10.0
SOCKETS = (AGENT_SOCKET, SERVICES_SOCKET, RUNTIME_SOCKET)
WORD = "supervisor"
"""What the monitor says in its log when the supervisor has ended (hostd/drivers/oci/src/supervisor.c)."""


def require_able(policy: ServicePolicy, runtime: Runtime, *, veth: bool) -> None:
    """InvalidSpec, which names what cannot be had, for services that this runtime cannot have; StartFailed."""
    if not needed(policy):
        return
    names = ", ".join(f"{service.value}: {answerer.value}" for service, answerer in policy.answered)
    if runtime.no_services:
        raise InvalidSpec(f"{names}: {runtime.name} here cannot: {runtime.no_services}", reason="ServicesMissing")
    if veth:
        raise InvalidSpec(f"{names}: with a link of its own a sandbox would go around it", reason="ServicesMissing")
    notified_calls(policy)


def listen(folder: Path, stack: ExitStack) -> list[str]:
    """The monitor's arguments that make it start a supervisor, and its sockets, which listen until `stack` ends and
    are inherited by the monitor. StartFailed."""
    try:
        words = ["--supervisor", str(binary_path())]
    except AgentMissing as error:
        raise StartFailed(str(error), reason="ServicesFailed") from error
    for name in SOCKETS:
        one = stack.enter_context(socket.socket(socket.AF_UNIX))
        one.bind(str(folder / name))
        one.listen(64)
        one.set_inheritable(True)
        words.append(str(one.fileno()))
    return words


@dataclass(frozen=True)
class Supervisor:
    """A supervisor that serves, and hostd's end of it."""

    link: AgentLink
    tool: SocketsTool

    def why_lost(self, folder: Path) -> str:
        """Why it serves no more; "" when it does, as far as is known here."""
        try:
            said = (folder / "monitor.log").read_text(errors="replace").strip()
        except OSError:
            said = ""
        if WORD in said:
            return said.splitlines()[-1]
        return next((str(lost.result()) for lost in (self.tool.lost, self.link.lost) if lost.done()), "")

    async def aclose(self) -> None:
        """Lets go of it. Idempotent."""
        await self.tool.aclose()
        await self.link.close()


async def supervised(
    policy: ServicePolicy, folder: Path, process: WatchedProcess, tell: Tell, stack: AsyncExitStack
) -> Supervisor | None:
    """The supervisor beside the monitor `process`, serving; `stack` closes it. None when the kernel answers all.
    StartFailed."""
    if not needed(policy):
        return None
    try:
        link = await AgentLink.connect(folder / AGENT_SOCKET, deadline_s=CONNECT_DEADLINE_S, gone=process.gone)
    except AgentLost as error:
        raise StartFailed(f"the supervisor of its services: {error}", reason="ServicesFailed") from error
    stack.push_async_callback(link.close)
    tool = await serve(policy, folder / SERVICES_SOCKET, link, tell)
    assert tool is not None
    supervisor = Supervisor(link, tool)
    stack.push_async_callback(supervisor.aclose)
    return supervisor
