"""Checkpoints, restores and forks on a whole fabric with real guests, through a killed hostd, to nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.fabric import Fabric, until

pytestmark = pytest.mark.guest
SIZES = ("--memory", "256M:768M")
COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.5; done"
FILL = "for i in 1 2 3 4 5 6; do cat $(readlink -f $(command -v python3)); done > /dev/shm/much; echo mine > /mark"
ASK = "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid"


def numbers(fabric: Fabric, name: str) -> list[int]:
    return [int(line) for line in fabric.ok("logs", name).split()]


def counts_on(fabric: Fabric, name: str) -> list[int]:
    """Waits for two more numbers; all of them, which must follow each other."""
    begin = len(numbers(fabric, name))
    until(lambda: len(numbers(fabric, name)) >= begin + 2, 60.0, fabric.logs)
    found = numbers(fabric, name)
    assert found == list(range(found[0], found[0] + len(found)))
    return found


def listed(fabric: Fabric) -> list[str]:
    """Those that somebody keeps; a fork's goes by itself after a while."""
    return [str(row["name"]) for row in fabric.asked("checkpoint", "ls") if not row["ephemeral"]]


def blobs(fabric: Fabric) -> list[Path]:
    """Records of checkpoints in the host's store."""
    records = fabric.home.glob("**/objects/*/*/meta.json")
    return [path for path in records if json.loads(path.read_text())["kind"] == "checkpoint"]


def until_kept_is_listed(fabric: Fabric) -> None:
    """A fork's checkpoint goes by itself, and may do so between the two looks; what is left behind would stay."""
    until(lambda: len(blobs(fabric)) == len(fabric.asked("checkpoint", "ls")), 60.0, fabric.logs)


@contextlib.contextmanager
def typing(fabric: Fabric, *arguments: str) -> Iterator[None]:
    """A client that keeps a session open."""
    client = subprocess.Popen(
        fabric.argv(*arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(b"here\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"here\n"
        yield
    finally:
        client.communicate()


def test_forks_from_end_to_end(fabric: Fabric) -> None:
    fabric.start("src", *SIZES, command=("sh", "-c", COUNT))
    counts_on(fabric, "src")
    fabric.ok("exec", "src", "--", "sh", "-c", FILL)
    done = fabric.run("fork", "src", "--count", "3", "--prefix", "twin")
    assert (done.code, done.out) == (0, "twin-1\ntwin-2\ntwin-3\n"), f"{done}\n{fabric.logs()}"
    assert "src stood still for" in done.err
    twins = done.out.split()
    source = counts_on(fabric, "src")
    assert source[0] == 1
    for name in twins:
        assert 1 < counts_on(fabric, name)[0] <= source[-1]
    told = [fabric.ok("exec", name, "--", "sh", "-c", ASK).split() for name in ("src", *twins)]
    assert [lines[0] for lines in told] == ["src", *twins]
    assert len({lines[1] for lines in told}) == len({lines[2] for lines in told}) == 4
    status = fabric.inspect("twin-1")["status"]
    assert status["origin"].startswith("restored from checkpoint ")
    assert [phase["name"] for phase in status["start_phases"]] == ["vmm", "restore", "answer", "renew"]
    for name in twins:  # what a fork has not touched is in nobody's page tables
        fabric.ok("exec", name, "--", "cp", "/dev/shm/much", "/dev/null")
    rows = {row["name"]: row for row in fabric.asked("share")["sandboxes"]}
    shared = {name: sum(int(part["bytes"]) for part in rows[name]["shared"] if part["holders"] >= 3) for name in twins}
    assert all(size_bytes > 30_000_000 for size_bytes in shared.values()), shared
    fabric.ok("exec", "twin-1", "--", "sh", "-c", "echo other > /mark")
    assert [fabric.ok("exec", name, "--", "cat", "/mark") for name in ("src", *twins)] == [
        "mine\n", "other\n", "mine\n", "mine\n",
    ]  # fmt: skip
    fabric.ok("rm", "-f", *twins)


def test_what_cannot_be_carried_is_refused_by_name(fabric: Fabric) -> None:
    with typing(fabric, "exec", "-i", "src", "--", "cat"):
        refused = fabric.run("checkpoint", "src")
    assert refused.code == 1 and "exec of cat with standard input" in refused.err
    missing = fabric.run("checkpoint", "nobody")
    assert missing.code == 1 and "nobody" in missing.err


def test_checkpoints_outlive_a_hostd_that_is_killed_while_it_takes_one(fabric: Fabric) -> None:
    assert fabric.ok("checkpoint", "src", "--name", "warm") == "warm\n"
    again = fabric.run("checkpoint", "src", "--name", "warm")
    assert again.code == 1 and "choose another name" in again.err
    with subprocess.Popen(fabric.argv("checkpoint", "src", "--name", "torn"), stderr=subprocess.DEVNULL) as client:
        hostd = fabric.daemon_pid("hostd")
        until(lambda: copying(hostd) or client.poll() is not None, 30.0)
        os.kill(hostd, signal.SIGKILL)
        client.wait(120)
    fabric.ok("dev", "up")
    until(lambda: fabric.inspect("src")["status"]["restarts_of_host"] == 1, 60.0, fabric.logs)
    counts_on(fabric, "src")
    assert {"warm"} <= set(listed(fabric)) <= {"warm", "torn"}  # whole when the copy was quicker than the kill
    until_kept_is_listed(fabric)
    fabric.ok("checkpoint", "rm", "-f", "torn")


def test_a_checkpoint_outlives_its_source_and_is_outlived(fabric: Fabric) -> None:
    last = numbers(fabric, "src")[-1]
    fabric.ok("rm", "-f", "src")
    assert fabric.ok("restore", "warm", "--name", "late") == "late\n"
    assert 1 < counts_on(fabric, "late")[0] < last
    assert fabric.ok("exec", "late", "--", "cat", "/mark") == "mine\n"
    fabric.ok("checkpoint", "rm", "warm")
    assert listed(fabric) == []
    until_kept_is_listed(fabric)
    counts_on(fabric, "late")
    gone = fabric.run("restore", "warm")
    assert gone.code == 1 and "no checkpoint warm" in gone.err and "sandloom checkpoint ls" in gone.err


def copying(hostd: int) -> bool:
    """Whether a guest is being copied: the file for its state is open in hostd."""
    for entry in Path(f"/proc/{hostd}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "sandloom-state" in str(entry.readlink()):
                return True
    return False


def test_a_user_kernel_sandbox_forks_and_is_restored_and_a_host_kernel_one_says_who_can(fabric: Fabric) -> None:
    fabric.start("sentry", "--class", "user-kernel", *SIZES, command=("sh", "-c", COUNT))
    counts_on(fabric, "sentry")
    fabric.ok("exec", "sentry", "--", "sh", "-c", "echo mine > /mark")
    done = fabric.run("fork", "sentry", "--count", "2", "--prefix", "copy")
    assert (done.code, done.out) == (0, "copy-1\ncopy-2\n"), f"{done}\n{fabric.logs()}"
    fabric.ok("checkpoint", "sentry", "--name", "kept")
    fabric.ok("stop", "sentry")
    fabric.ok("restore", "kept", "--name", "later")
    ids = set()
    for name in ("copy-1", "copy-2", "later"):
        assert counts_on(fabric, name)[0] > 1
        mark, machine = fabric.ok("exec", name, "--", "cat", "/mark", "/etc/machine-id").split()
        assert mark == "mine"
        ids.add(machine)
        status = fabric.inspect(name)["status"]
        assert (status["accel"].partition("/")[0], status["origin"].split()[0]) == ("runsc", "restored")
    assert len(ids) == 3
    fabric.start("plain", "--class", "host-kernel", "--network", "veth", *SIZES, command=("sleep", "1000"))
    assert fabric.inspect("plain")["status"]["address"].startswith("10.213.")
    assert "eth0" in fabric.ok("exec", "plain", "--", "cat", "/proc/net/dev")
    refused = fabric.run("checkpoint", "plain", "--name", "never")
    assert refused.code != 0
    assert "classes that have it: guest-kernel, user-kernel" in refused.err
    for name in ("sentry", "copy-1", "copy-2", "later", "plain"):
        fabric.ok("rm", "-f", name)
    fabric.ok("checkpoint", "rm", "kept")
