"""Warm pools on a whole fabric with real guests: a claim at once, with an identity of its own, and nothing left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.fabric import Fabric, belongings, until

pytestmark = pytest.mark.guest
SIZES = ("--memory", "256M:1G")


def ready(fabric: Fabric, name: str = "warm") -> int:
    return int(fabric.asked("pool", "inspect", name)["ready"])


def whole(fabric: Fabric, size: int, deadline_s: float = 90.0) -> None:
    until(
        lambda: ready(fabric) == size,
        deadline_s,
        lambda: f"{fabric.asked('pool', 'inspect', 'warm')}\n{fabric.logs()}",
    )


def members(fabric: Fabric) -> list[str]:
    return sorted(folder.name for folder in (fabric.home / "run").iterdir() if folder.name.startswith("pool-"))


def seat(fabric: Fabric, name: str) -> str:
    """The member that a sandbox was claimed as, by its VMM's command line."""
    words = Path(f"/proc/{fabric.host_pid(name)}/cmdline").read_bytes().split(b"\0")
    return words[words.index(b"-name") + 1].decode().split(",")[0].removeprefix("sandloom-")


def memory_limit_mib(name: str) -> int:
    for pattern in ("*/memory.max", "*/*/memory.limit_in_bytes"):
        for path in Path("/sys/fs/cgroup").glob(f"**/{name}/{pattern.rpartition('/')[2]}"):
            return int(path.read_text()) >> 20
    raise AssertionError(f"no memory limit of {name}")


def test_a_pool_from_end_to_end(fabric: Fabric) -> None:
    fabric.ok("pool", "create", "warm", "--image", "userland", "--size", "2", *SIZES)
    whole(fabric, 2)
    assert len(members(fabric)) == 2
    reserved_mib = fabric.asked("hosts")[0]["capacity"]["memory_reserved_mib"]
    assert reserved_mib == 2 * (256 + 64)
    rows = fabric.asked("share")["sandboxes"]
    assert [row["name"] for row in rows] == ["warm", "warm"]

    taste = ("sh", "-c", 'echo "it is $TASTE"; exec sleep 100000')
    fabric.start("one", "--memory", "300M:800M", "-e", "TASTE=sweet", "--hostname", "first", command=taste)
    told = fabric.inspect("one")["status"]
    assert told["origin"] == "warm claim from pool warm"
    assert [phase["name"] for phase in told["start_phases"]] == ["resume", "agent", "workload"]
    fabric.start("two", *SIZES, command=taste)
    assert fabric.inspect("two")["status"]["origin"] == "warm claim from pool warm"
    asked = "cat /proc/sys/kernel/random/uuid /etc/machine-id; hostname"
    one, two = (fabric.ok("exec", name, "--", "sh", "-c", asked).split() for name in ("one", "two"))
    assert one[0] != two[0] and one[1] != two[1]
    assert (one[2], two[2]) == ("first", "two")
    assert [fabric.ok("logs", name) for name in ("one", "two")] == ["it is sweet\n", "it is \n"]
    assert memory_limit_mib(seat(fabric, "one")) == 800 + 256
    fabric.ok("resize", "one", "--memory", "700M", "--wait")
    whole(fabric, 2)
    events = fabric.asked("events", "--subject", "warm")
    assert {"PoolCreated", "PoolReady"} <= {event["reason"] for event in events}

    os.kill(fabric.daemon_pid("hostd"), signal.SIGKILL)
    fabric.ok("dev", "up")
    until(lambda: fabric.inspect("one")["status"]["restarts_of_host"] == 1, 30.0, fabric.logs)
    assert fabric.ok("exec", "one", "--", "hostname") == "first\n"
    whole(fabric, 2)
    claimed = {seat(fabric, "one"), seat(fabric, "two")}
    assert len(members(fabric)) == 4 and claimed <= set(members(fabric))

    fabric.ok("pool", "rm", "warm")
    until(lambda: set(members(fabric)) == claimed, 30.0, lambda: f"{members(fabric)}\n{fabric.logs()}")
    assert fabric.ok("exec", "two", "--", "hostname") == "two\n"
    assert fabric.ok("checkpoint", "two", "--name", "kept") == "kept\n"  # what was claimed can be copied as any other
    assert fabric.ok("fork", "two", "--count", "1", "--prefix", "twin") == "twin-1\n"
    assert fabric.ok("exec", "twin-1", "--", "hostname") == "twin-1\n"
    fabric.ok("rm", "-f", "one", "two", "twin-1")
    fabric.ok("image", "rm", "userland")  # the checkpoint keeps the layers that it needs
    assert fabric.ok("restore", "kept", "--name", "late") == "late\n"
    uuids = {fabric.ok("exec", "late", "--", "sh", "-c", asked).split()[0], one[0], two[0]}
    assert len(uuids) == 3
    fabric.ok("rm", "-f", "late")
    fabric.ok("checkpoint", "rm", "kept")
    until(lambda: members(fabric) == [], 30.0, lambda: f"{members(fabric)}\n{fabric.logs()}")
    until(
        lambda: not any("pool-" in process for process in belongings(fabric.home).processes), 10.0,
        lambda: str(belongings(fabric.home)),
    )  # fmt: skip


def test_a_pool_of_host_kernel_sandboxes(fabric: Fabric, userland: Path) -> None:
    """Claimed by its own class only; a killed hostd takes the claimed one over and ends what nobody claimed."""
    fabric.ok("image", "import", str(userland), "--name", "userland")  # the last test removed it
    fabric.ok("pool", "create", "plain", "--class", "host-kernel", "--image", "userland", "--size", "1", *SIZES)
    until(lambda: ready(fabric, "plain") == 1, 90.0, fabric.logs)
    fabric.start("hk", "--class", "host-kernel", *SIZES, command=("sh", "-c", "hostname; exec sleep 100000"))
    assert fabric.inspect("hk")["status"]["origin"] == "warm claim from pool plain"
    assert fabric.ok("logs", "hk") == "hk\n"
    until(lambda: ready(fabric, "plain") == 1, 90.0, fabric.logs)
    os.kill(fabric.daemon_pid("hostd"), signal.SIGKILL)
    fabric.ok("dev", "up")
    until(lambda: fabric.inspect("hk")["status"]["restarts_of_host"] == 1, 90.0, fabric.logs)
    assert fabric.ok("exec", "hk", "--", "hostname") == "hk\n"
    fabric.ok("rm", "-f", "hk")
    fabric.ok("pool", "rm", "plain")
    refused = fabric.run("pool", "create", "never", "--class", "user-kernel", "--image", "userland", "--size", "1")
    assert refused.code == 2 and "guest-kernel" in refused.err
