"""What is left of counted things, read from files as the kernel writes them; and this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.limits import counted_left


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, {
        "proc/loadavg": "0.10 0.20 0.30 2/150 4242", "proc/sys/kernel/pid_max": "4194304",
        "proc/sys/kernel/threads-max": "1000", "proc/sys/fs/file-nr": "1200\t0\t9000",
    })  # fmt: skip
    return tmp_path


def test_the_least_of_the_machines_bounds_counts(root: Path) -> None:
    assert counted_left(root) == {"pids": 850, "file_descriptors": 7800}


def test_a_cgroup_above_may_bind_first_on_v2(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/system.slice/hostd.service"})
    above = root / "sys/fs/cgroup/system.slice"
    write(above / "hostd.service", {"pids.max": "max", "pids.current": "9"})
    assert counted_left(root)["pids"] == 850
    write(above, {"pids.max": "400", "pids.current": "390"})
    assert counted_left(root)["pids"] == 10


def test_a_cgroup_may_bind_first_on_v1(root: Path) -> None:
    write(root, {"proc/self/cgroup": "8:memory:/\n5:pids:/box\n0::/"})
    write(root / "sys/fs/cgroup/pids/box", {"pids.max": "100", "pids.current": "130"})  # lowered under its feet
    assert counted_left(root)["pids"] == 0


def test_what_a_kernel_does_not_tell_of_is_not_bounded(tmp_path: Path) -> None:
    assert counted_left(tmp_path) == {}


def test_this_machine_has_some_left() -> None:
    left = counted_left()
    assert set(left) == {"pids", "file_descriptors"}
    assert all(count > 0 for count in left.values())
