"""The host's memory broker on real guests and containers: who gets what of a budget, a resize as a contract, parking,
and what is left of it all when hostd is killed. One host and five sandboxes for everything: starting takes longest.

Sizes are small because guests run under TCG: what one uses is a file in its memory.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.integration.brokerkit import World, broker_world
from tests.integration.fabric import alive

pytestmark = pytest.mark.guest

BUDGET_MIB, RESERVE_MIB, MOST_MIB = 1100, 128, 1100 - 128 - 64
LOW_MIB, CEILING = 160, "1G"
MEMORY = f"{LOW_MIB}M:{CEILING}"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Three guests, of which two are equals but for their weights; `high` comes first."""
    with broker_world(
        reserve_mib=RESERVE_MIB,
        memory_budget_mib=BUDGET_MIB,
        memory_sense_s=0.25,
        memory_park_after_s=2.0,
        memory_evict_after_s=10.0,
        init_on_alloc="off",
    ) as running:
        running.start("light", MEMORY)
        running.start("heavy", MEMORY, "--weight", "300")
        running.start("high", MEMORY, "--priority", "5")
        yield running


def settled(world: World, *names: str) -> bool:
    """Whether they have what they were granted."""
    return all(abs(world.mib(name, "allocated") - world.mib(name, "actual")) < 4 for name in names)


def figures(text: str) -> tuple[int, int]:
    """From how many MiB to how many, as an event says."""
    found = re.search(r"(\d+) -> (\d+) MiB", text)
    assert found, text
    return int(found[1]), int(found[2])


def test_what_can_never_be_says_its_limit_and_changes_nothing(world: World) -> None:
    done = world.run("resize", "light", "--memory", f"{MOST_MIB + 50}M", "--wait", "-o", "json")
    status = json.loads(done.out)[0]["status"]["resize"]
    assert (done.code, status["state"], status["cause"]) == (1, "RESIZE_INFEASIBLE", "host-capacity"), done
    assert f"more than this host has for sandboxes at all, {MOST_MIB} MiB" in status["message"]
    assert world.mib("light", "allocated") == LOW_MIB
    above = world.run("resize", "light", "--memory", "1100M", "--wait")
    assert above.code == 1 and "ceiling of 1024 MiB" in above.err
    vcpus = world.run("resize", "light", "--cpus", "99")
    assert vcpus.code == 1 and "limit=vcpus" in vcpus.err


def test_equals_share_by_weight_and_a_deferred_resize_waits_for_its_neighbour(world: World) -> None:
    """`light` asks for more than there is, then `heavy` does: three parts of what is above the guarantees, and one."""
    done = world.run("resize", "light", "--memory", "900M", "--wait", "--timeout", "2")
    assert done.code == 1 and "deferred" in done.out, done
    world.ok("resize", "heavy", "--memory", "900M")

    def shared() -> bool:
        light, heavy = (world.mib(name, "allocated") - LOW_MIB for name in ("light", "heavy"))
        return settled(world, "light", "heavy") and light > 0 and 2.0 <= heavy / light <= 4.5

    world.until(shared, 120, "light", "heavy")
    light = world.resize("light")
    assert (light["state"], light["cause"]) == ("RESIZE_DEFERRED", "squeezed")
    assert int(light["shortfall_mib"]) > 0 and "above all guarantees" in light["message"]
    assert world.mib("high", "allocated") == LOW_MIB
    taken = world.told("light", "MemoryTakenBack")
    assert "others need it" in taken[-1] and figures(taken[-1])[1] < figures(taken[-1])[0]
    world.ok("resize", "light", "--memory", "500M")
    with subprocess.Popen(
        world.fabric.argv("resize", "light", "--memory", "500M", "--wait", "--timeout", "120"), stdout=subprocess.PIPE
    ) as waiting:
        world.until(lambda: world.mib("light", "desired") == 500 and world.resize("light")["state"] != "RESIZE_DONE")
        world.ok("resize", "heavy", "--memory", f"{LOW_MIB}M", "--wait")
        assert waiting.wait(120) == 0, world.resize("light")
    assert world.resize("light")["state"] == "RESIZE_DONE" and world.mib("light", "actual") >= 498
    assert "ResizeDeferred" in [kind for kind, _ in world.events("light")]


def test_who_comes_first_is_served_by_the_others_and_no_minimum_is_touched(world: World) -> None:
    """`light` holds what it desires and does not use; `high`, of a higher priority, asks for all that there is."""
    before = len(world.told("light", "MemoryTakenBack"))
    assert world.mib("light", "allocated") >= 498
    world.ok("resize", "high", "--memory", f"{MOST_MIB}M")
    world.until(lambda: world.mib("light", "allocated") <= LOW_MIB + 2, 120, "light", "high")
    world.until(lambda: settled(world, "light", "heavy", "high"), 120, "light", "high")
    assert len(world.told("light", "MemoryTakenBack")) > before
    assert all(world.mib(name, "actual") >= LOW_MIB for name in ("light", "heavy", "high"))
    high = world.resize("high")
    assert (high["state"], high["cause"]) == ("RESIZE_DEFERRED", "host-room")
    assert int(high["allocated_memory_mib"]) > 500
    world.ok("resize", "high", "--memory", f"{LOW_MIB}M", "--wait")
    assert world.told("light", "GuestOom") == []


def test_a_guest_that_needs_more_grows_and_a_killed_hostd_lets_its_shrink_go_on(world: World) -> None:
    """A resize is under way when hostd is killed: the next one holds the same contract, and ends it."""
    world.ok("resize", "light", "--memory", "300M", "--wait")
    world.hold("light", 110)
    world.ok("resize", "light", "--memory", f"{LOW_MIB}M")
    world.until(lambda: world.mib("light", "desired") == LOW_MIB and world.mib("light", "actual") < 290, 60, "light")
    before = world.resize("light")
    pid = int(world.status("light")["host_pid"])
    world.kill_hostd()
    world.restart_hostd()
    world.until(lambda: int(world.status("light")["restarts_of_host"]) == 1, 60, "light")
    after = world.status("light")
    assert (int(after["host_pid"]), after["phase"]) == (pid, "RUNNING")
    assert int(after["resize"]["desired_memory_mib"]) == LOW_MIB
    if before["state"] == "RESIZE_IN_PROGRESS":
        assert after["resize"]["deadline"] == before["deadline"]
    assert world.mib("light", "actual") > LOW_MIB  # what it uses is not taken
    world.free("light")
    world.until(lambda: world.mib("light", "actual") == LOW_MIB, 120, "light")
    assert world.resize("light")["state"] == "RESIZE_DONE"
    assert world.told("light", "GuestOom") == []


def test_containers_are_under_the_same_broker(world: World) -> None:
    """cgroup limits move as guests' memory does; one class can be parked, the other says which can."""
    world.ok("rm", "-f", "heavy")
    world.start("sentry", "64M:400M", "--class", "user-kernel", "--priority", "1")
    world.start("plain", "64M:400M", "--class", "host-kernel", "--priority", "1")
    for name in ("sentry", "plain"):
        world.ok("resize", name, "--memory", "200M", "--wait")
        assert world.mib(name, "actual") == 200
    world.ok("resize", "plain", "--memory", "64M", "--wait")
    world.hold("plain", 50, "/dev/shm/held")  # more than its headroom allows: it grows by itself
    world.until(lambda: world.mib("plain", "allocated") > 64 and settled(world, "plain"), 60, "plain")
    assert figures(world.told("plain", "MemoryGrown")[-1])[1] > 64
    world.free("plain", "/dev/shm/held")
    refused = world.run("park", "plain")
    assert refused.code == 1 and "class host-kernel has no checkpoints" in refused.err
    assert "user-kernel" in refused.err and "guest-kernel" in refused.err
    world.ok("park", "sentry")
    assert world.phase("sentry") == "PARKED"
    assert world.ok("exec", "sentry", "--", "hostname").strip() == "sentry"
    assert world.phase("sentry") == "RUNNING" and world.mib("sentry", "allocated") >= 64


def test_a_short_host_parks_the_lowest_which_outlives_hostd_and_comes_back_when_asked(world: World) -> None:
    """Something else takes the memory: nothing is admitted, `light` (the lowest) is parked, and nobody else."""
    pid = int(world.status("light")["host_pid"])
    with world.hog_all_but(45):
        world.until(lambda: world.phase("light") == "PARKED", 120, "light")
        (told,) = world.told("light", "Parked")
        assert re.search(r"short for \d+ s \(\d+ of 1100 MiB available", told) and "priority 0" in told, told
        assert "MiB on disk" in told
        world.until(lambda: not alive(pid), 60)
        world.until(lambda: "AdmissionClosed" in [kind for kind, _ in world.events("h1")], 60)
        assert {world.phase(name) for name in ("high", "plain")} == {"RUNNING"}
        world.kill_hostd()
    world.restart_hostd()
    assert world.phase("light") == "PARKED"
    assert world.ok("exec", "light", "--", "hostname").strip() == "light"
    assert world.phase("light") == "RUNNING" and world.mib("light", "actual") >= LOW_MIB
    assert len(list((world.host.home / "state" / "store").glob("pins/checkpoint*"))) == 0
    world.until(lambda: "AdmissionOpen" in [kind for kind, _ in world.events("h1")], 60)


def test_a_guest_that_does_not_follow_is_marked_and_counts_with_its_maximum(world: World) -> None:
    """Its virtual machine stands still from outside, so it gives nothing back; it is forgiven once it has."""
    world.ok("resize", "high", "--memory", "400M", "--wait")
    world.kill_hostd()
    world.restart_hostd(memory_follow_s=3.0)
    world.until(lambda: world.asked("hosts")[0]["capacity"]["memory_reserved_mib"] > 0, 60)
    reserved = world.asked("hosts")[0]["capacity"]["memory_reserved_mib"]
    pid = int(world.status("high")["host_pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        world.ok("resize", "high", "--memory", f"{LOW_MIB}M")
        world.until(lambda: bool(world.status("high").get("uncooperative")), 120, "high")
        (told,) = world.told("high", "Uncooperative")
        assert "it counts with its maximum of 1024 MiB" in told and f"asked to go down to {LOW_MIB}" in told
        assert "uncooperative" in world.ok("ps", "-o", "wide")
        world.until(lambda: world.asked("hosts")[0]["capacity"]["memory_reserved_mib"] == reserved + 1024 - LOW_MIB, 60)
    finally:
        os.kill(pid, signal.SIGCONT)
    world.until(lambda: not world.status("high").get("uncooperative"), 120, "high")
    assert world.told("high", "Cooperative") and world.phase("high") == "RUNNING"


def test_the_lowest_is_evicted_with_its_reason_where_nothing_can_be_parked(world: World) -> None:
    world.ok("rm", "-f", "light", "high", "sentry")
    world.until(lambda: len(world.asked("ps", "-a")) == 1)
    with world.hog_all_but(45):
        world.until(lambda: world.phase("plain") == "FAILED", 120, "plain")
    status = world.status("plain")
    assert status["reason"] == "Evicted" and "none can be parked (class host-kernel has no" in status["message"]
    assert re.search(r"short for \d+ s \(\d+ of 1100 MiB available", status["message"])
