"""Services of sandboxes on the host's own kernel: the supervisor beside them, in real containers without a network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from controlplane.api.services import GATEWAY, GATEWAY_V6, Answerer, ServicePolicy
from hostd.drivers.contract import Engine, LayerFile, ProcessLink
from hostd.drivers.oci.engine import OciEngine
from hostd.drivers.oci.supervisor import require_able
from hostd.errors import InvalidSpec
from hostd.journal import Handle
from hostd.services.notified import NotifiedCall, notified_calls
from hostd.spec import Network
from tests.contract.driver_suite import command
from tests.guestagent.servicesagent import tool_policy
from tests.hostd.drivers.oci.rig import OciRig, Surroundings, run

DEADLINE_S = 90.0


@dataclass
class Box:
    """A sandbox with services. `told`: its event log."""

    rig: OciRig
    engine: OciEngine
    main: ProcessLink
    told: list[str] = field(default_factory=list)

    async def sh(self, script: str, *, shell: str = "sh") -> str:
        """What a shell script in it prints, stderr too; it may end as it likes."""
        async with asyncio.timeout(DEADLINE_S):
            out, err, _ = await run(self.engine, (shell, "-c", script))
        return out + err

    @property
    def host_port(self) -> int:
        assert self.engine.supervisor is not None
        return self.engine.supervisor.tool.published[0].host_port

    def supervisor_pid(self) -> int:
        pid = self.engine.handle.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"--supervise" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        raise AssertionError("no supervisor")


@contextlib.asynccontextmanager
async def served(
    around: Surroundings,
    name: str,
    policy: ServicePolicy,
    argv: tuple[str, ...] = ("sleep", "100000"),
    layers: tuple[LayerFile, ...] | None = None,
) -> AsyncIterator[Box]:
    """Nothing of it is left afterwards, which is asserted."""
    rig = OciRig(around, "crun")
    told: list[str] = []
    plan = rig.plan(name, layers=layers)
    plan = replace(
        plan,
        spec=replace(plan.spec, services=policy),
        tell=lambda reason, message: told.append(f"{reason}: {message}"),
    )
    engine = await rig.driver.start(plan, lambda _: None)
    try:
        assert isinstance(engine, OciEngine)
        yield Box(rig, engine, await engine.spawn(command(argv), main=True), told)
    finally:
        await engine.detach()
        await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
    assert rig.left(plan) == []


@contextlib.asynccontextmanager
async def echo(prefix: bytes = b"echoed ") -> AsyncIterator[int]:
    """A server of the host's loopback that says each client's first line; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(prefix + await reader.readline())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def answer_of(port: int, data: bytes) -> bytes:
    """What the listener behind a published port answers, once it listens."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            writer.write_eof()
            said = b""
            with contextlib.suppress(ConnectionResetError):
                said = await reader.read(-1)
            writer.close()
            if said:
                return said
            await asyncio.sleep(0.05)


async def test_a_container_without_a_network_reaches_what_its_rules_name(around: Surroundings) -> None:
    async with echo() as port:
        policy = tool_policy(f"tcp:{GATEWAY}:{port}", publish=("0:80",))
        listener = ("sh", "-c", "while :; do nc -l -p 80 -e cat; done")
        async with served(around, "svc", policy, listener) as box:
            assert await box.sh(f"echo hello | nc {GATEWAY} {port}") == "echoed hello\n"
            assert "denied" in await box.sh("nc 1.2.3.4 80 2>&1 </dev/null")
            assert any("connect(tcp 1.2.3.4:80): no rule allows it" in line for line in box.told), box.told
            assert "NXDOMAIN" in await box.sh("nslookup nowhere.invalid 2>&1")
            body = b"x" * 200_000
            assert await answer_of(box.host_port, body) == body
            assert await box.sh("ls /sys/class/net | sort | tr '\n' ' '") == "lo sl0 "
            assert "127.0.0.1" in await box.sh("(echo hi | nc -l -p 9 &) ; sleep 0.2; nc -v 127.0.0.1 9 </dev/null")
            tool = box.engine.supervisor
            assert tool is not None and tool.tool.account.connections >= 2 and tool.tool.account.bytes_in >= 200_000
