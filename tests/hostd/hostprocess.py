"""A hostd as a process of its own, started as an operator does, for tests that kill it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from controlplane.api.identity import Role
from controlplane.api.v1 import hosts_pb2
from hostd.cgroups import Hierarchy
from tests.hostd.fakecontrolplane import Certificates, FakeControlPlane, certificates
from tests.hostd.hostkit import until

READY_DEADLINE_S = 120.0


@dataclass
class HostProcess:
    """`folder` holds everything of it; it is started and ended as often as a test likes."""

    folder: Path
    plane: FakeControlPlane
    certs: Certificates
    driver: str
    process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> str:
        return (self.folder / "hostd.log").read_text(errors="replace")

    async def start(self) -> hosts_pb2.Host:
        """Returns once it is ready and has said who it is."""
        self.plane.hosts.clear()
        self._configure()
        with (self.folder / "hostd.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hostd.server", "--config", str(self.folder / "hostd.toml"),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), READY_DEADLINE_S)
        assert line, self.log
        assert json.loads(line)["ready"] is True
        await until(lambda: bool(self.plane.hosts), 20)
        return self.plane.hosts[-1]

    async def end(self, signo: int = signal.SIGTERM) -> int:
        """Ends it by a signal; its exit status."""
        assert self.process is not None
        self.process.send_signal(signo)
        return await asyncio.wait_for(self.process.wait(), 30)

    def _configure(self) -> None:
        tls = self.certs.of(Role.HOST, "host-1")
        values = {
            "host": "host-1", "state_dir": str(self.folder / "state"), "run_dir": str(self.folder / "run"),
            "listen": "127.0.0.1:0", "controlplane": self.plane.address, "tls_ca": str(tls.ca),
            "tls_cert": str(tls.cert), "tls_key": str(tls.key), "driver": self.driver, "accel": "tcg",
        }  # fmt: skip
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        (self.folder / "hostd.toml").write_text(text + "memory_reserve_mib = 0\ndisk_reserve_mib = 0\n")


@contextlib.asynccontextmanager
async def host_process(folder: Path, driver: str) -> AsyncIterator[HostProcess]:
    """A hostd that is not started yet, with a control plane that serves. Killed afterwards if it still runs."""
    certs = certificates(folder)
    plane = FakeControlPlane(certs.of(Role.CONTROLPLANE, "cp-1"))
    await plane.up()
    host = HostProcess(folder, plane, certs, driver)
    try:
        yield host
    finally:
        if host.process is not None and host.process.returncode is None:
            os.kill(host.process.pid, signal.SIGKILL)
            await host.process.wait()
        await plane.down()
        _end_guests(folder)


def _end_guests(folder: Path) -> None:
    """What a failed test left running."""
    journal = folder / "state" / "sandboxes"
    cgroups = Hierarchy.probe()
    for uid in [path.name for path in journal.iterdir()] if journal.exists() else []:
        cgroups.remove(uid)
