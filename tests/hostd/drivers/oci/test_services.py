"""Services of sandboxes on the host's own kernel: the supervisor beside them, in real containers without a network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from controlplane.api.services import GATEWAY, Answerer, ServicePolicy
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
from tests.stalls import Stalls

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
            assert (
                await box.sh("(nc -l -p 9 -e cat &); until echo own | nc 127.0.0.1 9; do :; done 2>/dev/null")
                == "own\n"
            )
            tool = box.engine.supervisor
            assert tool is not None and tool.tool.account.connections >= 2 and tool.tool.account.bytes_in >= 200_000


async def test_denied_sockets_are_refused_and_told(around: Surroundings) -> None:
    async with served(around, "deny", ServicePolicy(sockets=Answerer.DENY, dns=Answerer.DENY)) as box:
        assert "denied" in await box.sh("nc 127.0.0.1 80 2>&1 </dev/null")
        assert any("socket(2): sockets: deny" in line for line in box.told), box.told
        assert await box.sh("echo fine | cat") == "fine\n"


async def test_another_hostd_takes_it_over(around: Surroundings) -> None:
    """Connections that went through the former one are reset, new ones are the new one's."""
    async with echo() as port:
        policy = tool_policy(f"tcp:{GATEWAY}:{port}", publish=("0:80",))
        rig = OciRig(around, "crun")
        plan = rig.plan("adopted")
        plan = replace(plan, spec=replace(plan.spec, services=policy))
        made: list[Handle] = []
        engine: Engine = await rig.driver.start(plan, made.append)
        try:
            await engine.spawn(command(("sh", "-c", "while :; do nc -l -p 80 -e cat; done")), main=True)
            assert isinstance(engine, OciEngine)
            await engine.detach()
            again = await rig.reborn().adopt(plan, made[-1], {})
            assert isinstance(again, OciEngine)
            engine = again
            box = Box(rig, again, engine.resume())  # type: ignore[arg-type]
            assert await box.sh(f"echo again | nc {GATEWAY} {port}") == "echoed again\n"
            assert await answer_of(box.host_port, b"after") == b"after"
        finally:
            await engine.detach()
            await rig.driver.destroy(plan.spec.uid, plan.folder, made[-1])
        assert rig.left(plan) == []


def processes_of(engine: OciEngine, word: bytes) -> list[int]:
    """Pids of the sandbox's processes whose command line has `word`."""
    found = []
    for pid in engine.place.cgroups.pids(engine.place.uid):
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                found.append(pid)
    return found


async def caller_inside(box: Box, port: int) -> int:
    """The pid of a process that waits in a connect which nobody decides."""
    asyncio.ensure_future(box.engine.spawn(command(("busybox", "nc", GATEWAY, str(port))), main=False))  # noqa: RUF006
    async with asyncio.timeout(DEADLINE_S):
        while not (found := processes_of(box.engine, b"nc 100")):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    tool = box.engine.supervisor
    assert tool is not None
    async with asyncio.timeout(DEADLINE_S):
        while not tool.tool.account.decisions:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    return found[0]


@pytest.mark.parametrize("who", ["supervisor", "monitor"])
async def test_without_one_of_the_two_nobody_waits_and_the_sandbox_is_lost(around: Surroundings, who: str) -> None:
    """A listener whose queue is full: the host's dial stays under way, and so does the caller's connect."""
    with socket.socket() as full, contextlib.ExitStack() as fillers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        async with served(around, f"lost-{who}", tool_policy(f"tcp:{GATEWAY}:{port}")) as box:
            caller = os.pidfd_open(await caller_inside(box, port))
            try:
                victim = box.supervisor_pid() if who == "supervisor" else box.engine.handle.pid
                os.kill(victim, signal.SIGKILL)
                begin_s = time.monotonic()
                ended = asyncio.Event()
                asyncio.get_running_loop().add_reader(caller, ended.set)
                with Stalls() as stalls:
                    async with asyncio.timeout(DEADLINE_S):
                        await ended.wait()
                assert time.monotonic() - begin_s < 1.0 + 2 * stalls.longest_s, "it hung on"
            finally:
                asyncio.get_running_loop().remove_reader(caller)
                os.close(caller)
            async with asyncio.timeout(DEADLINE_S):
                loss = await box.engine.wait_gone()
            if who == "supervisor":
                assert loss.reason == "ServicesLost" and "ended by signal 9" in loss.message
            else:
                assert loss.reason in ("VmmExited", "ServicesLost"), loss


async def test_a_host_that_cannot_refuses_by_name(around: Surroundings) -> None:
    policy = tool_policy(f"tcp:{GATEWAY}:80")
    with pytest.raises(InvalidSpec, match="sockets: tool, dns: tool: runsc here cannot: its kernel is in user space"):
        require_able(policy, around.runtime("runsc"), veth=False)
    with pytest.raises(InvalidSpec, match="a link of its own"):
        require_able(policy, around.runtime("crun"), veth=True)
    rig = OciRig(around, "runsc")
    plan = rig.plan("refused")
    with pytest.raises(InvalidSpec, match="sockets: tool"):
        await rig.driver.start(replace(plan, spec=replace(plan.spec, services=policy)), lambda _: None)
    rig = OciRig(around, "crun")
    plan = rig.plan("refused")
    with pytest.raises(InvalidSpec, match="a link"):
        veth = replace(plan.spec, services=policy, network=Network(veth=True))
        await rig.driver.start(replace(plan, spec=veth), lambda _: None)
    assert rig.left(plan) == []


def test_the_agents_table_says_what_is_notified() -> None:
    assert notified_calls(ServicePolicy()) == ()
    assert notified_calls(tool_policy("tcp:*:*")) == (NotifiedCall("connect", None, 0),)
    denied = notified_calls(ServicePolicy(sockets=Answerer.DENY))
    assert {(call.name, call.argument) for call in denied} == {("socket", 0)} and len(denied) == 4
