"""Command lines and words of the two runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.drivers.contract import Exit
from hostd.drivers.oci.engine import told_by_runsc
from hostd.drivers.oci.memory import SLACK_BYTES, next_limit, parse_signals, parse_stat
from hostd.drivers.oci.plan import limits_for, upper_mib
from hostd.drivers.oci.probe import candidates
from hostd.drivers.oci.regions import kind_of
from hostd.drivers.oci.runtime import Runtime, exit_code_of, last_words
from hostd.spec import Resources

FOLDER = Path("/run/box")
CRUN = Runtime("crun", "/usr/bin/crun")
RUNSC = Runtime("runsc", "/usr/bin/runsc", platform="ptrace")
MIB = 1 << 20


def test_crun_gets_the_init_s_descriptors_and_makes_no_cgroup() -> None:
    argv = CRUN.run_argv(FOLDER, "box", 1, tty=False)
    assert argv[0] == "/usr/bin/crun"
    assert "--cgroup-manager=disabled" in argv
    assert argv[argv.index("--preserve-fds") + 1] == "2"
    assert argv[argv.index("--pid-file") + 1] == "/run/box/1.pid"
    assert argv[-1] == "box"
    assert "--console-socket" not in argv


def test_runsc_has_a_platform_and_no_init() -> None:
    argv = RUNSC.run_argv(FOLDER, "box", 1, tty=True)
    assert "--platform=ptrace" in argv
    assert "--network=none" in argv
    assert "--preserve-fds" not in argv
    assert argv[argv.index("--console-socket") + 1] == "/run/box/1.tty"
    assert (RUNSC.init, RUNSC.accel, CRUN.accel) == ((), "runsc/ptrace", "crun")


def test_an_exec_reads_its_process_from_a_file() -> None:
    argv = RUNSC.exec_argv(FOLDER, "box", 7, tty=False)
    assert argv[argv.index("--process") + 1] == "/run/box/7.json"
    assert argv[argv.index("--internal-pid-file") + 1] == "/run/box/7.inside"
    assert "--internal-pid-file" not in CRUN.exec_argv(FOLDER, "box", 7, tty=False)


def test_a_signal_goes_to_main_or_to_one_inside() -> None:
    assert RUNSC.kill_argv(FOLDER, "box", 15, None)[-3:] == ["kill", "box", "15"]
    assert RUNSC.kill_argv(FOLDER, "box", 9, 4)[-5:] == ["kill", "--pid", "4", "box", "9"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("executable file `nope` not found in $PATH: No such file or directory", 127),
        (
            'executing command "x" in sandbox: error finding executable "x" in PATH [/bin]: no such file or directory',
            127,
        ),
        ("creating process: failed to load /nope: no such file or directory", 127),
        ("creating process: failed to load /etc: permission denied", 126),
        ("open executable: Operation not permitted", 126),
        ("chdir `/nodir`: No such file or directory", 126),
        ('failed to find initial working directory "/nodir": no such file or directory', 126),
        ("exec /x: Exec format error", 126),
        ("error setting up the rootfs: no space left on device", None),
    ],
)
def test_whose_fault_it_was(words: str, code: int | None) -> None:
    assert exit_code_of(words) == code


def test_the_last_error_of_a_log_without_newlines() -> None:
    log = '{"msg":"first","level":"error"}{"msg":"a warning","level":"warning"}{"msg":"last","level":"error"}'
    assert last_words(log) == "last"
    assert last_words("no json\n") == ""
    assert last_words('["level"]') == ""


def test_what_runsc_s_status_means() -> None:
    assert told_by_runsc(Exit(3), main_ended=False) == Exit(3)
    assert told_by_runsc(Exit(143), main_ended=False) == Exit(143, 15)
    assert told_by_runsc(Exit(128), main_ended=False) == Exit(128)
    assert told_by_runsc(Exit(128), main_ended=True) == Exit(137, 9)
    assert told_by_runsc(Exit(255), main_ended=True) == Exit(255)


def test_what_is_tried_first() -> None:
    assert [one.platform for one in candidates("runsc", "runsc", hybrid=True)] == ["systrap", "kvm", "ptrace"]
    assert [one.hide for one in candidates("crun", "crun", hybrid=False)] == [""]
    assert [one.hide for one in candidates("crun", "crun", hybrid=True)] == ["", "/sys/fs/cgroup/unified"]


def test_limits_have_room_for_what_runs_the_sandbox() -> None:
    resources = Resources(64, 512, 100, 1500)
    assert limits_for(resources, CRUN).memory_bytes == 108 * MIB
    assert limits_for(resources, RUNSC).memory_bytes == 164 * MIB
    assert limits_for(resources, RUNSC).cpu_milli == 1500
    assert (upper_mib(resources), upper_mib(Resources(8, 8, 8, 1))) == (50, 16)


def test_a_shrinking_limit_never_goes_below_what_is_used() -> None:
    assert next_limit(100 * MIB, 200 * MIB, 30 * MIB) == 100 * MIB
    assert next_limit(100 * MIB, 300 * MIB, 150 * MIB) == 150 * MIB + SLACK_BYTES
    assert next_limit(100 * MIB, 200 * MIB, 300 * MIB) == 200 * MIB  # and never up
    assert next_limit(24 * MIB, 64 * MIB, 2 * MIB) == 24 * MIB  # what is reached needs no slack
    assert next_limit(300 * MIB, 200 * MIB, 250 * MIB) == 300 * MIB


def test_a_cgroup_s_signals() -> None:
    stat = "anon 5\nactive_anon 3145728\ninactive_file 1048576\nworkingset_refault_file 7\nworkingset_refault_anon 2\n"
    pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n"
    told = parse_signals(stat, "low 0\noom 3\noom_kill 2\n", pressure, 2)
    assert (told.psi_some_us, told.psi_full_us, told.refaults, told.oom_kills) == (12, 5, 9, 2)
    assert (told.active_mib, told.inactive_mib) == (3, 1)
    old = parse_signals("active_anon 1\ntotal_active_anon 2097152\n", "under_oom 0\noom_kill 4\n", "", 1)
    assert (old.active_mib, old.oom_kills, old.psi_some_us) == (2, 4, 0)


def test_cached_files_are_counted_per_version() -> None:
    assert parse_stat("anon 5\nactive_file 30\ninactive_file 12\nshmem 9\n", 2) == 42
    assert parse_stat("active_file 1\ninactive_file 1\ntotal_active_file 30\ntotal_inactive_file 12\n", 1) == 42


@pytest.mark.parametrize(
    ("path", "runs_it", "kind"),
    [
        ("/memfd:runsc-memory (deleted)", True, "ram"),
        ("/usr/bin/runsc", True, "vmm"),
        ("[heap]", True, "vmm"),
        ("[heap]", False, "ram"),
        ("", False, "ram"),
        ("/bin/busybox", False, "layer"),
        ("/lib/libc.so.6", True, "layer"),
        ("/usr/lib/sandloom/sandloom-monitor", True, "vmm"),
        ("/memfd:mine (deleted)", False, "ram"),
        ("/dev/shm/x", False, "ram"),
    ],
)
def test_whose_memory_a_mapping_is(path: str, runs_it: bool, kind: str) -> None:
    assert kind_of(path, runs_it=runs_it) == kind
