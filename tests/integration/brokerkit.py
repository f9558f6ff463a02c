"""One real host under a memory budget of its own, for tests of its broker: real guests, real containers, the command.

The budget is hostd's `memory_budget_mib`: the cgroup that holds its sandboxes stands for the host. A hog takes memory
in that cgroup beside the sandboxes, so that the host itself becomes short whenever a test wants it to.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controlplane.cli.main import main
from hostd.cgroups import Hierarchy
from hostd.memory.pressure import HostSense
from tests.hostd.busybox import busybox, rootfs_tar
from tests.integration.fabric import Done, belongings, until
from tests.integration.manyhosts import HostProcess, ManyHosts, is_root, many_hosts

HOLD_MIB = (
    "import sys, time; kept = bytearray(b'x') * (int(sys.argv[1]) << 20); print('held', flush=True); time.sleep(9e9)"
)


@dataclass
class World:
    """The fabric and its only host."""

    fabric: ManyHosts
    host: HostProcess

    def run(self, *arguments: str) -> Done:
        """One command to its end, as a process of its own."""
        return self.fabric.run(*arguments)

    def ok(self, *arguments: str) -> str:
        return self.fabric.ok(*arguments)

    def asked(self, *arguments: str) -> Any:
        """The JSON of a command that only asks, run in this process: that takes milliseconds."""
        out = io.StringIO()
        argv = [
            "--address",
            self.fabric.address,
            "--tls-dir",
            str(self.fabric.folder / "tls"),
            *arguments,
            "-o",
            "json",
        ]
        with contextlib.redirect_stdout(out):
            ended = main(argv)
        assert ended.code == 0, f"sandloom {' '.join(arguments)}: {ended}\n{out.getvalue()}\n{self.fabric.logs()}"
        return json.loads(out.getvalue())

    def status(self, name: str) -> dict[str, Any]:
        found = self.asked("inspect", name)
        status = (found[0] if isinstance(found, list) else found)["status"]
        assert isinstance(status, dict)
        return status

    def phase(self, name: str) -> str:
        return str(self.status(name)["phase"])

    def resize(self, name: str) -> dict[str, Any]:
        """The contract as `inspect` shows it."""
        return dict(self.status(name).get("resize") or {})

    def mib(self, name: str, which: str) -> int:
        return int(self.resize(name).get(f"{which}_memory_mib", 0))

    def events(self, name: str) -> list[tuple[str, str]]:
        """(reason, message), oldest first."""
        return [(event["reason"], event["message"]) for event in self.asked("events", "--subject", name)]

    def told(self, name: str, reason: str) -> list[str]:
        return [message for kind, message in self.events(name) if kind == reason]

    def until(self, condition: Callable[[], bool], deadline_s: float = 90.0, *names: str) -> None:
        """Returns once `condition` holds; else fails with what is known of `names`."""

        def why() -> str:
            known = "\n".join(f"{name}: {self.status(name)}\n{self.events(name)}" for name in names)
            return f"not so after {deadline_s:.0f} s\n{known}\n{self.fabric.logs()}"

        until(condition, deadline_s, why)

    def start(self, name: str, memory: str, *options: str) -> None:
        """A sandbox that runs, waits, and holds what hold() has it hold."""
        self.ok("run", "-d", "--name", name, "--memory", memory, *options, "tiny", "--", "sleep", "9999999")

    def hold(self, name: str, mib: int, path: str = "/tmp/held") -> None:
        """Has it use so much, in a file in its memory."""
        self.ok("exec", name, "--", "sh", "-c", f"head -c {mib << 20} /dev/zero > {path}")

    def free(self, name: str, path: str = "/tmp/held") -> None:
        self.ok("exec", name, "--", "sh", "-c", f": > {path}")

    def kill_hostd(self) -> None:
        assert self.host.process is not None
        self.host.signal(signal.SIGKILL)
        self.host.process.wait(30)

    def restart_hostd(self, **settings: object) -> None:
        """Once it was killed; with more lines in its hostd.toml."""
        with (self.host.home / "hostd.toml").open("a") as config:
            config.writelines(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        self.host.start()
        self.fabric.until_state(self.host.name, "READY")

    def _setting(self, key: str) -> Any:
        return tomllib.loads((self.host.home / "hostd.toml").read_text())[key]

    @property
    def cgroup(self) -> str:
        return str(self._setting("cgroup"))

    @property
    def budget_mib(self) -> int:
        return int(self._setting("memory_budget_mib"))

    @contextlib.contextmanager
    def hog_all_but(self, left_mib: int) -> Iterator[None]:
        """Something that is no sandbox takes all of the budget that is available now, but for `left_mib`."""
        hierarchy = Hierarchy.probe(name=self.cgroup)
        mib = HostSense(hierarchy, self.budget_mib)().available_mib - left_mib
        folder = hierarchy.roots["" if hierarchy.version == 2 else "memory"] / "hog"
        folder.mkdir()
        argv = [sys.executable, "-c", HOLD_MIB, str(mib)]
        join = ["/bin/sh", "-c", f'echo $$ > "{folder / "cgroup.procs"}" && exec "$@"', "sh", *argv]
        process = subprocess.Popen(join, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()
            process.communicate()
            until(lambda: _removed(folder), 30.0)


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


@contextlib.contextmanager
def broker_world(*, reserve_mib: int, **settings: object) -> Iterator[World]:
    """A host with the image `tiny` and these lines in its hostd.toml. Nothing of it is left: that is asserted."""
    if not is_root():
        pytest.skip("needs root: each guest gets a uid and a cgroup of its own")
    program = busybox()
    if program is None:
        pytest.skip("needs busybox (Debian: busybox-static) for the image")
    folder = Path(tempfile.mkdtemp(prefix="sl-bw-", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        with many_hosts(folder, lease_s=10, grace_s=600) as fabric:
            host = fabric.join("h1", driver="qemu", reserve_mib=reserve_mib, settings=settings)
            (folder / "tiny.tar").write_bytes(rootfs_tar(program))
            fabric.ok("image", "import", str(folder / "tiny.tar"), "--name", "tiny")
            world = World(fabric, host)
            yield world
            names = [row["name"] for row in world.asked("ps", "-a")]
            if names:
                world.ok("rm", "-f", *names)
            world.until(lambda: not world.asked("ps", "-a"))
        left = belongings(folder)
        assert left.nothing(), f"{left}\n{fabric.logs()}"
        assert not list(Path("/sys/fs/cgroup").glob(f"*/{world.cgroup}")), "a cgroup is left"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
