"""The sockets tool against a guest that says anything: it ends the session or goes on, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from pathlib import Path

import pytest

from controlplane.api.services import GATEWAY, Answerer, Publish, ServicePolicy, parse_allow
from guestagent import mux
from guestagent.messages import Services
from guestagent.mux import Endpoint, Frame, FrameReader, Type
from hostd.errors import StartFailed
from hostd.services.account import Account
from hostd.services.sockets import SocketsTool

ROUNDS, FRAMES = 60, 60
HOST = Endpoint(mux.address(GATEWAY), 1)
ELSEWHERE = Endpoint(mux.address("10.9.8.7"), 80)


async def begun(policy: ServicePolicy) -> tuple[SocketsTool, socket.socket]:
    """A tool with a session, and the guest's end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    tool = SocketsTool(policy, Account())

    async def begin(services: Services) -> None:
        tool.data_received(services.nonce)

    await tool.listen()
    await tool.start(ours, begin)
    return tool, theirs


def policy(port: int) -> ServicePolicy:
    rules = (parse_allow(f"tcp:{GATEWAY}:{port}"), parse_allow(f"udp:{GATEWAY}:{port}"))
    return ServicePolicy(sockets=Answerer.TOOL, dns=Answerer.TOOL, allow=rules, publish=(Publish(0, 80),))


def opening(to: Endpoint) -> bytes:
    return b"\0\0\0\1\0\0\0\x2a" + to.encode()


def any_frame(rng: random.Random, to: Endpoint) -> bytes:
    kind = rng.choice([Type.OPEN, Type.OPEN, Type.DATA, Type.EOF, Type.RESET, Type.CREDIT, Type.DATAGRAM, Type.OPENED])
    data = {
        Type.OPEN: opening(rng.choice([to, ELSEWHERE])),
        Type.CREDIT: rng.choice([b"\0\0\0\1", b"\xff\xff\xff\xff"]),
        Type.OPENED: b"\0\0\0\0",
        Type.DATA: rng.randbytes(rng.randrange(200)),
        Type.DATAGRAM: to.encode() + rng.choice([to, HOST, Endpoint(HOST.address, 53)]).encode() + rng.randbytes(40),
    }.get(kind, b"")
    if rng.randrange(12) == 0:
        data = data[: rng.randrange(len(data) + 1)]
    return mux.encode(kind, rng.choice([1, 2, 3, 4097, 2048]), data)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_no_guest_breaks_it_or_leaves_anything() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # a guest may reset
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    failures: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    rng, to = random.Random(4), Endpoint(HOST.address, port)
    before = open_files()
    breaches = 0
    for _ in range(ROUNDS):
        tool, guest = await begun(policy(port))
        for _frame in range(FRAMES):
            tool.data_received(any_frame(rng, to))
            if rng.randrange(4) == 0:
                await asyncio.sleep(0)
        breaches += tool.lost.done()
        await tool.aclose()
        guest.close()
    for _ in range(5):
        await asyncio.sleep(0)
    server.close()
    assert failures == []
    assert breaches > 0
    async with asyncio.timeout(60):
        while open_files() > before:  # noqa: ASYNC110 - aborted transports close in the loop
            await asyncio.sleep(0.01)


async def test_rules_decide_whatever_the_agent_checked() -> None:
    tool, guest = await begun(policy(9))
    tool.data_received(mux.encode(Type.OPEN, 5, opening(ELSEWHERE)))
    reader, frames = FrameReader(tool.nonce), list[Frame]()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        while not frames:
            frames = reader.feed(await loop.sock_recv(guest, 65536))
    assert (frames[0].type, frames[0].id, mux.decode_u32(frames[0])) == (Type.OPENED, 5, 13)  # EACCES
    assert tool.account.decisions["sockets: refused"] == 1
    await tool.aclose()
    guest.close()


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = ServicePolicy(sockets=Answerer.TOOL, publish=(Publish(port, 80),))
        tool = SocketsTool(wanted, Account())
        with pytest.raises(StartFailed, match=rf"127\.0\.0\.1:{port}:80/tcp cannot be published"):
            await tool.listen()
