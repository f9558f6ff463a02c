"""Services at the real agent: which calls are served, refused or left to the kernel, and sockets by hostd's own tool.

The agent is the sanitized one, in a network namespace without any device; the world is this test's own servers on the
host's loopback, which a sandbox reaches as the gateway, by rules that name it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import textwrap
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from controlplane.api.services import GATEWAY, GATEWAY_V6, Answerer, Service, ServicePolicy
from hostd.errors import StartFailed
from hostd.services.sockets import services_of
from tests.guestagent.servicesagent import ServedAgent, served, tool_policy

PYTHON = shutil.which("python3", path="/usr/bin:/bin") or "/usr/bin/python3"
SECCOMP_HERE = Path("/proc/self/status").read_text().split("Seccomp:")[1].split()[0]
pytestmark = pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (Debian: util-linux)")

PRELUDE = f"""
import errno, os, select, socket, struct, sys, threading, time
G, G6 = {GATEWAY!r}, {GATEWAY_V6!r}
def no(call):
    try: call()
    except OSError as error: return errno.errorcode[error.errno]
    return "fine"
"""


class World:
    """Servers of the host: `echo`, `swallow` (counts what it got, tells it after the end), `give` (sends as many bytes
    as it is asked for), `reset` (resets at the first byte); and a UDP echo on the same ports."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> World:
        for name in ("echo", "swallow", "give", "reset"):
            server = await asyncio.start_server(getattr(self, name), "127.0.0.1", 0)
            self._servers.append(server)
            self.ports[name] = server.sockets[0].getsockname()[1]
            with_v6 = await asyncio.start_server(getattr(self, name), "::1", self.ports[name])
            self._servers.append(with_v6)
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()

    @staticmethod
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    @staticmethod
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total = 0
        while data := await reader.read(65536):
            total += len(data)
        writer.write(b"%d" % total)
        writer.close()

    @staticmethod
    async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = int(await reader.readline())
        while left > 0 and not writer.is_closing():
            writer.write(b"x" * min(left, 65536))
            left -= 65536
            await writer.drain()
        writer.close()

    @staticmethod
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of 0: RST
        writer.transport.abort()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World() as running:
        yield running


@pytest.fixture
async def sockets(world: World, sanitized_agent: Path, tmp_path: Path) -> AsyncIterator[ServedAgent]:
    """An agent whose sandbox may reach the world's ports, and port 9 where nobody listens."""
    ports = [*world.ports.values(), 9]
    rules = [f"{kind}:{at}:{port}" for port in ports for at in (GATEWAY, f"[{GATEWAY_V6}]") for kind in ("tcp", "udp")]
    async with served(sanitized_agent, tmp_path, tool_policy(*rules)) as agent:
        yield agent


async def python(agent: ServedAgent, world: World | None, body: str) -> str:
    """What a Python program in the sandbox prints; `P` has the world's ports."""
    ports = f"P = {world.ports if world else {}!r}\n"
    code, said = await agent.run(PYTHON, "-c", PRELUDE + ports + textwrap.dedent(body))
    assert code == 0, said
    return said.strip()


async def test_bytes_go_both_ways_and_ends_are_half(sockets: ServedAgent, world: World) -> None:
    said = await python(
        sockets, world, """
        for host in (G, G6, "::ffff:" + G):
            with socket.create_connection((host, P["echo"]), 20) as s:
                assert s.getpeername()[:2] == (host, P["echo"]), s.getpeername()
                s.sendall(b"hello"); assert s.recv(5) == b"hello"
                s.sendall(b"bye"); s.shutdown(socket.SHUT_WR)
                assert s.recv(9, socket.MSG_WAITALL) == b"bye"
        with socket.create_connection((G, P["swallow"]), 20) as s:
            for _ in range(80): s.sendall(b"y" * 65536)
            s.shutdown(socket.SHUT_WR)
            print(s.recv(100).decode())
        with socket.create_connection((G, P["give"]), 20) as s:
            s.sendall(b"5000000\\n")
            print(sum(len(d) for d in iter(lambda: s.recv(1 << 20), b"")))
        """)  # fmt: skip
    assert said.split() == ["5242880", "5000000"]
    assert sockets.tool is not None and sockets.tool.account.bytes_in > 5_000_000 < sockets.tool.account.bytes_out


async def test_a_refusal_is_prompt_tells_its_errno_and_is_audited(sockets: ServedAgent, world: World) -> None:
    said = await python(
        sockets, world, """
        print(no(lambda: socket.create_connection((G, 9), 20)), no(lambda: socket.create_connection((G, 25), 20)))
        for family, host in ((socket.AF_INET, G), (socket.AF_INET6, G6)):
            for port in (9, 25):
                with socket.socket(family) as s:
                    s.setblocking(False)
                    assert s.connect_ex((host, port)) == errno.EINPROGRESS
                    assert select.select([], [s], [], 20)[1], "no end to it"
                    print(errno.errorcode[s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)])
        with socket.socket() as s:  # a socket that failed may be used again
            print(no(lambda: s.connect((G, 25))), no(lambda: s.connect((G, P["echo"]))))
        """)  # fmt: skip
    assert said.split() == [
        "ECONNREFUSED", "EHOSTUNREACH", "ECONNREFUSED", "EHOSTUNREACH", "ECONNREFUSED", "EACCES", "EACCES", "fine",
    ]  # fmt: skip
    assert len(sockets.told) == 4 and "connect(tcp 100.64.0.1:25): no rule allows it" in sockets.told[0]
    assert "pid " in sockets.told[0]


async def test_poll_and_epoll_see_what_the_network_does(sockets: ServedAgent, world: World) -> None:
    assert await python(
        sockets, world, """
        s = socket.socket(); s.setblocking(False)
        watch = select.epoll(); watch.register(s, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        assert s.connect_ex((G, P["echo"])) == errno.EINPROGRESS
        events = [e for _, e in watch.poll(20)]
        while not any(e & select.EPOLLOUT and not e & select.EPOLLHUP for e in events):
            events = [e for _, e in watch.poll(20)]
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert s.connect_ex((G, P["echo"])) in (0, errno.EISCONN)
        s.send(b"x"); assert watch.poll(20)[0][1] & select.EPOLLIN and s.recv(5) == b"x"
        s.shutdown(socket.SHUT_WR); assert select.select([s], [], [], 20)[0] and s.recv(5) == b""
        r = socket.create_connection((G, P["reset"]), 20); r.sendall(b"x")
        print(no(lambda: r.recv(5)))
        """)  == "ECONNRESET"  # fmt: skip


async def test_datagrams_keep_their_bounds_and_names_are_answered(sanitized_agent: Path, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is no subclass of it

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data[::-1], addr)

    transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    policy = tool_policy(f"udp:{GATEWAY}:{port}", "tcp:localhost:80")
    async with served(sanitized_agent, tmp_path, policy) as agent:
        said = await python(
            agent, None, f"""
            u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(20)
            for size in (1, 1400, 9000, 60000):
                u.sendto(bytes(size - 1) + b"z", (G, {port}))
                data, sender = u.recvfrom(65536)
                assert len(data) == size and data[:1] == b"z" and sender == (G, {port}), (len(data), sender)
            u.sendto(b"lost", (G, 9)); u.connect((G, {port})); u.send(b"ab"); assert u.recv(9) == b"ba"
            def ask(name):
                q = struct.pack("!HHHHHH", 7, 256, 1, 0, 0, 0) + bytes([len(name)]) + name
                d = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); d.settimeout(20)
                d.sendto(q + b"\\0\\0\\1\\0\\1", (G, 53)); answer = d.recv(600)
                return answer[3] & 15, answer[7]
            print(*ask(b"localhost"), *ask(b"other"))
            """)  # fmt: skip
        # localhost is the host's own: its rule lets the name be asked for, and nothing of it is told
        assert said.split() == ["0", "0", "3", "0"]
        assert any("udp 100.64.0.1:9" in line for line in agent.told)
    transport.close()


async def test_a_published_port_reaches_the_sandboxs_listener(sanitized_agent: Path, tmp_path: Path) -> None:
    policy = tool_policy(publish=("0:8080", "0:8081"))
    async with served(sanitized_agent, tmp_path, policy) as agent:
        assert agent.tool is not None
        host_port, nobody = (port.host_port for port in agent.tool.published)
        serving = asyncio.create_task(
            python(
                agent,
                None,
                """
                l = socket.create_server(("0.0.0.0", 8080)); seen = []
                for _ in range(3):
                    c, who = l.accept(); seen.append(who[0])
                    data = b"".join(iter(lambda: c.recv(65536), b"")); c.sendall(data[::-1]); c.close()
                print(*seen)
                """,
            )
        )
        for number in range(3):
            body = os.urandom(300_000 * number + 10)
            async with asyncio.timeout(60):
                while True:  # until the sandbox listens
                    reader, writer = await asyncio.open_connection("127.0.0.1", host_port)
                    writer.write(body)
                    writer.write_eof()
                    try:
                        answer = await reader.read(-1)
                    except ConnectionResetError:
                        answer = b""
                    writer.close()
                    if answer:
                        break
            assert answer == body[::-1]
        assert (await serving).split() == [GATEWAY] * 3
        reader, writer = await asyncio.open_connection("127.0.0.1", nobody)
        with pytest.raises(ConnectionError):
            assert await reader.read(1) != b"", "a reset would say more than an end"
            raise ConnectionResetError
        writer.close()


async def test_many_threads_at_once_each_get_their_own(sockets: ServedAgent, world: World) -> None:
    assert await python(
        sockets, world, """
        wrong = []
        def work(n):
            try:
                for i in range(10):
                    with socket.create_connection((G, P["echo"]), 60) as s:
                        text = b"%d-%d" % (n, i); s.sendall(text)
                        if s.recv(50) != text: wrong.append(text)
            except OSError as error: wrong.append(error)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        [t.start() for t in threads]; [t.join() for t in threads]
        print(wrong)
        """)  == "[]"  # fmt: skip


async def test_what_is_not_the_worlds_stays_the_kernels(sockets: ServedAgent, world: World) -> None:
    assert await python(
        sockets, world, """
        l = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(l.getsockname(), 20); c.close()
        l6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
        c = socket.create_connection(l6.getsockname()[:2], 20)
        print(no(lambda: socket.create_connection(("127.0.0.1", 1), 20)))
        print(no(lambda: socket.socket(socket.AF_UNIX).connect("/nonexistent/x")))
        s = socket.socket(); print(no(lambda: s.connect((G, P["echo"]))), no(lambda: s.connect((G, P["echo"]))))
        import ctypes; libc = ctypes.CDLL(None, use_errno=True)
        def raw(*a): r = libc.syscall(*a); return errno.errorcode[ctypes.get_errno()] if r < 0 else "fine"
        t = socket.socket()
        print(raw(42, t.fileno(), 8, 16), raw(42, 999, 0, 0), raw(42, 0, 0, 16), raw(42, t.fileno(), 0, 4096))
        print(raw(425, 1, 0))
        print(raw(42, t.fileno(), ctypes.c_char_p(b"x" * 40), 1), raw(0x40000000 | 39))
        """)  == "ECONNREFUSED\nENOENT\nfine EISCONN\nEFAULT EBADF EFAULT EINVAL\nENOSYS\nEINVAL ENOSYS"  # fmt: skip


async def test_denied_sockets_are_refused_and_the_rest_is_not(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, ServicePolicy(sockets=Answerer.DENY)) as agent:
        assert await python(
            agent, None, """
            families = socket.AF_INET, socket.AF_INET6, socket.AF_PACKET, socket.AF_UNIX
            print(*(no(lambda: socket.socket(family)) for family in families))
            a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
            """)  == "EACCES EACCES EACCES fine"  # fmt: skip
        assert len(agent.told) == 3 and "socket(2): sockets: deny" in agent.told[0]


async def test_a_host_that_goes_leaves_nobody_hanging(sockets: ServedAgent, world: World) -> None:
    running = asyncio.create_task(
        python(
            sockets,
            world,
            """
            s = socket.create_connection((G, P["echo"]), 60); s.sendall(b"x"); s.recv(1)
            print("ready", flush=True)
            begin = time.monotonic(); error = no(lambda: s.recv(1))
            took = time.monotonic() - begin
            late = time.monotonic(); after = no(lambda: socket.create_connection((G, P["echo"]), 60))
            print(error, after, time.monotonic() - late < 1)
            """,
        )
    )
    assert sockets.tool is not None
    async with asyncio.timeout(60):
        while sockets.tool.account.bytes_in == 0:  # noqa: ASYNC110 - the tool tells nobody
            await asyncio.sleep(0.01)
    await sockets.tool.aclose()
    said = (await running).split()
    assert said[:2] == ["ready", "ECONNRESET"] and said[2] in ("ENETUNREACH", "EHOSTUNREACH") and said[3] == "True"


async def test_other_answerers_than_those_in_force_are_refused(sockets: ServedAgent) -> None:
    await sockets.run("/bin/true")
    with pytest.raises(StartFailed, match="under another policy already"):
        await sockets.link.services(services_of(ServicePolicy(), bytes(16)))


async def test_other_rules_cut_what_they_do_not_allow_and_nothing_else(sockets: ServedAgent, world: World) -> None:
    tool = sockets.tool
    assert tool is not None
    began = tool.policy
    running = asyncio.create_task(
        python(
            sockets, world, """
            a, b = socket.create_connection((G, P["echo"]), 90), socket.create_connection((G, P["swallow"]), 90)
            a.sendall(b"x"); a.recv(1)
            print(no(lambda: b.recv(1)))
            a.sendall(b"y"); print(a.recv(1).decode(), no(lambda: socket.create_connection((G, P["give"]), 90)))
            a.sendall(b"z"); a.recv(1)
            print(no(lambda: a.recv(1)), no(lambda: socket.create_connection((G, P["echo"]), 90)))
            """)
    )  # fmt: skip

    async def seen(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(90):
            while not condition():  # noqa: ASYNC110 - the tool tells nobody
                await asyncio.sleep(0.01)

    await seen(lambda: tool.account.connections == 2 and tool.account.bytes_in == 1)
    port = world.ports["echo"]
    tool.change(replace(began, allow=tuple(rule for rule in began.allow if rule.low_port == port)))
    await seen(lambda: tool.account.bytes_in == 3)
    tool.change(replace(began, withdrawn=(Service.SOCKETS,)))
    assert (await running).split() == ["ECONNRESET", "y", "EHOSTUNREACH", "ECONNRESET", "EHOSTUNREACH"]
    tool.change(began)
    assert await python(sockets, world, "print(no(lambda: socket.create_connection((G, P['echo']), 90)))") == "fine"
    usage = tool.usage()
    assert dict(usage.decisions) == {"sockets: allowed": 3, "sockets: cut": 2, "sockets: refused": 2}
    assert (usage.connections, usage.bytes_out, usage.bytes_in) == (3, 3, 3)


async def test_a_policy_of_the_kernels_own_filters_nothing(sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, ServicePolicy()) as agent:
        code, said = await agent.run("/bin/sh", "-c", "grep Seccomp: /proc/self/status")
        assert (code, said.split()[1]) == (0, SECCOMP_HERE)
        assert await python(agent, None, "print(no(lambda: socket.create_connection((G, 1), 5)))") == "ENETUNREACH"


async def test_a_killed_caller_leaves_the_supervisor_well(sockets: ServedAgent, world: World) -> None:
    for _ in range(5):
        await python(
            sockets, world, """
            pids = []
            for _ in range(8):
                pid = os.fork()
                if pid == 0:
                    while True:
                        socket.create_connection((G, P["echo"])).close()
                pids.append(pid)
            time.sleep(0.05)
            [os.kill(pid, 9) for pid in pids]; [os.waitpid(pid, 0) for pid in pids]
            """)  # fmt: skip
    assert await python(sockets, world, "print(no(lambda: socket.create_connection((G, P['echo']), 60)))") == "fine"
