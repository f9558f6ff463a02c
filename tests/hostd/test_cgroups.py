"""cgroups v2 and v1: what is written where, found by probing temporary trees, and this machine's own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hostd.cgroups import V1_CONTROLLERS, Hierarchy, Limits, limit_files
from hostd.errors import ConfigError, HostdError
from hostd.process import reap

LIMITS = Limits(memory_bytes=512 << 20, cpu_milli=1500, pids=64)


def v2_tree(mount: Path, controllers: str = "cpuset cpu io memory pids") -> Path:
    (mount / "cgroup.controllers").write_text(controllers)
    (mount / "cgroup.subtree_control").write_text("")
    return mount


def v1_tree(mount: Path, *names: str) -> Path:
    for name in names:
        (mount / name).mkdir()
        (mount / name / "tasks").write_text("")
    return mount


def test_v2_where_the_unified_tree_has_memory_and_cpu(tmp_path: Path) -> None:
    hierarchy = Hierarchy.probe(v2_tree(tmp_path))
    assert (hierarchy.version, hierarchy.roots) == (2, {"": tmp_path / "sandloom"})


def test_v1_where_the_unified_tree_is_only_for_show(tmp_path: Path) -> None:
    """A hybrid: cgroup2 is mounted below, without controllers."""
    v1_tree(tmp_path, "memory", "cpu", "pids", "freezer", "devices")
    (tmp_path / "unified").mkdir()
    v2_tree(tmp_path / "unified", "")
    hierarchy = Hierarchy.probe(tmp_path)
    assert hierarchy.version == 1
    assert hierarchy.roots == {name: tmp_path / name / "sandloom" for name in V1_CONTROLLERS}


def test_v1_takes_what_is_mounted(tmp_path: Path) -> None:
    assert set(Hierarchy.probe(v1_tree(tmp_path, "memory", "pids")).roots) == {"memory", "pids"}


@pytest.mark.parametrize("controllers", ["", "cpu pids"])
def test_without_memory_hostd_does_not_start(tmp_path: Path, controllers: str) -> None:
    v2_tree(tmp_path, controllers)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Hierarchy.probe(tmp_path)


def test_v2_delegates_only_what_is_there(tmp_path: Path) -> None:
    hierarchy = Hierarchy.probe(v2_tree(tmp_path, "memory cpu"))
    (tmp_path / "sandloom").mkdir()
    (tmp_path / "sandloom" / "cgroup.subtree_control").write_text("")
    hierarchy.prepare()
    hierarchy.prepare()  # idempotent
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (tmp_path / "sandloom" / "cgroup.subtree_control").read_text() == "+cpu +memory"


def test_what_a_limit_is_in_each_tree() -> None:
    assert limit_files(2, LIMITS) == [
        ("", "memory.max", "536870912"), ("", "cpu.max", "150000 100000"), ("", "pids.max", "64"),
    ]  # fmt: skip
    assert limit_files(1, LIMITS) == [
        ("memory", "memory.limit_in_bytes", "536870912"), ("cpu", "cpu.cfs_period_us", "100000"),
        ("cpu", "cpu.cfs_quota_us", "150000"), ("pids", "pids.max", "64"),
    ]  # fmt: skip


def test_a_cgroup_that_is_gone_is_named(tmp_path: Path) -> None:
    hierarchy = Hierarchy.probe(v1_tree(tmp_path, "memory"))
    with pytest.raises(HostdError, match="cgroup is gone"):
        hierarchy.set_limits("u-1", LIMITS)
    assert hierarchy.usage_bytes("u-1") == 0
    assert hierarchy.pids("u-1") == set()
    assert hierarchy.remove("u-1") == frozenset()  # idempotent


def test_what_cannot_be_removed_is_told_after_the_deadline(tmp_path: Path) -> None:
    hierarchy = Hierarchy.probe(v1_tree(tmp_path, "memory"))
    (tmp_path / "memory/sandloom/u-1/stuck").mkdir(parents=True)
    now = iter(range(100))
    with pytest.raises(HostdError, match="u-1 cannot be removed"):
        hierarchy.remove("u-1", deadline_s=3, clock=lambda: float(next(now)))


# This machine's own.


@pytest.fixture
def real() -> Hierarchy:
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    try:
        hierarchy = Hierarchy.probe()
        hierarchy.prepare()
    except (ConfigError, OSError) as error:
        pytest.skip(f"no cgroups can be made here: {error}")
    return hierarchy


def test_a_real_process_is_in_it_limited_counted_and_ended(real: Hierarchy) -> None:
    uid = f"test-{os.getpid()}"
    procs = real.create(uid, LIMITS)
    try:
        join = "; ".join(f"echo $$ > {path}" for path in procs)
        child = subprocess.Popen(["sh", "-c", f"{join}; echo in; exec sleep 1000"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        child.stdout.close()
        assert real.pids(uid) == {child.pid}
        for controller, name, value in limit_files(real.version, LIMITS):
            if controller in real.roots:
                assert (real.roots[controller] / uid / name).read_text().strip() == value
        assert real.usage_bytes(uid) >= 0
        real.set_limits(uid, Limits(256 << 20, 500, 32))
        killed = real.remove(uid)
    finally:
        real.remove(uid)
    assert killed == {child.pid}
    child.returncode = 0
    reap(child.pid)
    assert not Path(f"/proc/{child.pid}").exists()
    assert not any(folder.exists() for folder in real.folders(uid))
