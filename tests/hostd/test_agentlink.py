"""The link to an agent over a real socket: the contract kept, and a guest that breaks it in every way it can."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from guestagent.fake import FakeAgent, Misbehaviour, Script
from guestagent.frames import encode_frame
from guestagent.messages import Configure, Kind, StartProcess, Stream
from guestagent.protocol import ProcCarry, SessionCarry
from hostd.agentlink import AgentLink
from hostd.agentprocess import MAX_PIECES, AgentProcess
from hostd.drivers.contract import Exit
from hostd.errors import AgentLost, CommandFailed, InvalidSpec, ShortOfResources, StartFailed
from tests.hostd.agentport import Port, port_of
from tests.hostd.hostkit import until

CONFIGURE = Configure(b"box", (b"u" * 16,), 64, b"e" * 32, b"0" * 32, 1, 1000)
DEADLINE_S = 5.0


def never() -> asyncio.Future[str]:
    """A VMM that does not end."""
    return asyncio.get_running_loop().create_future()


def start(proc: int, *argv: bytes, stdin: bool = False) -> StartProcess:
    return StartProcess(proc, argv, stdin=stdin)


@asynccontextmanager
async def linked(folder: Path, agent: FakeAgent, *, configured: bool = True) -> AsyncIterator[tuple[AgentLink, Port]]:
    async with port_of(folder, agent, dribbles=agent.misbehaviour is Misbehaviour.DRIBBLE) as port:
        link = await AgentLink.connect(port.path, deadline_s=DEADLINE_S, gone=never())
        try:
            if configured:
                await link.configure(CONFIGURE)
            yield link, port
        finally:
            await link.close()


async def collect(process: AgentProcess) -> tuple[bytes, bytes, Exit]:
    streams = {1: b"", 2: b""}
    async with asyncio.timeout(DEADLINE_S):
        async for piece in process.output():
            streams[piece.stream] += piece.data
        return streams[1], streams[2], await process.wait()


async def test_a_process_from_start_to_end(tmp_path: Path) -> None:
    agent = FakeAgent(lambda _: Script(stdout=b"out", stderr=b"err", exit_code=7))
    async with linked(tmp_path, agent) as (link, _):
        process = await link.spawn(start(1, b"anything"))
        assert await collect(process) == (b"out", b"err", Exit(7))
        await process.signal(signal.SIGTERM)  # ESRCH is no trouble
        await process.release()
        assert agent.configured is not None
        assert (await link.stats()).cpus_online == 1


async def test_more_than_a_window_of_input_and_output(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    async with linked(tmp_path, FakeAgent()) as (link, _):
        process = await link.spawn(start(2, b"cat", stdin=True))
        feeding = asyncio.create_task(process.write(data))
        seen = b""
        async with asyncio.timeout(DEADLINE_S):
            async for piece in process.output():
                seen += piece.data
                if len(seen) == len(data):
                    await process.close_stdin()
        await feeding
        assert seen == data
        assert await process.wait() == Exit(0)


async def test_refusals_have_the_exit_codes_of_a_shell(tmp_path: Path) -> None:
    def refuse(request: StartProcess) -> Script:
        return Script(refuse=2 if request.argv[0] == b"missing" else 13, message="says the guest")

    async with linked(tmp_path, FakeAgent(refuse)) as (link, _):
        for argv, code in ((b"missing", 127), (b"locked", 126)):
            with pytest.raises(CommandFailed, match="says the guest") as failed:
                await link.spawn(start(link.new_proc(), argv))
            assert failed.value.exit_code == code


async def test_the_hosts_own_nonsense_is_refused_here_and_the_link_goes_on(tmp_path: Path) -> None:
    async with linked(tmp_path, FakeAgent()) as (link, _):
        process = await link.spawn(start(2, b"sleep"))
        with pytest.raises(InvalidSpec, match="signo"):
            await process.signal(99)
        with pytest.raises(StartFailed, match="EALREADY"):
            await link.configure(CONFIGURE)
        assert (await link.stats()).procs == 1


async def test_too_many_at_once_is_busy_not_lost(tmp_path: Path) -> None:
    agent = FakeAgent()
    async with linked(tmp_path, agent) as (link, _):
        agent.misbehaviour = Misbehaviour.SILENT
        asked = [asyncio.create_task(link.stats()) for _ in range(300)]
        done, waiting = await asyncio.wait(asked, timeout=0.2)
        assert {type(task.exception()) for task in done} == {ShortOfResources}
        assert len(waiting) == 256
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_the_next_link_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    agent = FakeAgent()
    async with port_of(tmp_path, agent) as port:
        link = await AgentLink.connect(port.path, deadline_s=DEADLINE_S, gone=never())
        await link.configure(CONFIGURE)
        process = await link.spawn(start(1, b"cat", stdin=True))
        await process.write(b"one two")
        assert (await anext(process.output())).data == b"one two"
        await link.close()
        with pytest.raises(AgentLost, match="let go"):
            await process.wait()
        carry = SessionCarry(procs=(ProcCarry(1, 4, 0),))
        again = await AgentLink.connect(port.path, deadline_s=DEADLINE_S, gone=never(), carry=carry)
        assert [state.proc for state in again.guest.procs] == [1]
        assert again.new_proc() == 2
        main = again.follow(1)
        assert (await anext(main.output())).data == b"two"
        await again.close()


# Guests that misbehave.


@pytest.mark.parametrize("misbehaviour", [Misbehaviour.SILENT, Misbehaviour.NOISE, Misbehaviour.GARBLE])
async def test_a_guest_that_never_greets_is_given_up(tmp_path: Path, misbehaviour: Misbehaviour) -> None:
    async with port_of(tmp_path, FakeAgent(misbehaviour=misbehaviour)) as port:
        with pytest.raises(AgentLost):
            await AgentLink.connect(port.path, deadline_s=0.3, gone=never())


async def test_a_vmm_that_ends_first_is_told_as_that(tmp_path: Path) -> None:
    async with port_of(tmp_path, FakeAgent(misbehaviour=Misbehaviour.SILENT)) as port:
        gone = never()
        connecting = asyncio.create_task(AgentLink.connect(port.path, deadline_s=DEADLINE_S, gone=gone))
        await until(lambda: port.heard_bytes > 0)
        gone.set_result("signal SIGKILL ended it")
        with pytest.raises(StartFailed, match="SIGKILL") as failed:
            await connecting
        assert failed.value.reason == "VmmExited"


async def test_nobody_there_is_told_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(AgentLost, match=r"nobody\.sock"):
        await AgentLink.connect(tmp_path / "nobody.sock", deadline_s=DEADLINE_S, gone=never())


async def test_a_slow_guest_is_only_slow(tmp_path: Path) -> None:
    agent = FakeAgent(lambda _: Script(stdout=b"x" * 2000), misbehaviour=Misbehaviour.DRIBBLE)
    async with linked(tmp_path, agent) as (link, _):
        assert await collect(await link.spawn(start(2, b"a"))) == (b"x" * 2000, b"", Exit(0))


BREACHES = [
    Misbehaviour.GARBLE, Misbehaviour.BAD_CRC, Misbehaviour.OVERSIZE, Misbehaviour.DEEP_NESTING,
    Misbehaviour.HUGE_COUNT, Misbehaviour.WRONG_ID, Misbehaviour.FLOOD_OUTPUT, Misbehaviour.WRONG_OFFSET,
    Misbehaviour.UNKNOWN_PROC, Misbehaviour.NOISE,
]  # fmt: skip


@pytest.mark.parametrize("misbehaviour", BREACHES)
async def test_a_breach_ends_the_link_tells_everybody_and_costs_no_memory(
    tmp_path: Path, misbehaviour: Misbehaviour
) -> None:
    agent = FakeAgent()
    async with linked(tmp_path, agent) as (link, _):
        process = await link.spawn(start(2, b"cat", stdin=True))
        waiting = asyncio.create_task(process.wait())
        tracemalloc.start()
        try:
            agent.misbehaviour = misbehaviour
            await process.write(b"hello")
            with contextlib.suppress(AgentLost):
                await link.stats()  # whose answer may come before the breach
            why = await asyncio.wait_for(asyncio.shield(link.lost), DEADLINE_S)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert "broke the protocol" in why
        assert peak_bytes < 4 << 20
        with pytest.raises(AgentLost, match="broke the protocol"):
            await waiting
        async for _ in process.output():
            pass  # ends
        with pytest.raises(AgentLost):
            await link.spawn(start(3, b"true"))
        await process.write(b"dropped")
        await process.close_stdin()


async def test_a_port_that_closes_ends_the_link(tmp_path: Path) -> None:
    async with linked(tmp_path, FakeAgent()) as (link, port):
        asking = asyncio.create_task(link.stats())
        port.hang_up()
        assert await asyncio.wait_for(asyncio.shield(link.lost), DEADLINE_S)
        with pytest.raises(AgentLost):
            await asking


async def test_a_flood_of_events_is_counted_not_kept(tmp_path: Path) -> None:
    agent = FakeAgent(misbehaviour=Misbehaviour.FLOOD_EVENTS, honest_replies=2)
    async with linked(tmp_path, agent) as (link, _):
        events: list[object] = []
        link.on_event = events.append
        for _ in range(10):
            await link.stats()
        assert len(events) < 100
        assert not link.lost.done()


async def test_output_that_nobody_takes_is_bounded_however_small_its_pieces(tmp_path: Path) -> None:
    """One-byte pieces, the streams in turn: 16,384 frames that must not become as many objects."""
    agent = FakeAgent(lambda _: Script(exit_code=None))
    async with linked(tmp_path, agent) as (link, port):
        process = await link.spawn(start(2, b"sleep"))
        frames = [
            encode_frame([Kind.OUTPUT, 0, 2, stream, offset, bytes([offset % 251])])
            for offset in range(8192)
            for stream in Stream
        ]
        flood = b"".join(frames)
        del frames
        tracemalloc.start()
        try:
            for at in range(0, len(flood), 1 << 20):
                port.say(flood[at : at + (1 << 20)])
                await asyncio.sleep(0)
            await until(lambda: sum(len(piece.data) for piece in process._waiting) == 16384, 20)
            now_bytes = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert len(process._waiting) <= MAX_PIECES
        assert now_bytes < 1 << 20
        streams = {1: b"", 2: b""}
        output = process.output()
        while sum(map(len, streams.values())) < 16384:
            piece = await anext(output)
            streams[piece.stream] += piece.data
        assert streams[1] == streams[2] == bytes(offset % 251 for offset in range(8192))


async def test_a_guest_that_talks_and_never_listens_is_not_listened_to(tmp_path: Path) -> None:
    """Each piece it sends would earn an acknowledgement; what it does not read must not pile up here."""
    agent = FakeAgent(lambda _: Script(exit_code=None))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while Kind.START not in agent.requests:
            writer.write(agent.receive(await reader.read(65536)))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            for offset in itertools.count():
                writer.write(encode_frame([Kind.OUTPUT, 0, 2, 1, offset, b"x"]))
                await asyncio.wait_for(writer.drain(), 0.5)
                await asyncio.sleep(0)  # so that each piece is taken, and acknowledged, by itself
        except (TimeoutError, ConnectionError):
            pass  # it is not read any more
        finally:
            writer.transport.abort()

    path = tmp_path / "agent.sock"
    server = await asyncio.start_unix_server(serve, str(path))
    link = await AgentLink.connect(path, deadline_s=DEADLINE_S, gone=never())
    await link.configure(CONFIGURE)
    process = await link.spawn(start(2, b"sleep"))

    async def drink() -> None:
        async for _ in process.output():
            pass

    link._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    drinking = asyncio.create_task(drink())
    most_bytes = 0
    give_up_s = asyncio.get_running_loop().time() + 30
    while not link.lost.done():
        assert asyncio.get_running_loop().time() < give_up_s, "the guest was listened to for ever"
        most_bytes = max(most_bytes, link._writer.transport.get_write_buffer_size())
        await asyncio.sleep(0.001)
    assert 16 << 10 < most_bytes < 256 << 10
    await link.close()
    await drinking
    server.close()


async def test_a_spawn_given_up_is_put_away(tmp_path: Path) -> None:
    agent = FakeAgent()
    async with linked(tmp_path, agent) as (link, _):
        spawning = asyncio.create_task(link.spawn(start(2, b"sleep")))
        await asyncio.sleep(0)
        spawning.cancel()
        await asyncio.wait({spawning})
        await until(lambda: Kind.FORGET in agent.requests)
        assert Kind.SIGNAL in agent.requests


async def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    async with port_of(tmp_path, FakeAgent()) as port:
        for _ in range(3):
            link = await AgentLink.connect(port.path, deadline_s=DEADLINE_S, gone=never())
            await link.close()
            await link.close()  # idempotent
        await until(lambda: not any("agent" in task.get_name() for task in asyncio.all_tasks()))
