"""`sockets: tool` in real guests that have no network: out, refused, names, published, after a restart of hostd."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from controlplane.api.services import GATEWAY, Answerer, ServicePolicy, parse_allow, parse_publish
from hostd.drivers.contract import Engine
from hostd.drivers.qemu.engine import QemuEngine
from hostd.journal import Handle
from tests.contract.driver_suite import command
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings

pytestmark = pytest.mark.guest
DEADLINE_S = 90.0


async def said(engine: Engine, script: str) -> str:
    """What a shell script in the sandbox prints."""
    process = await engine.spawn(command(("sh", "-c", script)), main=False)
    parts = bytearray()
    async with asyncio.timeout(DEADLINE_S):
        async for piece in process.output():
            parts += piece.data
        await process.wait()
    return parts.decode(errors="replace")


def policy(port: int) -> ServicePolicy:
    return ServicePolicy(
        sockets=Answerer.TOOL,
        dns=Answerer.TOOL,
        allow=(parse_allow(f"tcp:{GATEWAY}:{port}"),),
        publish=(parse_publish("0:80"),),
    )


async def published(engine: QemuEngine, send: bytes) -> bytes:
    """What the sandbox's listener answers to a client of the host, once it listens."""
    assert engine.tool is not None
    async with asyncio.timeout(DEADLINE_S):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", engine.tool.published[0].host_port)
            writer.write(send)
            writer.write_eof()
            try:
                answer = await reader.read(-1)
            except ConnectionResetError:
                answer = b""
            writer.close()
            if answer:
                return answer


async def test_a_sandbox_without_a_network_reaches_what_its_rules_name(around: Surroundings) -> None:
    rig = QemuRig(around, 268_500)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"echoed " + await reader.readline())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    told: list[str] = []
    plan = rig.plan("svc")
    tell: Callable[[str, str], None] = lambda reason, message: told.append(f"{reason}: {message}")  # noqa: E731
    plan = replace(plan, spec=replace(plan.spec, services=policy(port)), tell=tell)
    made: list[Handle] = []
    engine = await rig.driver.start(plan, made.append)
    try:
        assert isinstance(engine, QemuEngine)
        await engine.spawn(command(("sh", "-c", "while :; do nc -l -p 80 -e cat; done")), main=True)
        assert await said(engine, f"echo hello | nc {GATEWAY} {port}") == "echoed hello\n"
        assert "Permission denied" in await said(engine, "nc 1.2.3.4 80 2>&1 </dev/null")
        assert any("connect(tcp 1.2.3.4:80): no rule allows it" in line for line in told), told
        assert "NXDOMAIN" in await said(engine, "nslookup nowhere.invalid 2>&1")
        body = b"x" * 200_000
        assert await published(engine, body) == body
        await engine.detach()
        again = await rig.reborn().adopt(plan, made[-1], {})
        assert isinstance(again, QemuEngine)
        engine = again
        engine.resume()
        assert await said(engine, f"echo again | nc {GATEWAY} {port}") == "echoed again\n"
        assert await published(engine, b"after") == b"after"
    finally:
        await engine.detach()
        await rig.driver.destroy(plan.spec.uid, plan.folder, made[-1])
        server.close()
    assert rig.left(plan) == []
