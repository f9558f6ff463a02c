"""hostd as a process: ready, serving, stopping in order, refusing what it cannot start on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.api.identity import Role
from controlplane.api.v1 import hosts_pb2_grpc, images_pb2, sandboxes_pb2
from hostd.server import main
from tests.hostd.fakecontrolplane import assignment, runtime_of
from tests.hostd.hostkit import until
from tests.hostd.hostprocess import HostProcess, host_process
from tests.hostd.test_service import rootfs

Request = images_pb2.ImportImageRequest


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: hostd does")


async def chunks(archive: bytes, *cmd: str) -> AsyncIterator[images_pb2.ImportImageRequest]:
    yield Request(start=Request.Start(name="image", tenant="acme", cmd=cmd, total_bytes=len(archive)))
    for at in range(0, len(archive), 1 << 20):
        yield Request(chunk=archive[at : at + (1 << 20)])


async def import_image(host: HostProcess, archive: bytes, *cmd: str) -> str:
    """Uploads an image to a running hostd; its digest."""
    async with runtime_of(host.plane.hosts[-1], host.certs.of(Role.CONTROLPLANE, "cp-1")) as channel:
        responses = [each async for each in hosts_pb2_grpc.HostRuntimeStub(channel).Import(chunks(archive, *cmd))]
    return responses[-1].image.digest


async def test_it_serves_reports_runs_and_stops_in_order(tmp_path: Path) -> None:
    async with host_process(tmp_path, "fake") as host:
        said = await host.start()
        assert (said.name, said.accel, list(said.classes)) == ("host-1", "fake", [sandboxes_pb2.GUEST_KERNEL])
        assert said.capacity.memory_mib > said.capacity.memory_available_mib > 0
        assert said.capacity.cpu_milli == 1000 * (os.cpu_count() or 1)
        digest = await import_image(host, rootfs(), "sleep")
        await until(lambda: list(host.plane.hosts[-1].image_digests) == [digest])  # told at once, not at a heartbeat
        host.plane.put(assignment("one", digest))
        await until(lambda: host.plane.phase("one") == "RUNNING")
        assert await host.end() == 0
        assert (tmp_path / "state" / "sandboxes" / "one" / "record.json").exists()
        # The fake driver's sandboxes end with their process, as a host's do that loses power.
        await host.start()
        await until(lambda: host.plane.phase("one") == "FAILED")
        report = host.plane.last("one")
        assert report is not None
        assert report.status.reason == "VmmExited"
        assert await host.end() == 0


async def test_one_hostd_a_state_directory(tmp_path: Path) -> None:
    async with host_process(tmp_path, "fake") as host:
        await host.start()
        second = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hostd.server", "--config", str(tmp_path / "hostd.toml"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        _, errors = await asyncio.wait_for(second.communicate(), 30)
        assert second.returncode == 1
        assert errors.decode().startswith("sandloom-hostd: ")
        assert "store" in errors.decode()
        assert host.process is not None and host.process.returncode is None
        assert await host.end(signal.SIGINT) == 0


async def test_an_unreadable_record_stops_it_and_is_named(tmp_path: Path) -> None:
    async with host_process(tmp_path, "fake") as host:
        record = tmp_path / "state" / "sandboxes" / "one" / "record.json"
        record.parent.mkdir(parents=True)
        record.write_bytes(b"{")
        with pytest.raises(AssertionError, match=str(record)):
            await host.start()
        assert host.process is not None
        assert await asyncio.wait_for(host.process.wait(), 10) == 1


def test_bad_arguments_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--config"], ["--surprise"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_a_bad_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "hostd.toml"
    path.write_text("acell = 3\n")
    done = subprocess.run(
        [sys.executable, "-m", "hostd.server", "--config", str(path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "acell" in done.stderr
