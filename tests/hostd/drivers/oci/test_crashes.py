"""What happens when something dies: the workload, the user-space kernel, the monitor, hostd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hostd.drivers.contract import Exit
from hostd.errors import HostdError, SandboxGone, ShortOfResources
from hostd.journal import Handle
from tests.contract.driver_suite import command, read_until
from tests.hostd.drivers.oci.rig import OciRig, processes, sh

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_S = 30.0
pytestmark = pytest.mark.slow


def pids_of(rig: OciRig, uid: str, words: str) -> list[int]:
    mine = rig.around.cgroups.pids(uid)
    return [pid for pid, line in processes() if pid in mine and words in line]


async def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds; TimeoutError after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_killed_workload_is_told_as_killed(around: object, each: OciRig) -> None:
    if each.runtime.name != "crun":
        pytest.skip("the user-space kernel's processes are not the host's to kill")
    async with each.box("victim", ("sleep", "4242")) as (engine, main):
        uid = engine.place.uid  # type: ignore[attr-defined]
        (pid,) = set(pids_of(each, uid, "sleep 4242")) - set(pids_of(each, uid, "fd/3 init"))
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.wait_for(main.wait(), DEADLINE_S) == Exit(137, signal.SIGKILL)


async def test_the_container_s_init_killed(each: OciRig) -> None:
    """crun: PID 1 and with it everything. runsc: the user-space kernel itself, which is the sandbox's end."""
    async with each.box("headless") as (engine, main):
        uid = engine.place.uid  # type: ignore[attr-defined]
        other = await engine.spawn(command(("sleep", "100000")), main=False)
        words = "fd/3 init" if each.runtime.name == "crun" else "runsc-sandbox"
        gone = asyncio.create_task(engine.wait_gone())
        for pid in pids_of(each, uid, words):
            os.kill(pid, signal.SIGKILL)
        if each.runtime.name == "crun":
            assert await asyncio.wait_for(main.wait(), DEADLINE_S) == Exit(137, signal.SIGKILL)
            assert await asyncio.wait_for(other.wait(), DEADLINE_S) == Exit(137, signal.SIGKILL)
            gone.cancel()
        else:
            with pytest.raises(SandboxGone):
                await asyncio.wait_for(main.wait(), DEADLINE_S)
            loss = await asyncio.wait_for(gone, DEADLINE_S)
            assert (loss.reason, "user-space kernel" in loss.message) == ("VmmExited", True)


async def test_everything_killed_at_once(each: OciRig) -> None:
    async with each.box("massacre") as (engine, main):
        for pid in each.around.cgroups.pids(engine.place.uid):  # type: ignore[attr-defined]
            with contextlib.suppress(ProcessLookupError):  # another one's death took it along
                os.kill(pid, signal.SIGKILL)
        loss = await asyncio.wait_for(engine.wait_gone(), DEADLINE_S)
        assert loss.reason == "VmmExited"
        with contextlib.suppress(HostdError):  # what became of it is unknown, unless the monitor had the time to tell
            assert await asyncio.wait_for(main.wait(), DEADLINE_S) == Exit(137, signal.SIGKILL)


async def test_the_end_of_main_ends_the_others(each: OciRig) -> None:
    async with each.box("family", sh("read line"), stdin=True) as (engine, main):
        other = await engine.spawn(command(("sleep", "100000")), main=False)
        await main.write(b"\n")
        assert await asyncio.wait_for(main.wait(), DEADLINE_S) == Exit(0)
        async for _ in other.output():
            pass
        assert await asyncio.wait_for(other.wait(), DEADLINE_S) == Exit(137, signal.SIGKILL)
        with pytest.raises(HostdError):
            await engine.spawn(command(("true",)), main=False)


async def test_a_monitor_holds_so_many_processes_and_says_so(each: OciRig) -> None:
    if each.runtime.name != "crun":
        pytest.skip("one monitor serves both; sixty processes of runsc would only take longer")
    async with each.box("crowd") as (engine, _):
        started = [await engine.spawn(command(("sleep", "100000")), main=False) for _ in range(63)]
        with pytest.raises(ShortOfResources, match="end one of them"):
            await engine.spawn(command(("sleep", "1")), main=False)
        await started[0].signal(signal.SIGKILL)
        await started[0].wait()
        await started[0].release()
        again = await engine.spawn(command(("true",)), main=False)
        assert await again.wait() == Exit(0)


async def test_the_end_while_hostd_was_away_is_told_with_all_output(each: OciRig) -> None:
    plan = each.plan("away")
    engine = await each.driver.start(plan, lambda _: None)
    try:
        main = await engine.spawn(command(sh("echo first; sleep 0.5; echo last; exit 9")), main=True)
        await read_until(main.output(), b"first\n")
        await engine.detach()
        adopted = await each.reborn().adopt(plan, engine.handle, {1: 6, 2: 0})
        assert adopted is not None
        engine = adopted
        again = adopted.resume()
        assert again is not None
        seen = b"".join([piece.data async for piece in again.output()])
        assert (seen, await again.wait()) == (b"last\n", Exit(9))
    finally:
        await engine.detach()
        await each.driver.destroy(plan.spec.uid, plan.folder, engine.handle)
    assert each.left(plan) == []


STARTER = """
import asyncio, dataclasses, json, os, signal, sys
from pathlib import Path
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import LayerFile, StartPlan
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.oci.runtime import Runtime
from tests.contract.driver_suite import command, spec_of

async def main():
    asked = json.loads(sys.argv[1])
    layers = tuple(LayerFile(Path(path), size, b"", 0) for path, size in asked["layers"])
    driver = OciDriver(Runtime(**asked["runtime"]), Layers(Path(asked["mounts"])), Hierarchy.probe())
    plan = StartPlan(spec_of(asked["uid"]), layers, 0, Path(asked["folder"]))
    engine = await driver.start(plan, lambda _: None)
    await engine.spawn(command(("sh", "-c", asked["script"])), main=True)
    await engine.spawn(command(("sleep", "5151")), main=False)
    print(json.dumps(dataclasses.asdict(engine.handle)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_sandbox_survives_the_sudden_death_of_its_hostd(each: OciRig) -> None:
    """Output that nobody read is there for the next hostd, the main process goes on, a dead client's does not."""
    plan = each.plan("orphan")
    asked = {
        "uid": plan.spec.uid,
        "folder": str(plan.folder),
        "mounts": str(each.around.root / "mounts"),
        "layers": [(str(layer.path), layer.size_bytes) for layer in plan.layers],
        "runtime": {name: getattr(each.runtime, name) for name in ("name", "binary", "platform", "hide")},
        "script": "seq -w 0 9999; while :; do sleep 0.1; done",
    }
    died = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", STARTER, json.dumps(asked)],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    handle = Handle(**json.loads(died.stdout))
    driver = each.reborn()
    engine = await driver.adopt(plan, handle, {1: 0, 2: 0})
    assert engine is not None
    try:
        main = engine.resume()
        assert main is not None
        wanted = b"".join(b"%04d\n" % number for number in range(10_000))
        assert await read_until(main.output(), wanted[-5:]) == wanted
        await until(lambda: not pids_of(each, plan.spec.uid, "sleep 5151"))
        await main.signal(signal.SIGTERM)
        assert await asyncio.wait_for(main.wait(), DEADLINE_S) == Exit(143, signal.SIGTERM)
    finally:
        await engine.detach()
        await driver.destroy(plan.spec.uid, plan.folder, handle)
    assert each.left(plan) == []


async def test_many_come_and_go_and_leave_nothing(each: OciRig) -> None:
    async def one(number: int) -> None:
        async with each.box(f"many{number}", sh("echo hello; exit 4")) as (_, main):
            assert b"".join([piece.data async for piece in main.output()]) == b"hello\n"
            assert await main.wait() == Exit(4)

    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for first in range(0, 12, 4):
        await asyncio.gather(*(one(first + n) for n in range(4)))
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208
