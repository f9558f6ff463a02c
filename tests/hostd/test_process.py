"""Processes by pid and start time: never another one's, always their end, no zombie."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.process import WatchedProcess, describe_end, is_zombie, open_same, reap, start_ticks
from tests.hostd.hostkit import until


@pytest.fixture
def child() -> Iterator[int]:
    """A child that nobody else waits for."""
    process = subprocess.Popen(["sleep", "1000"])
    process.returncode = 0
    yield process.pid
    ticks = start_ticks(process.pid)
    if ticks is not None:
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def watch(pid: int) -> WatchedProcess:
    ticks = start_ticks(pid)
    assert ticks is not None
    descriptor = open_same(pid, ticks)
    assert descriptor is not None
    return WatchedProcess(pid, descriptor)


async def test_its_end_is_told_and_it_is_reaped(child: int) -> None:
    process = watch(child)
    process.kill(signal.SIGTERM)
    assert await asyncio.wait_for(process.gone, 5) == "signal SIGTERM ended it"
    assert not exists(child)
    process.kill()  # gone: nothing happens
    process.close()
    process.close()


async def test_letting_go_leaves_it_running(child: int) -> None:
    descriptors = open_descriptors()
    watch(child).close()
    assert open_descriptors() == descriptors
    assert start_ticks(child) is not None


def test_another_one_with_the_same_pid_is_not_it(child: int) -> None:
    ticks = start_ticks(child)
    assert ticks is not None
    assert open_same(child, ticks + 1) is None
    assert open_same(2**22 - 1, ticks) is None
    assert start_ticks(2**22 - 1) is None


async def test_a_zombie_is_gone_and_can_be_reaped(child: int) -> None:
    ticks = start_ticks(child)
    assert ticks is not None
    os.kill(child, signal.SIGKILL)
    await until(lambda: is_zombie(child, ticks))
    assert start_ticks(child) is None
    assert open_same(child, ticks) is None
    reap(child)
    reap(child)  # nothing left to do
    assert not exists(child)


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (os.CLD_EXITED, 3, "it exited with status 3"),
        (os.CLD_KILLED, 9, "signal SIGKILL ended it"),
        (os.CLD_DUMPED, 40, "signal 40 ended it"),  # a real-time signal has no name
    ],
)
def test_ends_in_words(code: int, status: int, words: str) -> None:
    assert describe_end(code, status) == words
