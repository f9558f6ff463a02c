"""What every driver must do, written once against hostd.drivers.contract. A module for each driver subclasses it.

    class TestMine(DriverSuite):
        @pytest_asyncio.fixture(scope="class", loop_scope="class")
        @classmethod
        async def rig(cls) -> AsyncIterator[Rig]: ...

A rig brings the driver, plans that fit it, and its way to say the same few programs. One engine is shared by the tests
that only run processes in it, since booting one may take seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from hostd.drivers.contract import Driver, Engine, Exit, ProcessLink, StartPlan
from hostd.errors import AgentLost, CommandFailed, HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.memory.values import ShortfallCause
from hostd.spec import Command, ProcessSpec, Resources, SandboxSpec

DEADLINE_S = 60.0
SMALL = Resources(memory_min_mib=256, memory_max_mib=768, memory_mib=256, cpu_milli=1000)


@dataclass(frozen=True)
class Programs:
    """The same programs in each driver's words; see hostd/drivers/fakeprograms.py for what they do."""

    cat: tuple[str, ...]
    sleep: tuple[str, ...]
    deaf: tuple[str, ...]
    polite: tuple[str, ...]  # ends with 3
    env: tuple[str, ...]
    pwd: tuple[str, ...]
    size: tuple[str, ...]
    fault: tuple[str, ...]
    unrunnable: tuple[str, ...]
    flood: tuple[str, ...]  # FLOOD_BYTES
    say: tuple[str, ...]  # "out" to stdout, "err" to stderr, ends with 7


FLOOD_BYTES = 1_000_000


def flood_bytes() -> bytes:
    """What `flood` prints."""
    return b"".join(b"%015d\n" % number for number in range(FLOOD_BYTES // 16 + 1))[:FLOOD_BYTES]


class Rig(ABC):
    """A driver under test and its surroundings."""

    programs: Programs
    driver: Driver

    @abstractmethod
    def plan(self, uid: str) -> StartPlan:
        """A plan of SMALL resources for a sandbox that was not there before."""

    @abstractmethod
    def reborn(self) -> Driver:
        """The driver as a hostd has it that was started after another one died."""

    @abstractmethod
    def kill(self, handle: Handle) -> None:
        """Ends the engine's process as a crash does."""

    @abstractmethod
    def left(self, plan: StartPlan) -> list[str]:
        """Everything on this machine that belongs to the plan's sandbox."""


def spec_of(
    uid: str, resources: Resources = SMALL, image_digest: str = "sha256:" + "0" * 64, hostname: str = ""
) -> SandboxSpec:
    """A sandbox of tenant acme. Its main process is whatever the test spawns."""
    return SandboxSpec(uid, uid, "acme", image_digest, hostname or uid, resources, ProcessSpec(stdin=True), epoch=1)


def command(argv: tuple[str, ...], **changes: object) -> Command:
    """A command with nothing special about it."""
    values: dict[str, object] = {
        "env": (("PATH", "/bin:/usr/bin"), ("COLOUR", "blue")), "workdir": "/", "user": "", "tty": False,
        "stdin": False, "rows": 24, "cols": 80,
    }  # fmt: skip
    return Command(argv=argv, **{**values, **changes})  # type: ignore[arg-type]


async def collect(process: ProcessLink) -> tuple[bytes, bytes, Exit]:
    """All output of both streams, and how it ended."""
    streams = {1: bytearray(), 2: bytearray()}
    async with asyncio.timeout(DEADLINE_S):
        async for piece in process.output():
            streams[piece.stream] += piece.data
        return bytes(streams[1]), bytes(streams[2]), await process.wait()


async def read_until(output: AsyncIterator[object], wanted: bytes) -> bytes:
    """Takes output until it holds `wanted`."""
    seen = b""
    async with asyncio.timeout(DEADLINE_S):
        while wanted not in seen:
            seen += (await anext(output)).data  # type: ignore[attr-defined]
    return seen


class Handles(list[Handle]):
    """Collects what `made` is called with."""

    def __call__(self, handle: Handle) -> None:
        self.append(handle)


@pytest.mark.asyncio(loop_scope="class")
class DriverSuite:
    """See the module."""

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def box(cls, rig: Rig) -> AsyncIterator[Engine]:
        """An engine whose main process sleeps."""
        plan = rig.plan("box")
        made = Handles()
        engine = await rig.driver.start(plan, made)
        assert made == [engine.handle]
        await engine.spawn(command(rig.programs.sleep), main=True)
        yield engine
        await engine.detach()
        await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        assert rig.left(plan) == []

    async def run(self, engine: Engine, argv: tuple[str, ...], **changes: object) -> tuple[bytes, bytes, Exit]:
        process = await engine.spawn(command(argv, **changes), main=False)
        done = await collect(process)
        await process.release()
        return done

    async def test_the_start_has_its_phases(self, box: Engine) -> None:
        assert [name for name, _ in box.start_phases] == ["vmm", "kernel", "agent"]
        assert all(seconds >= 0 for _, seconds in box.start_phases)

    async def test_streams_are_apart_and_the_exit_code_comes(self, rig: Rig, box: Engine) -> None:
        assert await self.run(box, rig.programs.say) == (b"out", b"err", Exit(7))

    async def test_a_signal_is_told_as_128_more(self, rig: Rig, box: Engine) -> None:
        assert (await self.run(box, rig.programs.fault))[2] == Exit(128 + signal.SIGSEGV, signal.SIGSEGV)

    async def test_what_is_not_there_is_127(self, box: Engine) -> None:
        with pytest.raises(CommandFailed, match="no-such-program") as failed:
            await box.spawn(command(("no-such-program",)), main=False)
        assert failed.value.exit_code == 127

    async def test_what_cannot_be_run_is_126(self, rig: Rig, box: Engine) -> None:
        with pytest.raises(CommandFailed) as failed:
            await box.spawn(command(rig.programs.unrunnable), main=False)
        assert failed.value.exit_code == 126

    async def test_nonsense_is_refused_and_does_no_harm(self, rig: Rig, box: Engine) -> None:
        with pytest.raises(InvalidSpec):
            await box.spawn(command(rig.programs.sleep, workdir="here"), main=False)
        assert (await self.run(box, rig.programs.say))[2] == Exit(7)

    async def test_stdin_to_its_end(self, rig: Rig, box: Engine) -> None:
        data = bytes(range(256)) * 1200
        process = await box.spawn(command(rig.programs.cat, stdin=True), main=False)

        async def feed() -> None:
            await process.write(data)
            await process.close_stdin()

        feeding = asyncio.create_task(feed())
        assert await collect(process) == (data, b"", Exit(0))
        await feeding
        await process.write(b"too late")  # dropped
        await process.release()

    async def test_without_stdin_it_is_at_its_end(self, rig: Rig, box: Engine) -> None:
        assert await self.run(box, rig.programs.cat) == (b"", b"", Exit(0))

    async def test_environment_and_workdir(self, rig: Rig, box: Engine) -> None:
        out, _, ended = await self.run(box, rig.programs.env, env=(("PATH", "/bin:/usr/bin"), ("TASTE", "s weet=1")))
        assert ended == Exit(0)
        assert b"TASTE=s weet=1\n" in out
        assert b"COLOUR" not in out
        assert (await self.run(box, rig.programs.pwd, workdir="/etc"))[0] == b"/etc\n"

    async def test_a_terminal_and_its_size(self, rig: Rig, box: Engine) -> None:
        process = await box.spawn(command(rig.programs.size, tty=True, stdin=True, rows=33, cols=101), main=False)
        output = process.output()
        await read_until(output, b"33 101")
        await process.resize_tty(40, 120)
        await read_until(output, b"40 120")
        await process.write(b"\n")
        async for _ in output:
            pass
        assert await process.wait() == Exit(0)
        await process.release()

    async def test_signals(self, rig: Rig, box: Engine) -> None:
        polite = await box.spawn(command(rig.programs.polite), main=False)
        output = polite.output()
        await read_until(output, b"ready\n")
        await polite.signal(signal.SIGTERM)
        assert await read_until(output, b"bye\n") == b"bye\n"
        assert await polite.wait() == Exit(3)
        await polite.signal(signal.SIGTERM)  # it has ended: nothing happens
        await polite.release()

    async def test_sigkill_ends_what_hears_nothing_else(self, rig: Rig, box: Engine) -> None:
        deaf = await box.spawn(command(rig.programs.deaf), main=False)
        output = deaf.output()
        await read_until(output, b"ready\n")
        await deaf.signal(signal.SIGTERM)
        with pytest.raises(InvalidSpec):
            await deaf.signal(65)
        await deaf.signal(signal.SIGKILL)
        async for _ in output:
            pass
        assert await deaf.wait() == Exit(137, signal.SIGKILL)
        await deaf.release()

    async def test_much_output_comes_whole_and_waits_for_its_reader(self, rig: Rig, box: Engine) -> None:
        first = await box.spawn(command(rig.programs.flood), main=False)
        second = await box.spawn(command(rig.programs.flood), main=False)
        assert await collect(second) == (flood_bytes(), b"", Exit(0))  # though nobody reads the first one
        assert await collect(first) == (flood_bytes(), b"", Exit(0))
        await first.release()
        await second.release()

    async def test_many_at_once(self, rig: Rig, box: Engine) -> None:
        done = await asyncio.gather(*(self.run(box, rig.programs.say) for _ in range(8)))
        assert done == [(b"out", b"err", Exit(7))] * 8

    async def test_a_spawn_that_is_given_up_leaves_no_process(self, rig: Rig, box: Engine) -> None:
        spawning = asyncio.create_task(box.spawn(command(rig.programs.sleep), main=False))
        await asyncio.sleep(0)
        spawning.cancel()
        await asyncio.wait({spawning})
        assert (await self.run(box, rig.programs.say))[2] == Exit(7)

    async def test_memory_grows_and_shrinks(self, rig: Rig, box: Engine) -> None:
        async def reach(memory_mib: int) -> int:
            before_mib = (await box.memory()).actual_mib
            resized = await box.resize(Resources(256, 768, memory_mib, 1000), deadline_s=DEADLINE_S)
            assert resized.cause is None, resized
            assert (resized.shortfall_mib, resized.message, resized.vcpus) == (0, "", 1)
            assert abs(sum(moved.mib for moved in resized.moved) - (memory_mib - before_mib)) <= 2
            now = await box.memory()
            assert abs(now.actual_mib - memory_mib) < 2 and now.actual_mib == resized.actual_mib
            assert 0 < now.available_mib <= now.actual_mib
            return now.available_mib

        small_mib = await reach(256)
        await reach(768)
        give_up_s = asyncio.get_running_loop().time() + DEADLINE_S
        while (now := await box.memory()).available_mib - small_mib <= 400:  # a guest's kernel has yet to count it
            assert asyncio.get_running_loop().time() < give_up_s, now
            await asyncio.sleep(0.02)
        await reach(300)

    async def test_targets_are_accepted_at_once_and_reached_later(self, rig: Rig, box: Engine) -> None:
        for memory_mib in (400, 256):
            resized = await box.resize(Resources(256, 768, memory_mib, 1000))
            assert resized.cause in (None, ShortfallCause.FOLLOWING)
            give_up_s = asyncio.get_running_loop().time() + DEADLINE_S
            while abs((now := await box.memory()).actual_mib - memory_mib) >= 2:
                assert asyncio.get_running_loop().time() < give_up_s, now
                await asyncio.sleep(0.02)

    async def test_what_one_hostd_lets_go_of_the_next_takes_over(self, rig: Rig) -> None:
        plan = rig.plan("kept")
        engine = await rig.driver.start(plan, Handles())
        main = await engine.spawn(command(rig.programs.cat, stdin=True), main=True)
        other = await engine.spawn(command(rig.programs.sleep), main=False)
        output = main.output()
        await main.write(b"one\n")
        assert await read_until(output, b"\n") == b"one\n"
        await main.write(b"two\n")
        await read_until(output, b"two\n")  # read, but not asked on: it does not count as held
        await engine.detach()
        with pytest.raises(HostdError):
            await asyncio.wait_for(other.wait(), DEADLINE_S)

        adopted = await rig.reborn().adopt(plan, engine.handle, {1: 4, 2: 0})
        assert adopted is not None
        assert adopted.handle == engine.handle
        main_again = adopted.resume()
        assert main_again is not None
        output = main_again.output()
        assert await read_until(output, b"two\n") == b"two\n"  # exactly from the offset on
        await main_again.write(b"three\n")
        assert await read_until(output, b"three\n") == b"three\n"

        gone = asyncio.create_task(adopted.wait_gone())
        rig.kill(engine.handle)
        loss = await asyncio.wait_for(gone, 5)
        assert loss.reason == "VmmExited"
        with pytest.raises(AgentLost):
            await asyncio.wait_for(main_again.wait(), 5)
        await adopted.detach()
        assert await rig.reborn().adopt(plan, engine.handle, {1: 4, 2: 0}) is None
        await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        await rig.driver.destroy(plan.spec.uid, plan.folder, engine.handle)  # idempotent
        assert rig.left(plan) == []

    async def test_the_end_of_main_and_a_destroy_that_knows_no_handle(self, rig: Rig) -> None:
        plan = rig.plan("short")
        engine = await rig.driver.start(plan, Handles())
        main = await engine.spawn(command(rig.programs.say), main=True)
        assert await collect(main) == (b"out", b"err", Exit(7))
        assert rig.left(plan) != []
        replaced = asyncio.ensure_future(anext(engine.memory_events(), None))
        await asyncio.sleep(0)
        listening = asyncio.ensure_future(anext(engine.memory_events(), None))
        assert await asyncio.wait_for(replaced, DEADLINE_S) is None  # another consumer has come
        assert not listening.done()
        await engine.detach()
        assert await asyncio.wait_for(listening, DEADLINE_S) is None  # who let go hears nothing any more
        await engine.detach()  # idempotent
        await rig.driver.destroy(plan.spec.uid, plan.folder, None)  # as after a crash before its handle was journaled
        assert rig.left(plan) == []

    async def test_a_start_that_is_given_up_leaves_nothing(self, rig: Rig) -> None:
        plan = rig.plan("early")
        made = asyncio.Event()
        starting = asyncio.create_task(rig.driver.start(plan, lambda _: made.set()))
        async with asyncio.timeout(DEADLINE_S):
            await made.wait()
        starting.cancel()
        await asyncio.wait({starting})
        assert starting.cancelled()
        assert rig.left(plan) == []

    async def test_a_start_given_up_at_once_leaves_nothing(self, rig: Rig) -> None:
        plan = rig.plan("earlier")
        starting = asyncio.create_task(rig.driver.start(plan, Handles()))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        assert rig.left(plan) == []

    async def test_nothing_is_there_to_destroy(self, rig: Rig, tmp_path: Path) -> None:
        await rig.driver.destroy("never", tmp_path / "never", None)

    async def test_a_relative_path_is_never_removed(
        self, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An empty path is the working directory."""
        monkeypatch.chdir(tmp_path)
        kept = tmp_path / "kept"
        kept.write_text("x")
        for path in (Path(), Path("kept")):
            with contextlib.suppress(HostdError):
                await rig.driver.destroy("never", path, None)
        assert kept.exists()
