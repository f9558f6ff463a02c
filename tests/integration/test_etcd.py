"""A fabric on a real etcd of three members that loses its quorum while a real guest runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcdserver import Member, cluster
from tests.integration.fabric import Fabric, alive, belongings, until

pytestmark = pytest.mark.guest

COUNT = ("sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[list[Member]]:
    with cluster(tmp_path / "etcd", 3) as members:
        yield members


@pytest.fixture
def on_etcd(userland: Path, etcd: list[Member]) -> Iterator[Fabric]:
    """A fabric whose records are in etcd. Afterwards nothing of it is left."""
    if os.geteuid() != 0:
        pytest.skip("needs root: each guest gets a uid and a cgroup of its own")
    folder = Path(tempfile.mkdtemp(prefix="sl-it-", dir="/var/tmp"))
    folder.chmod(0o711)
    running = Fabric(folder / "home")
    try:
        running.ok("dev", "up", "--store", "etcd:" + ",".join(member.client for member in etcd))
        running.ok("image", "import", str(userland), "--name", "userland")
        yield running
    finally:
        down = running.run("dev", "down")
        left = belongings(running.home)
        logs = running.logs()
        shutil.rmtree(folder, ignore_errors=True)
    assert down.code == 0, f"dev down: {down}\n{logs}"
    assert left.nothing(), f"{left}\n{logs}"


def test_a_guest_runs_on_while_etcd_has_no_quorum(on_etcd: Fabric, etcd: list[Member]) -> None:
    on_etcd.start("counts", command=COUNT)
    before = on_etcd.inspect("counts")
    pid = on_etcd.host_pid("counts")
    for member in etcd[1:]:
        member.kill()
    refused = on_etcd.run("run", "-d", "--name", "second", "userland", "--", "sleep", "1000")
    assert refused.code == 125 and "etcd" in refused.err, refused
    assert alive(pid)
    for member in etcd[1:]:
        member.start()
    until(lambda: on_etcd.run("inspect", "counts").code == 0, 120, on_etcd.logs)
    after = on_etcd.inspect("counts")
    assert (after["uid"], after["assignment"], on_etcd.host_pid("counts")) == (
        before["uid"], before["assignment"], pid,
    )  # fmt: skip
    assert on_etcd.ok("exec", "counts", "--", "echo", "alive") == "alive\n"
    # What etcd had in its log when it lost its quorum it may take up again: UNAVAILABLE means not known. Never twice.
    names = [sandbox["name"] for sandbox in on_etcd.asked("ps", "-a")]
    assert sorted(names) in (["counts"], ["counts", "second"])
    on_etcd.ok("stop", "-t", "0", "counts")
    on_etcd.wait_phase("counts", "EXITED")
    lines = on_etcd.ok("logs", "counts").split()
    start = int(lines[0])
    assert lines == [str(start + i) for i in range(len(lines))]  # it never stopped
    on_etcd.ok("rm", "counts")
