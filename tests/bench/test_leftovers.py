"""Nothing that a benchmark started outlives it, whichever signal ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostd.cgroups import Hierarchy
from tests.bench import leftovers
from tests.guestagent.guests import why_no_guests

DEADLINE_S = 150.0
SOFTLY = """
import asyncio, sys
from tests.bench.report import run
async def measure():
    try:
        print("begun", flush=True)
        await asyncio.sleep(1000)
    finally:
        await asyncio.sleep(0.01)
        print("closed", flush=True)
def plainly(report):
    import time
    try:
        print("begun", flush=True)
        time.sleep(1000)
    finally:
        print("closed", flush=True)
body = plainly if sys.argv[1] == "plainly" else lambda report: asyncio.run(measure())
raise SystemExit(run("demo", body))
"""
GUEST = """
import asyncio
from tests.bench import guests
from tests.bench.report import run
async def measure():
    async with guests.bench() as host:
        plan = host.plan()
        print(host.folder, flush=True)
        await host.driver().start(plan, lambda handle: print(handle.pid, flush=True))
        await asyncio.sleep(1000)
raise SystemExit(run("demo", lambda report: asyncio.run(measure())))
"""


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("how", ["plainly", "in a loop"])
@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_closes_what_a_benchmark_has_open(how: str, signo: signal.Signals) -> None:
    with started(SOFTLY, how) as process:
        assert line(process) == "begun"
        process.send_signal(signo)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (out, process.returncode) == ("closed\n", 128 + signo), err
        assert f"ended by {signo.name}" in err and "Traceback" not in err


def test_names_tell_whose_they_are() -> None:
    names = ["bench-12-3", "bench-12-claim4", "bench-7-1", "bench-x-1", "sl-bench-7-abc", "pool-7-1"]
    assert leftovers.of_process(names, 12) == ["bench-12-3", "bench-12-claim4"]
    assert leftovers.of_the_dead(names, lambda pid: pid == 12) == ["bench-7-1", "sl-bench-7-abc"]


@pytest.mark.guest
@pytest.mark.skipif(bool(why_no_guests()), reason=why_no_guests())
@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL])
def test_no_guest_outlives_its_benchmark(signo: signal.Signals) -> None:
    """What was killed outright cannot clean up: the next benchmark does."""
    cgroups = Hierarchy.probe()
    with started(GUEST) as process:
        folder, guest = Path(line(process)), int(line(process))
        mine = leftovers.of_process(cgroups.names(leftovers.PREFIX), process.pid)
        assert len(mine) == 1 and folder.is_dir()
        process.send_signal(signo)
        process.communicate(timeout=DEADLINE_S)
    if signo is signal.SIGKILL:
        assert set(leftovers.sweep(cgroups)) >= {*mine, folder.name}
    give_up = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{guest}").exists() and time.monotonic() < give_up:
        time.sleep(0.05)  # until its parent has reaped it
    assert not Path(f"/proc/{guest}").exists()
    assert not folder.exists()
    assert leftovers.of_process(cgroups.names(leftovers.PREFIX), process.pid) == []
