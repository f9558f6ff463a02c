"""The monitor by itself, under ASan and UBSan: a shell script plays the runtime, so that nothing is contained."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guestagent.messages import MAIN_PROC, StartProcess
from guestagent.protocol import ProcCarry, SessionCarry
from hostd.agentlink import AgentLink
from hostd.agentprocess import AgentProcess
from hostd.drivers.contract import Exit
from hostd.drivers.oci.monitor import MONITOR
from hostd.errors import AgentLost, CommandFailed, InvalidSpec
from hostd.process import start_ticks

SOURCE = MONITOR.parent.parent / "src"
DEADLINE_S = 120.0  # under sanitizers, on a busy machine
PATH = (b"PATH=/usr/sbin:/usr/bin:/sbin:/bin",)


@pytest.fixture(scope="session")
def sanitized() -> Iterator[Path]:
    """The monitor built under the sanitizers; skips when there is no compiler or no msgpack-c to build it with."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("needs gcc and make to build the sanitized monitor")
    with tempfile.TemporaryDirectory() as build:
        made = subprocess.run(
            ["make", "-s", "-C", str(SOURCE), f"BUILD={build}", "sanitized"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert made.returncode == 0, made.stderr
        yield Path(build) / "sandloom-monitor-asan"


@dataclass
class Watched:
    """A monitor of ours, and a way to let it start things."""

    folder: Path
    process: subprocess.Popen[bytes]
    gone: asyncio.Future[str]

    async def link(self, out: int = 0, err: int = 0) -> AgentLink:
        carry = SessionCarry(procs=(ProcCarry(MAIN_PROC, out, err),))
        return await AgentLink.connect(self.folder / "agent.sock", deadline_s=DEADLINE_S, gone=self.gone, carry=carry)

    def start(self, script: str, proc: int = MAIN_PROC, **changes: object) -> StartProcess:
        """`script` runs detached, as a runtime starts a workload."""
        runtime = f"exec 3<&0; setsid sh -c '{script}' <&3 3<&- & echo -n $! > {self.folder}/{proc}.pid"
        return self.raw(runtime, proc, **changes)

    def raw(self, runtime: str, proc: int = MAIN_PROC, **changes: object) -> StartProcess:
        argv = (b"/bin/sh", b"-c", runtime.encode())
        return StartProcess(proc=proc, argv=argv, env=PATH, **changes)  # type: ignore[arg-type]


@pytest.fixture
async def monitor(sanitized: Path, tmp_path: Path) -> AsyncIterator[Watched]:
    with socket.socket(socket.AF_UNIX) as listener, (tmp_path / "log").open("wb") as log:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen(4)
        process = subprocess.Popen(  # noqa: ASYNC220
            [str(sanitized), str(tmp_path), str(listener.fileno()), "--"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(listener.fileno(),),
            env={"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"},
        )  # fmt: skip
    yield Watched(tmp_path, process, asyncio.get_running_loop().create_future())
    ended = process.poll()
    process.kill()
    process.wait()
    said = (tmp_path / "log").read_text()
    assert ended is None, f"the monitor ended by itself: {said}"
    assert said == ""


async def collect(process: AgentProcess) -> tuple[bytes, bytes, Exit]:
    streams = {1: b"", 2: b""}
    async with asyncio.timeout(DEADLINE_S):
        async for piece in process.output():
            streams[piece.stream] += piece.data
        return streams[1], streams[2], await process.wait()


async def test_streams_and_status_of_what_a_runtime_left_running(monitor: Watched) -> None:
    link = await monitor.link()
    process = await link.spawn(monitor.start("echo out; echo err >&2; exit 5"))
    assert await collect(process) == (b"out\n", b"err\n", Exit(5))
    await process.release()
    killed = await link.spawn(monitor.start("kill -9 $$", 2))
    assert (await collect(killed))[2] == Exit(137, 9)
    await link.close()


async def test_a_runtime_that_fails_is_quoted(monitor: Watched) -> None:
    link = await monitor.link()
    for script, words in (
        ("echo no such image >&2; exit 3", "no such image"),
        ("exit 3", "ended without a word"),
        ("exit 0", "told no pid"),
        (f"echo 99999999999 > {monitor.folder}/1.pid", "told no pid"),
        (f"echo x > {monitor.folder}/1.pid", "told no pid"),
        (f"ln -s /etc/hostname {monitor.folder}/1.pid", "told no pid"),
        ("kill -9 $$", "ended without a word"),
        (f"echo {'x' * 3000} >&2; exit 1", "x" * 400),
    ):
        with pytest.raises(CommandFailed, match=words):
            await link.spawn(monitor.raw(script))
    with pytest.raises(CommandFailed, match="cannot run /no/such/runtime"):
        await link.spawn(StartProcess(proc=1, argv=(b"/no/such/runtime",)))
    with pytest.raises(CommandFailed, match="sent no terminal"):
        await link.spawn(monitor.start("sleep 100", tty=True))
    assert await collect(await link.spawn(monitor.start("echo fine"))) == (b"fine\n", b"", Exit(0))
    assert [path.name for path in monitor.folder.iterdir() if path.suffix in (".pid", ".tty")] == []
    await link.close()


async def test_much_both_ways(monitor: Watched) -> None:
    link = await monitor.link()
    data = bytes(range(256)) * 4096
    process = await link.spawn(monitor.start("exec cat", stdin=True))
    reading = asyncio.create_task(collect(process))
    await process.write(data)
    await process.close_stdin()
    assert await reading == (data, b"", Exit(0))
    await link.close()


async def test_a_workload_that_closes_its_stdin_does_not_block(monitor: Watched) -> None:
    link = await monitor.link()
    process = await link.spawn(monitor.start("exec 0<&-; sleep 0.2; echo done", stdin=True))
    async with asyncio.timeout(DEADLINE_S):
        await process.write(bytes(1 << 20))
        await process.close_stdin()
    assert (await collect(process))[0] == b"done\n"
    await link.close()


async def test_what_nobody_reads_waits_and_nothing_is_lost(monitor: Watched) -> None:
    """A client goes; output piles up to its bound; the next client has all of it, once."""
    link = await monitor.link()
    process = await link.spawn(monitor.start("seq 200000; exit 3"))
    seen, output = b"", process.output()
    while len(seen) < 100_000:
        seen += (await anext(output)).data
    await link.close()
    second = await monitor.link(out=len(seen))
    rest, _, ended = await collect(second.follow(MAIN_PROC))
    assert seen + rest == b"".join(b"%d\n" % n for n in range(1, 200_001))
    assert ended == Exit(3)
    await second.close()


async def test_signals_reach_exactly_the_process(monitor: Watched) -> None:
    link = await monitor.link()
    process = await link.spawn(monitor.start('trap "echo bye; exit 4" TERM; echo up; while :; do sleep 0.05; done'))
    output = process.output()
    assert (await anext(output)).data == b"up\n"
    await process.signal(signal.SIGTERM)
    assert (await anext(output)).data == b"bye\n"
    assert await process.wait() == Exit(4)
    await process.signal(signal.SIGTERM)  # it has ended
    with pytest.raises(InvalidSpec):
        await process.signal(0)
    await link.close()


async def test_a_newer_client_takes_over(monitor: Watched) -> None:
    first = await monitor.link()
    process = await first.spawn(monitor.start("echo one; sleep 0.3; echo two"))
    assert (await anext(process.output())).data == b"one\n"
    second = await monitor.link()
    with pytest.raises(AgentLost):
        await asyncio.wait_for(process.wait(), DEADLINE_S)
    assert (await collect(second.follow(MAIN_PROC)))[0].endswith(b"two\n")
    await first.close()
    await second.close()


async def test_noise_on_its_socket_ends_nothing(monitor: Watched) -> None:
    link = await monitor.link()
    await link.spawn(monitor.start("sleep 0.5; echo survived"))
    await link.close()
    for noise in (b"\0" * 5000, os.urandom(300_000), b"SLSYNC\0\1" + b"n" * 8 + b"\0\0\0\4AAAA\x90\x90\x90\x90", b""):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(monitor.folder / "agent.sock"))
            client.settimeout(1)
            try:
                client.sendall(noise)
            except OSError:
                pass
    again = await monitor.link()
    assert (await collect(again.follow(MAIN_PROC)))[0] == b"survived\n"
    await again.close()


async def test_it_has_no_more_processes_than_it_says(monitor: Watched) -> None:
    link = await monitor.link()
    started = [await link.spawn(monitor.start("sleep 100", proc)) for proc in range(1, 65)]
    with pytest.raises(CommandFailed, match="as many processes"):
        await link.spawn(monitor.start("true", 65))
    for process in started:
        await process.signal(signal.SIGKILL)
    for process in started:
        await process.wait()
        await process.release()
    assert (await collect(await link.spawn(monitor.start("echo room", 66))))[0] == b"room\n"
    await link.close()


async def test_it_is_small(monitor: Watched) -> None:
    """The one that is installed, of course: the sanitizers are not."""
    assert start_ticks(monitor.process.pid) is not None
    if not MONITOR.exists():
        pytest.skip("needs sandloom-monitor: run `make setup`")
    assert MONITOR.stat().st_size < 1 << 20
