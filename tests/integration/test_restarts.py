"""What survives what: hostd and the control plane are killed while sandboxes run."""

from __future__ import annotations

import os
import signal

import pytest

from tests.integration.fabric import Fabric, alive, until

pytestmark = pytest.mark.guest

COUNT = ("sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done")


def kill_daemon(fabric: Fabric, name: str) -> None:
    pid = fabric.daemon_pid(name)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), 10)


def test_hostd_killed_its_sandboxes_run_on_and_are_taken_over(fabric: Fabric) -> None:
    fabric.start("counts", command=COUNT)
    pid = fabric.host_pid("counts")
    kill_daemon(fabric, "hostd")
    assert alive(pid)
    fabric.ok("dev", "up")  # repairs what is missing
    until(lambda: fabric.inspect("counts")["status"]["restarts_of_host"] == 1, 60, fabric.logs)
    assert fabric.host_pid("counts") == pid
    assert fabric.ok("exec", "counts", "--", "echo", "alive") == "alive\n"
    fabric.ok("stop", "-t", "0", "counts")
    fabric.wait_phase("counts", "EXITED")
    lines = fabric.ok("logs", "counts").split()
    start = int(lines[0])
    assert lines == [str(start + i) for i in range(len(lines))]  # no line lost, none twice
    fabric.ok("rm", "counts")


def test_the_control_plane_killed_nothing_on_the_host_notices(fabric: Fabric) -> None:
    fabric.start("steady")
    pid = fabric.host_pid("steady")
    kill_daemon(fabric, "controlplane")
    assert alive(pid)
    fabric.ok("dev", "up")
    assert fabric.inspect("steady")["status"]["phase"] == "RUNNING"
    until(lambda: fabric.run("exec", "steady", "--", "true").code == 0, 60, fabric.logs)
    fabric.ok("rm", "-f", "steady")


def test_a_vmm_that_ended_while_hostd_was_away_is_found_out(fabric: Fabric) -> None:
    fabric.start("gone")
    pid = fabric.host_pid("gone")
    kill_daemon(fabric, "hostd")
    os.kill(pid, signal.SIGKILL)
    fabric.ok("dev", "up")
    status = fabric.wait_phase("gone", "FAILED", deadline_s=60)["status"]
    assert status["reason"] == "VmmExited"
    fabric.ok("rm", "gone")
