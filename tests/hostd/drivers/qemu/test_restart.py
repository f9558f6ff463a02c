"""kill -9 of a hostd with a real guest: the guest runs on, the next hostd takes it over, no output is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.api.identity import Role
from controlplane.api.v1 import hosts_pb2_grpc, sandboxes_pb2
from guestagent.binary import BUILT
from hostd.process import start_ticks
from tests.hostd.busybox import busybox, rootfs_tar
from tests.hostd.drivers.qemu.rig import left_of, owner
from tests.hostd.fakecontrolplane import assignment, runtime_of
from tests.hostd.hostkit import until
from tests.hostd.hostprocess import HostProcess, host_process
from tests.hostd.test_server import import_image

pytestmark = pytest.mark.guest

COUNT = "i=0; while :; do echo $i; i=$((i+1)); [ $((i % 20)) = 0 ] && sleep 0.05; done"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Guests pass through it as uids of their own."""
    if os.geteuid() != 0:
        pytest.skip("needs root: each guest gets a uid and a cgroup of its own")
    if busybox() is None or not BUILT.exists() or shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs busybox-static, qemu-system-x86 and the built agent (make setup)")
    made = Path(tempfile.mkdtemp(prefix="sl-h-", dir="/var/tmp"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def logs(host: HostProcess, uid: str) -> list[int]:
    async with runtime_of(host.plane.hosts[-1], host.certs.of(Role.CONTROLPLANE, "cp-1")) as channel:
        call = hosts_pb2_grpc.HostRuntimeStub(channel).Logs(sandboxes_pb2.GetLogsRequest(name=uid))
        return [int(word) for word in b"".join([output.stdout async for output in call]).split()]


async def test_a_killed_hostd_leaves_guests_running_and_the_next_one_loses_nothing(folder: Path) -> None:
    program = busybox()
    assert program is not None
    uid = f"counts-{os.getpid()}"
    async with host_process(folder, "qemu") as host:
        said = await host.start()
        assert (said.accel, said.cgroup_version in ("v1", "v2")) == ("tcg", True)
        assert "no isolation" in said.isolation_note
        digest = await import_image(host, rootfs_tar(program))
        host.plane.put(assignment(uid, digest, "sh", "-c", COUNT))
        await until(lambda: host.plane.phase(uid) in ("RUNNING", "FAILED"), 120)
        first = host.plane.last(uid)
        assert first is not None and host.plane.phase(uid) == "RUNNING", first
        pid = first.status.host_pid
        ticks = start_ticks(pid)
        vm_uid = owner(pid)

        assert await host.end(signal.SIGKILL) == -signal.SIGKILL
        assert start_ticks(pid) == ticks  # it runs on
        await host.start()
        await until(lambda: (report := host.plane.last(uid)) is not None and report.status.restarts_of_host == 1, 60)
        adopted = host.plane.last(uid)
        assert adopted is not None
        assert (adopted.status.host_pid, host.plane.phase(uid)) == (pid, "RUNNING")
        seen = await logs(host, uid)
        for _ in range(600):  # it may have been killed before the first line came
            if seen:
                break
            await asyncio.sleep(0.05)
            seen = await logs(host, uid)
        for _ in range(600):  # what comes after the restart comes, too
            if len(await logs(host, uid)) > len(seen):
                break
            await asyncio.sleep(0.05)
        host.plane.put(assignment(uid, digest, desired_state=sandboxes_pb2.DESIRED_STOPPED))
        await until(lambda: host.plane.phase(uid) == "EXITED", 30)
        lines = await logs(host, uid)
        assert len(lines) > len(seen) > 0
        assert lines == list(range(lines[0], lines[0] + len(lines)))  # none lost, none twice
        host.plane.put(assignment(uid, digest, desired_state=sandboxes_pb2.DESIRED_REMOVED))
        await until(lambda: (report := host.plane.last(uid)) is not None and report.removed, 30)
        await until(lambda: left_of(uid, folder / "run" / uid, vm_uid) == [], 20)  # init reaps what was adopted
        assert await host.end() == 0
        assert left_in(folder / "run") == []
