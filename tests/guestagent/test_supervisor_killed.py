"""A supervisor that is killed at any moment leaves nobody waiting: callers are refused within a second.

The supervisor is the agent's own program as it runs beside host-kernel sandboxes; the callers are eight threads that
connect over and over, to a server, to nobody, to where no rule leads, and to one that never answers, so that at every
moment some are being served and some wait. It is killed after delays that a seeded generator chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from controlplane.api.services import GATEWAY
from hostd.agentlink import AgentLink
from hostd.services.account import Account
from hostd.services.sockets import SocketsTool
from tests.guestagent.realagent import SOURCE, built, why_not_here
from tests.guestagent.servicesagent import tool_policy
from tests.stalls import Stalls

pytestmark = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here())
ROUNDS, THREADS, SEED = 16, 8, 20_261_125
LONGEST_DELAY_S = 0.25
MOST_WAIT_S = 1.0
DEADLINE_S = 90.0


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that calls."""
    program = tmp_path_factory.mktemp("callers") / "callers"
    source = Path(__file__).parent / "c" / "callers.c"
    argv = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-static", "-pthread", f"-I{SOURCE}"]
    subprocess.run([*argv, str(source), str(SOURCE / "policy.c"), "-o", str(program)], check=True, timeout=120)
    return program


@contextlib.contextmanager
def full_listener() -> Iterator[int]:
    """A port whose queue is full: connects to it neither succeed nor fail."""
    with socket.socket() as full, contextlib.ExitStack() as fillers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()[1]


@contextlib.asynccontextmanager
async def supervisor(folder: Path, *rules: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """One that serves, in a network namespace of its own; its sockets are in `folder`."""
    program = built("sandloom-agent")
    with contextlib.ExitStack() as stack:
        sockets = []
        for name in ("agent", "services", "notify"):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(str(folder / name))
            one.listen(8)
            sockets.append(one.fileno())
        process = subprocess.Popen(  # noqa: ASYNC220 - a moment, in a test
            ["unshare", "-n", str(program), "--supervise", *map(str, sockets)], pass_fds=sockets
        )
    tool: SocketsTool | None = None
    try:
        gone = asyncio.get_running_loop().create_future()
        link = await AgentLink.connect(folder / "agent", deadline_s=DEADLINE_S, gone=gone)
        tool = SocketsTool(tool_policy(*rules), Account())
        await tool.start(folder / "services", link.services)
        yield process
        await link.close()
    finally:
        process.kill()
        process.wait()
        if tool is not None:
            await tool.aclose()


async def one_round(folder: Path, program: Path, ports: list[int], delay_s: float) -> tuple[float, int]:
    """Seconds from the kill to the last caller's refusal, and how many calls there were."""
    rules = [f"tcp:{GATEWAY}:{port}" for port in ports[:-1]]  # the last one no rule allows
    async with supervisor(folder, *rules) as supervising:
        argv = ["nsenter", f"--net=/proc/{supervising.pid}/ns/net", str(program), str(folder / "notify"), str(THREADS)]
        calling = await asyncio.create_subprocess_exec(*argv, GATEWAY, *map(str, ports), stdout=asyncio.subprocess.PIPE)
        killed_ns: list[int] = []

        def kill() -> None:
            killed_ns.append(time.monotonic_ns())
            supervising.kill()

        try:
            assert calling.stdout is not None
            async with asyncio.timeout(DEADLINE_S):
                assert await calling.stdout.readline() == b"ready\n"
                asyncio.get_running_loop().call_later(delay_s, kill)
                last_ns, calls = map(int, (await calling.stdout.readline()).split())
                await calling.wait()
        finally:
            if calling.returncode is None:
                calling.kill()
                await calling.wait()
    return (last_ns - killed_ns[0]) / 1e9, calls


@pytest.mark.skipif(shutil.which("nsenter") is None, reason="needs nsenter (Debian: util-linux)")
async def test_a_supervisor_killed_at_random_points_leaves_no_caller_waiting(callers: Path, tmp_path: Path) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    rng = random.Random(SEED)
    waited: list[float] = []
    total = 0
    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    with full_listener() as silent:
        for number in range(ROUNDS):
            folder = tmp_path / str(number)
            folder.mkdir()
            ports = [server.sockets[0].getsockname()[1], 9, silent, 25]
            with Stalls() as stalls:
                took_s, calls = await one_round(folder, callers, ports, rng.uniform(0, LONGEST_DELAY_S))
            waited.append(took_s - 2 * stalls.longest_s)
            total += calls
    server.close()
    assert max(waited) < MOST_WAIT_S, f"seed {SEED}: callers waited for {waited}"
    assert total > ROUNDS * THREADS, "nobody was served"
