"""`make bench-abi`: what the service boundary costs, a system call at a time, on this host's kernel.

- a call that the filter of `sockets: tool` lets pass, against the same call without a filter: pread of 4 KiB with a
  bar, and getppid, which is nothing but the way into the kernel and back, as a row;
- a call that is notified and answered by another process, against the same call (connect on no descriptor) under runsc
  with the ptrace platform;
- the synchronous wake-up (Linux 6.6) against the plain one with both processes on CPUs of their own, where an idle
  kernel wakes the other one. On a busy machine it finds no idle CPU and leaves both on one, as the row without a bar
  shows: the two are then the same;
- `sockets: tool` in a clone against QEMU's user network (slirp) in the same guest (tests/bench/netpeers.py).

Each figure of a call is a process's median of 101 pieces; rounds are interleaved.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.guests import bench
from tests.bench.netpeers import Guest, Servers, slirp_guest, tool_guest
from tests.bench.netpeers import build as build_netload
from tests.bench.report import CannotMeasure, Report, Runs, interleaved, ratio, run

ROOT = Path(__file__).resolve().parents[2]
CALLS, SERVED_CALLS, RUNSC_CALLS = 200_000, 30_000, 20_000
ROUNDS = 7
DEADLINE_S = 120
WHY = {3: "the kernel has no synchronous wake-up", 4: "this machine has one CPU"}
NET_ROUNDS = 5
NET_WORK = {"up": 4 << 20, "down": 4 << 20, "ping": 200, "rate": 40}
WORDS = {
    "up": "4 MiB to the host", "down": "4 MiB from the host", "ping": "a byte there and back",
    "rate": "40 connections, one by one",
}  # fmt: skip
RUNSC = ("runsc", "--platform=ptrace", "--network=none", "--ignore-cgroups", "do")


def build(folder: Path) -> Path:
    """The program that measures. CannotMeasure without a compiler."""
    if shutil.which("gcc") is None:
        raise CannotMeasure("no gcc on this machine (deploy/install-packages.sh)")
    source, program = ROOT / "guestagent" / "src", folder / "abi"
    argv = ["gcc", "-O2", "-static", "-D_GNU_SOURCE", "-I", str(source), str(ROOT / "tests/bench/c/abi.c")]
    subprocess.run([*argv, str(source / "policy.c"), "-o", str(program)], check=True, timeout=DEADLINE_S)
    return program


def nanoseconds(*argv: str) -> float:
    """What the program printed. CannotMeasure with what it said instead."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        why = WHY.get(done.returncode, done.stderr.strip()[-200:])
        raise CannotMeasure(f"{' '.join(argv[:2])} ended with {done.returncode}: {why}")
    return float(done.stdout)


def body(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="sl-abi-") as folder:
        program = str(build(Path(folder)))

        def of(what: str, count: int, *before: str) -> Callable[[], float]:
            return lambda: nanoseconds(*before, program, what, str(count))

        kinds = {
            "pread of 4 KiB": of("read", CALLS),
            "pread of 4 KiB, filtered": of("read-filtered", CALLS),
            "getppid": of("call", CALLS),
            "getppid, filtered": of("filtered", CALLS),
            "connect, served": of("served", SERVED_CALLS),
            "connect, served by another CPU": of("served-apart", SERVED_CALLS),
            "connect, served synchronously": of("served-sync", SERVED_CALLS),
            "connect, runsc with ptrace": of("connect", RUNSC_CALLS, *RUNSC),
        }
        times = interleaved(kinds, rounds=ROUNDS, unit="ns")
        for name, runs in times.items():
            report.row(name, runs)
        passing = ratio(times["pread of 4 KiB, filtered"], times["pread of 4 KiB"])
        report.bar("a call that passes the filter", passing, at_most=1.15, peer="the same without a filter")
        served = ratio(times["connect, runsc with ptrace"], times["connect, served"])
        report.bar("a served call", served, at_least=3.0, peer="the same under runsc with ptrace")
        woken = ratio(times["connect, served by another CPU"], times["connect, served synchronously"])
        report.bar("a synchronous wake", woken, at_least=3.0, peer="the plain one, CPUs apart")
    asyncio.run(network(report))


async def network(report: Report) -> None:
    """The socket data path, beside slirp's."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="sl-abi-", dir="/var/tmp") as name:
        folder = Path(name)
        program = build_netload(folder)
        async with (
            bench() as host,
            Servers() as servers,
            slirp_guest(host, servers, folder, program) as peer,
            tool_guest(host, servers, program) as ours,
        ):
            guests: dict[str, Guest] = {"slirp": peer, "sockets: tool": ours}
            for _ in range(NET_ROUNDS):
                for what, count in NET_WORK.items():
                    for who, guest in guests.items():
                        seconds.setdefault((what, who), []).append(await guest.do(what, count))
    runs = {key: Runs(tuple(value * 1000 for value in values), "ms") for key, values in seconds.items()}
    for (what, who), one in runs.items():
        report.row(f"{WORDS[what]}, {who}", one)
    for what, words in WORDS.items():
        faster = ratio(runs[what, "slirp"], runs[what, "sockets: tool"])
        report.bar(words, faster, at_least=1.0, peer="the same guest with slirp")


if __name__ == "__main__":
    raise SystemExit(run("abi", body))
