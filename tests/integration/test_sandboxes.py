"""Sandboxes as a user meets them, on real guests, through the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest

from tests.integration.fabric import Fabric, alive, until

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def box(fabric: Fabric) -> str:
    """A sandbox that several tests use."""
    fabric.start("box", "--memory", "256M:1G", "--env", "COLOUR=blue", "--workdir", "/usr")
    return "box"


def test_run_passes_output_and_exit_code_on(fabric: Fabric) -> None:
    done = fabric.run("run", "--rm", "--name", "once", "userland", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n")
    assert fabric.run("inspect", "once").code == 1  # --rm: no record is left


def test_run_of_what_is_not_there_is_127(fabric: Fabric) -> None:
    done = fabric.run("run", "--rm", "userland", "--", "no-such-program")
    assert done.code == 127
    assert "no-such-program" in done.err


def test_run_of_what_cannot_be_run_is_126(fabric: Fabric) -> None:
    assert fabric.run("run", "--rm", "userland", "--", "/etc/passwd").code == 126


def test_a_missing_image_is_125_and_says_what_to_do(fabric: Fabric) -> None:
    done = fabric.run("run", "no-such-image", "--", "true")
    assert done.code == 125
    assert "no-such-image" in done.err
    assert "import" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_run_is_a_filter_with_stdin(fabric: Fabric) -> None:
    data = bytes(range(256)) * 4096  # 1 MiB of all bytes
    done = subprocess.run(
        fabric.argv("run", "--rm", "-i", "userland", "--", "sha256sum"), input=data, capture_output=True, timeout=200
    )
    expected = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True).stdout
    assert done.stdout == expected
    assert done.returncode == 0


def test_exec_sees_env_workdir_and_user(fabric: Fabric, box: str) -> None:
    assert fabric.ok("exec", box, "--", "sh", "-c", "echo $COLOUR $PWD $(id -u) $(hostname)") == "blue /usr 0 box\n"
    said = fabric.ok(
        "exec", "--user", "nobody", "--workdir", "/tmp", "--env", "A=b", box, "--", "sh", "-c", "id -un; pwd; echo $A"
    )
    assert said == "nobody\n/tmp\nb\n"


def test_exec_runs_real_software(fabric: Fabric, box: str) -> None:
    said = fabric.ok(
        "exec", box, "--", "python3", "-c", "import json, sys; print(json.dumps([sys.version_info[0], 6 * 7]))"
    )
    assert said == "[3, 42]\n"


def test_exec_output_keeps_order_and_bytes(fabric: Fabric, box: str) -> None:
    """20 MB through the agent's window, byte for byte."""
    done = subprocess.run(fabric.argv("exec", box, "--", "seq", "1", "2500000"), capture_output=True, timeout=200)
    assert done.returncode == 0
    assert done.stdout == subprocess.run(["seq", "1", "2500000"], capture_output=True, check=True).stdout


def test_exec_of_a_killed_process(fabric: Fabric, box: str) -> None:
    assert fabric.run("exec", box, "--", "sh", "-c", "kill -TERM $$").code == 128 + signal.SIGTERM


def test_exec_with_a_terminal(fabric: Fabric, box: str) -> None:
    """Under script(1), which gives the command a terminal as a user's shell does."""
    command = " ".join(fabric.argv("exec", "-it", box, "--", "sh", "-c", "'tty; stty size; exit 5'"))
    done = subprocess.run(
        ["script", "-qec", f"stty rows 33 cols 101; {command}", "/dev/null"], capture_output=True, timeout=100
    )
    assert done.returncode == 5, done
    assert b"/dev/pts/" in done.stdout
    assert b"33 101" in done.stdout


def test_a_workload_has_no_way_to_the_layers_devices(fabric: Fabric, box: str) -> None:
    done = fabric.run("exec", box, "--", "sh", "-c", "ls /dev; mknod /tmp/pmem b 259 0")
    assert done.code != 0
    assert "pmem" not in done.out
    assert "not permitted" in done.err


def test_logs_hold_what_was_printed(fabric: Fabric) -> None:
    fabric.ok(
        "run",
        "-d",
        "--name",
        "talker",
        "userland",
        "--",
        "sh",
        "-c",
        "for i in 1 2 3; do echo line $i; done; echo e >&2",
    )
    fabric.wait_phase("talker", "EXITED")
    done = fabric.run("logs", "talker")
    assert (done.code, done.out, done.err) == (0, "line 1\nline 2\nline 3\n", "e\n")
    assert fabric.ok("logs", "--tail", "1", "talker") in ("line 3\n", "")  # the last line may be the error stream's
    fabric.ok("rm", "talker")


def test_logs_follow_until_the_end(fabric: Fabric) -> None:
    fabric.start("counter", command=("sh", "-c", "for i in $(seq 1 20); do echo $i; sleep 0.1; done"))
    followed = fabric.run("logs", "-f", "counter")
    assert followed.out.split() == [str(i) for i in range(1, 21)]
    fabric.ok("rm", "-f", "counter")


def test_stop_sends_term_and_takes_the_exit_code(fabric: Fabric) -> None:
    fabric.start("polite", command=("sh", "-c", "trap 'echo bye; exit 3' TERM; while :; do sleep 0.1; done"))
    fabric.ok("stop", "polite")
    status = fabric.wait_phase("polite", "EXITED")["status"]
    assert (status["exit_code"], fabric.ok("logs", "polite")) == (3, "bye\n")
    fabric.ok("rm", "polite")


def test_stop_kills_what_does_not_listen(fabric: Fabric) -> None:
    fabric.start("deaf", command=("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"))
    fabric.ok("stop", "-t", "1", "deaf")
    assert fabric.wait_phase("deaf", "EXITED")["status"]["exit_code"] == 137
    fabric.ok("rm", "deaf")


def test_ps_and_names(fabric: Fabric, box: str) -> None:
    assert box in fabric.ok("ps", "-o", "name").split()
    table = fabric.ok("ps")
    assert re.search(rf"^{box}\s", table, re.M)
    row = next(row for row in fabric.asked("ps") if row["name"] == box)
    assert row["status"]["phase"] == "RUNNING"


def test_rm_of_a_running_one_needs_force(fabric: Fabric) -> None:
    fabric.start("stays")
    done = fabric.run("rm", "stays")
    assert done.code == 1
    assert "-f" in done.err or "--force" in done.err
    pid = fabric.host_pid("stays")
    fabric.ok("rm", "-f", "stays")
    until(lambda: not alive(pid), 20)
    until(lambda: "stays" not in fabric.ok("ps", "-a", "-o", "name").split(), 20)


def test_resize_grows_and_shrinks_what_the_guest_has(fabric: Fabric) -> None:
    fabric.start("elastic", "--memory", "256M:1G")

    def guest_mib() -> int:
        """What it can use: the balloon's pages are still counted in MemTotal, as huge pages that nobody has."""
        seen = fabric.ok("exec", "elastic", "--", "grep", "-E", "^(MemTotal|Hugetlb):", "/proc/meminfo").split()
        return (int(seen[1]) - int(seen[4])) >> 10

    small = guest_mib()
    fabric.ok("resize", "elastic", "--memory", "896M", "--wait")
    grown = guest_mib()
    assert 600 <= grown - small <= 680, (small, grown)
    resize = fabric.inspect("elastic")["status"]["resize"]
    assert (resize["state"], resize["desired_memory_mib"]) == ("RESIZE_DONE", 896)
    fabric.ok("resize", "elastic", "--memory", "300M", "--wait")
    assert guest_mib() <= small + 60
    done = fabric.run("resize", "elastic", "--memory", "2G", "--wait")
    assert done.code == 1
    assert "1024" in done.err or "1G" in done.err
    fabric.ok("rm", "-f", "elastic")


def test_a_killed_vmm_ends_its_sandbox_within_a_second(fabric: Fabric, box: str) -> None:
    fabric.start("victim")
    watch = subprocess.Popen(fabric.argv("wait", "victim"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = fabric.host_pid("victim")
    killed_s = time.time()
    os.kill(pid, signal.SIGKILL)
    status = fabric.wait_phase("victim", "FAILED", deadline_s=20)["status"]
    watch.communicate(timeout=20)
    assert status["reason"] == "VmmExited"
    finished = fabric.inspect("victim")["status"]["finished_at"]
    assert finished
    ended_s = float(
        subprocess.run(["date", "-d", finished, "+%s.%N"], capture_output=True, text=True, check=True).stdout
    )
    assert ended_s - killed_s < 1.0
    assert fabric.phase(box) == "RUNNING"  # no other one is touched
    fabric.ok("rm", "victim")


def test_eight_started_at_once_all_come_up(fabric: Fabric) -> None:
    names = [f"many-{i}" for i in range(8)]
    runs = [
        subprocess.Popen(
            fabric.argv("run", "--rm", "--name", name, "userland", "--", "hostname"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in names
    ]
    said = [run.communicate(timeout=280) for run in runs]
    assert [(run.returncode, out, err) for run, (out, err) in zip(runs, said, strict=True)] == [
        (0, f"{name}\n".encode(), b"") for name in names
    ]


def test_more_than_the_host_has_is_refused_with_numbers(fabric: Fabric) -> None:
    done = fabric.run("run", "--rm", "--memory", "900G", "userland", "--", "true")
    assert done.code == 125
    assert re.search(r"921600", done.err), done.err  # 900 GiB in MiB: what was asked
    assert len(re.findall(r"\d+ MiB", done.err)) >= 2, done.err  # and what there is


def test_an_image_in_use_is_not_removed(fabric: Fabric, box: str) -> None:
    done = fabric.run("image", "rm", "userland")
    assert done.code == 1
    assert box in done.err  # who still uses it


def test_events_tell_what_happened(fabric: Fabric, box: str) -> None:
    events = fabric.asked("events", "--subject", box)
    assert "Started" in [event["reason"] for event in events]
