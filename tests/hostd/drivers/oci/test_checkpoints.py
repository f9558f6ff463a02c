"""User-kernel sandboxes saved by a real runsc: the source goes on to the byte, and copies are sandboxes themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hostd.drivers.contract import Engine, ProcessLink, StartPlan, TakenCheckpoint
from hostd.drivers.oci import checkpointfile, probe
from hostd.drivers.oci.checkpointing import OciCheckpointing
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.engine import OciEngine
from hostd.drivers.oci.identity import machine_id
from hostd.drivers.oci.probe import try_checkpoint
from hostd.errors import CannotCheckpoint, CheckpointFailed, CheckpointUnusable
from tests.contract.driver_suite import command
from tests.hostd.drivers.oci.rig import OciRig, Surroundings, left_of, run, sh

DEADLINE_S = 120.0
COUNT = "echo mine > /mark; rm /etc/profile; i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
ECHO = "exec 7>/held; while read line; do echo got $line; echo $line >&7; done; echo over"


@dataclass
class Recorded:
    """A running sandbox, whose output is taken as hostd takes it."""

    plan: StartPlan
    engine: Engine
    main: ProcessLink
    begin: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})
    printed: dict[int, bytes] = field(default_factory=lambda: {1: b"", 2: b""})

    def offsets(self) -> dict[int, int]:
        return {stream: self.begin[stream] + len(data) for stream, data in self.printed.items()}

    async def take(self) -> None:
        async for piece in self.main.output():
            self.printed[piece.stream] += piece.data

    async def until(self, condition: Callable[[bytes], bool]) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if condition(self.printed[1]):
                    return self.printed[1]
                await asyncio.sleep(0.02)


def kernel_of(taken: TakenCheckpoint) -> checkpointfile.SavedKernel:
    assert isinstance(taken.memory, checkpointfile.SavedKernel)
    return taken.memory


class Nursery:
    """Starts and restores sandboxes on runsc; nothing of any of them is left, which is asserted."""

    def __init__(self, rig: OciRig, stack: contextlib.AsyncExitStack) -> None:
        self.rig, self._stack = rig, stack
        assert isinstance(rig.driver, OciDriver)
        self.driver = rig.driver

    @property
    def checkpointing(self) -> OciCheckpointing:
        assert isinstance(self.driver.checkpointing, OciCheckpointing)
        return self.driver.checkpointing

    async def start(self, uid: str, script: str, **changes: object) -> Recorded:
        plan = self.rig.plan(uid)
        plan = replace(plan, spec=replace(plan.spec, process=replace(plan.spec.process, stdin=True)))
        engine = await self.driver.start(plan, lambda _: None)
        self._stack.push_async_callback(self._end, plan, engine)
        main = await engine.spawn(command(sh(script), stdin=True, **changes), main=True)
        return self._recorded(Recorded(plan, engine, main))

    async def restore(self, uid: str, taken: TakenCheckpoint) -> Recorded:
        plan = self.rig.plan(uid)
        plan = replace(plan, spec=replace(plan.spec, checkpoint="c-1", process=replace(plan.spec.process, stdin=True)))
        handles: list[object] = []
        engine = await self.checkpointing.restore(plan, kernel_of(taken), taken.form, taken.offsets, handles.append)
        self._stack.push_async_callback(self._end, plan, engine)
        assert handles == [engine.handle]
        main = engine.resume()
        assert main is not None
        return self._recorded(Recorded(plan, engine, main, dict(taken.offsets)))

    def _recorded(self, box: Recorded) -> Recorded:
        task = asyncio.create_task(box.take())
        self._stack.callback(task.cancel)
        return box

    async def _end(self, plan: StartPlan, engine: Engine) -> None:
        await engine.detach()
        await self.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        assert left_of(plan.spec.uid, plan.folder) == []


@pytest.fixture
async def nursery(around: Surroundings) -> AsyncIterator[Nursery]:
    rig = OciRig(around, "runsc")
    if not rig.runtime.checkpoints:
        pytest.skip("this runsc cannot go on from a checkpoint")
    async with contextlib.AsyncExitStack() as stack:
        yield Nursery(rig, stack)


def stored(taken: TakenCheckpoint, path: Path) -> checkpointfile.SavedKernel:
    """As it comes back from the store."""
    with path.open("xb") as out:
        taken.memory.write(b"about it", out)
    taken.memory.close()
    assert checkpointfile.recognises(path)
    assert checkpointfile.read_about(path) == b"about it"
    return checkpointfile.load(path)


def follows(data: bytes, first: int) -> bool:
    numbers = [int(word) for word in data.rpartition(b"\n")[0].split()]
    assert numbers == list(range(first, first + len(numbers)))
    return len(numbers) >= 3


async def test_the_source_goes_on_and_copies_go_on_from_it(nursery: Nursery, tmp_path: Path) -> None:
    source = await nursery.start("src", COUNT)
    await source.until(lambda data: len(data) > 10)
    taken = await nursery.checkpointing.checkpoint(source.engine, source.offsets)
    assert 0 < taken.pause_s < 60
    recorded = len(source.printed[1][: taken.offsets[1]].split())
    at_the_end = len(source.printed[1])
    await source.until(lambda data: len(data) > at_the_end + 20 and follows(data, 1))
    memory = stored(taken, tmp_path / "blob")
    taken = replace(taken, memory=memory, form=json.loads(json.dumps(taken.form)))
    twins = [await nursery.restore(uid, taken) for uid in ("twin", "other")]
    memory.close()
    for twin in twins:
        await twin.until(lambda data: follows(data, recorded + 1))
        script = "cat /mark /etc/machine-id; ls /etc/profile || echo gone; echo $1 > /mark"
        out, _, _ = await run(twin.engine, ("sh", "-c", script, "sh", twin.plan.spec.uid))
        assert out.split() == ["mine", machine_id(twin.plan.spec.uid), "gone"]
        assert twin.engine.origin == "restored from checkpoint c-1"
    for box, mark in ((source, "mine"), *((twin, twin.plan.spec.uid) for twin in twins)):
        assert (await run(box.engine, ("cat", "/mark")))[0] == f"{mark}\n"
        follows(box.printed[1], 1 if box is source else recorded + 1)


async def test_input_that_waits_is_read_afterwards(nursery: Nursery) -> None:
    source = await nursery.start("typed", ECHO)
    await source.main.write(b"one\n")
    await source.until(lambda data: data == b"got one\n")
    taken = await nursery.checkpointing.checkpoint(source.engine, source.offsets)
    await source.main.write(b"two\n")
    await source.until(lambda data: data == b"got one\ngot two\n")
    twin = await nursery.restore("twin", taken)
    taken.memory.close()
    await twin.main.write(b"three\n")
    await twin.main.close_stdin()
    await twin.until(lambda data: data == b"got three\nover\n")
    assert (await twin.main.wait()).code == 0
    await source.main.signal(15)
    assert (await source.main.wait()).code == 143


async def test_what_it_cannot_carry_is_refused_and_does_no_harm(nursery: Nursery) -> None:
    source = await nursery.start("busy", COUNT)
    session = await source.engine.spawn(command(("sleep", "1000")), main=False)
    with pytest.raises(CannotCheckpoint, match="started by exec"):
        await nursery.checkpointing.checkpoint(source.engine, source.offsets)
    await session.signal(9)
    await session.wait()
    (await nursery.checkpointing.checkpoint(source.engine, source.offsets)).memory.close()
    shown = await nursery.start("shown", "sleep 1000", tty=True)
    with pytest.raises(CannotCheckpoint, match="terminal"):
        await nursery.checkpointing.checkpoint(shown.engine, shown.offsets)


async def test_another_hostd_goes_on_with_what_stood_still(nursery: Nursery) -> None:
    """hostd died between the end of the saved kernel and its going on."""
    source = await nursery.start("left", COUNT)
    await source.until(lambda data: len(data) > 10)
    assert isinstance(source.engine, OciEngine)
    engine, place = source.engine, source.engine.place

    async def died(engine: OciEngine) -> None:
        raise CheckpointFailed("hostd died")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hostd.drivers.oci.checkpointing.go_on", died)
        with pytest.raises(CheckpointFailed, match="hostd died"):
            await nursery.checkpointing.checkpoint(engine, source.offsets)
    assert (place.folder / "again").exists()
    await engine.detach()
    taken_over = await nursery.rig.new_driver().adopt(source.plan, engine.handle, source.offsets())
    assert taken_over is not None
    main = taken_over.resume()
    assert main is not None
    next_one = nursery._recorded(Recorded(source.plan, taken_over, main))
    last = int(source.printed[1].split()[-1])
    await next_one.until(lambda data: follows(data, last + 1))
    await taken_over.detach()


async def test_a_kernel_that_does_not_save_itself_is_said_to_be_gone(nursery: Nursery, tmp_path: Path) -> None:
    source = await nursery.start("lost", COUNT)
    assert isinstance(source.engine, OciEngine)
    fake = tmp_path / "runsc"
    fake.write_text('#!/bin/sh\nfor a; do [ "$a" = checkpoint ] && kill -9 $(cat $PIDS) && exit 9; done\nexit 0\n')
    fake.chmod(0o755)
    pids = tmp_path / "pids"
    sentry = nursery.rig.around.cgroups.pids(source.plan.spec.uid) - {source.engine.handle.pid}
    pids.write_text(" ".join(map(str, sentry)))
    source.engine.place = replace(source.engine.place, runtime=replace(nursery.rig.runtime, binary=str(fake)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointFailed, match="has ended"):
        patch.setenv("PIDS", str(pids))
        await nursery.checkpointing.checkpoint(source.engine, source.offsets)
    async with asyncio.timeout(DEADLINE_S):
        assert (await source.engine.wait_gone()).reason == "VmmExited"


async def test_another_runsc_s_checkpoint_is_not_tried(nursery: Nursery) -> None:
    source = await nursery.start("versions", COUNT)
    taken = await nursery.checkpointing.checkpoint(source.engine, source.offsets)
    with pytest.raises(CheckpointUnusable, match="is of runsc 'another' on"):
        await nursery.restore("twin", replace(taken, form={**taken.form, "runtime": "another"}))
    plan = nursery.rig.plan("twin")
    assert left_of(plan.spec.uid, plan.folder) == []
    kernel = kernel_of(taken)
    broken = replace(taken, memory=replace(kernel, image=replace(kernel.image, size_bytes=100)))
    with pytest.raises(CheckpointUnusable, match="does not go on from it"):
        await nursery.restore("twin", broken)
    assert left_of(plan.spec.uid, plan.folder) == []
    taken.memory.close()


async def test_the_probe_tells_a_runsc_that_cannot(around: Surroundings, tmp_path: Path) -> None:
    """The class then has no checkpoints, and who asks is told which have."""
    fake = tmp_path / "runsc"
    real = around.runtime("runsc").binary
    fake.write_text(
        f'#!/bin/sh\nfor a; do [ "$a" = checkpoint ] && echo no save here >&2 && exit 9; done\nexec {real} "$@"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    broken = replace(around.runtime("runsc"), binary=str(fake))
    assert await try_checkpoint(broken, around.cgroups) == "checkpoint: no save here"
    assert await try_checkpoint(around.runtime("runsc"), around.cgroups) == ""
    assert (
        OciDriver(
            replace(broken, checkpoints=False), OciRig(around, "runsc").new_driver().layers, around.cgroups
        ).checkpointing
        is None
    )
    assert probe.Verdict(True, "", "", "").no_checkpoints


def test_a_blob_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 20)
    assert not checkpointfile.recognises(path)
    for data in (b"short", b"\0" * 100, b"SLRUNSC1" + b"\xff" * 24):
        path.write_bytes(data)
        with pytest.raises(CheckpointUnusable, match="make it anew"):
            checkpointfile.load(path)
        with pytest.raises(CheckpointUnusable, match=str(path)):
            checkpointfile.read_about(path)
