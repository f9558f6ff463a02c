"""The real agent in a network namespace of its own, with hostd's own tool at the other end of its services port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from controlplane.api.services import Answerer, ServicePolicy, parse_allow, parse_publish
from guestagent.messages import StartProcess
from hostd.agentlink import AgentLink
from hostd.services.account import Account
from hostd.services.sockets import SocketsTool, services_of
from tests.guestagent.realagent import CONFIGURE, SANITIZER

START_DEADLINE_S, END_DEADLINE_S = 60.0, 60.0
ENV = (b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", b"ASAN_OPTIONS=detect_leaks=0")


def tool_policy(*rules: str, publish: tuple[str, ...] = (), dns: Answerer = Answerer.TOOL) -> ServicePolicy:
    return ServicePolicy(
        sockets=Answerer.TOOL,
        dns=dns,
        allow=tuple(map(parse_allow, rules)),
        publish=tuple(map(parse_publish, publish)),
    )


@dataclass
class ServedAgent:
    """A configured agent under a policy. `told` are the refusals of the event log."""

    link: AgentLink
    tool: SocketsTool | None
    process: subprocess.Popen[bytes]
    told: list[str] = field(default_factory=list)
    _last: int = 100

    async def run(self, *argv: str, deadline_s: float = 120.0) -> tuple[int, str]:
        """A program to its end: exit code and all that it printed."""
        self._last += 1
        words = tuple(word.encode() for word in argv)
        process = await self.link.spawn(StartProcess(self._last, words, env=ENV))
        said = bytearray()
        async with asyncio.timeout(deadline_s):
            async for piece in process.output():
                said += piece.data
            ended = await process.wait()
        await process.release()
        return ended.code, said.decode(errors="replace")


@contextlib.asynccontextmanager
async def served(binary: Path, folder: Path, policy: ServicePolicy) -> AsyncIterator[ServedAgent]:
    """Runs an agent; at the end it must leave cleanly, with no word from a sanitizer."""
    ours, theirs = socket.socketpair()
    log = folder / "agent.log"
    with socket.socket(socket.AF_UNIX) as listener, log.open("wb") as out:
        listener.bind(str(folder / "agent.sock"))
        listener.listen(8)
        given = (listener.fileno(), theirs.fileno())
        process = subprocess.Popen(  # noqa: ASYNC220 - a moment, in a test
            ["unshare", "-n", str(binary), "--port", str(given[0]), "--root", "/", "--services", str(given[1])],
            pass_fds=given, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **SANITIZER},
        )  # fmt: skip
    theirs.close()
    tool: SocketsTool | None = None
    told: list[str] = []
    try:
        gone = asyncio.get_running_loop().create_future()
        link = await AgentLink.connect(folder / "agent.sock", deadline_s=START_DEADLINE_S, gone=gone)
        await link.configure(CONFIGURE)
        ours.setblocking(False)
        if policy.answered:
            tool = SocketsTool(policy, Account(tell=told.append))
            await tool.listen()
            await tool.start(ours, link.services)
        else:
            await link.services(services_of(policy, os.urandom(16)))
        yield ServedAgent(link, tool, process, told)
        await link.shutdown(0)
        await asyncio.to_thread(process.wait, END_DEADLINE_S)
        await link.close()
    finally:
        if tool is not None:
            await tool.aclose()
        ours.close()
        if process.poll() is None:
            process.kill()
        process.wait()
    said = log.read_text(errors="replace")
    assert process.returncode == 0, said
    assert "ERROR: AddressSanitizer" not in said and "runtime error" not in said, said
