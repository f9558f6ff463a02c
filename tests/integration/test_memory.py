"""Memory that flows, and sandboxes that are parked, on real guests, driven through the command line."""

from __future__ import annotations

import os
import signal

import pytest

from tests.integration.fabric import Fabric, alive, until

pytestmark = pytest.mark.guest

COUNTER = "import itertools, time\nfor n in itertools.count():\n    print(n, flush=True)\n    time.sleep(0.2)\n"
HOLDER = (
    "import sys, time\nkept = []\n"
    "for _ in range(24):\n    kept.append(bytearray(b'x') * (16 << 20))\n    time.sleep(0.2)\n"
    "print('held', flush=True)\ntime.sleep(2)\nkept.clear()\nprint('freed', flush=True)\ntime.sleep(100000)\n"
)


def allocated_mib(fabric: Fabric, name: str) -> int:
    return int(fabric.inspect(name)["status"].get("resize", {}).get("allocated_memory_mib", 0))


def counted(fabric: Fabric, name: str) -> list[int]:
    return [int(line) for line in fabric.ok("logs", name).split()]


def reasons(fabric: Fabric, name: str) -> list[str]:
    return [event["reason"] for event in fabric.asked("events", "--subject", name)]


def test_a_sandbox_that_uses_more_gets_more_and_gives_it_back(fabric: Fabric) -> None:
    fabric.start("grower", "--memory", "256M:1G", command=("python3", "-c", HOLDER))
    until(lambda: "freed" in fabric.ok("logs", "grower"), 180, fabric.logs)
    assert "GuestOom" not in reasons(fabric, "grower")
    assert "MemoryGrown" in reasons(fabric, "grower")
    until(lambda: allocated_mib(fabric, "grower") == 256, 120, fabric.logs)
    assert "MemoryTakenBack" in reasons(fabric, "grower")
    fabric.ok("rm", "-f", "grower")


def test_a_parked_sandbox_goes_on_where_it_was(fabric: Fabric) -> None:
    fabric.start("counter", command=("python3", "-c", COUNTER))
    until(lambda: len(counted(fabric, "counter")) > 5, 60, fabric.logs)
    pid = fabric.host_pid("counter")
    assert fabric.ok("park", "counter") == "counter\n"
    assert fabric.phase("counter") == "PARKED"
    until(lambda: not alive(pid), 60, fabric.logs)
    stood = counted(fabric, "counter")
    os.kill(fabric.daemon_pid("hostd"), signal.SIGKILL)
    fabric.ok("dev", "up")
    assert fabric.phase("counter") == "PARKED"
    assert fabric.ok("exec", "counter", "--", "hostname").strip() == "counter"
    until(lambda: len(counted(fabric, "counter")) > len(stood) + 5, 60, fabric.logs)
    numbers = counted(fabric, "counter")  # none is missing, none came twice
    assert numbers == list(range(len(numbers)))
    assert fabric.phase("counter") == "RUNNING"
    fabric.ok("rm", "-f", "counter")
