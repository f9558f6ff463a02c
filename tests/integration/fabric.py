"""A whole one-host fabric for tests, driven as a user drives it: through the `sandloom` command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.cli.devfiles import cgroup_name
from controlplane.cli.home import Home

COMMAND_DEADLINE_S = 240.0
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Fabric:
    """A fabric's HOME; commands act on it."""

    home: Path

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "controlplane.cli.main", "--home", str(self.home), *arguments]

    def run(self, *arguments: str, stdin: bytes | None = None) -> Done:
        """One command to its end."""
        done = subprocess.run(
            self.argv(*arguments),
            input=stdin if stdin is not None else None,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_DEADLINE_S,
        )
        return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def ok(self, *arguments: str, stdin: bytes | None = None) -> str:
        """One command that must succeed; its output."""
        done = self.run(*arguments, stdin=stdin)
        assert done.code == 0, f"sandloom {' '.join(arguments)}: {done.code}\n{done.out}\n{done.err}\n{self.logs()}"
        return done.out

    def asked(self, *arguments: str) -> Any:
        """The JSON answer of one command."""
        return json.loads(self.ok(*arguments, "-o", "json"))

    def inspect(self, name: str) -> dict[str, Any]:
        answer = self.asked("inspect", name)
        found = answer[0] if isinstance(answer, list) else answer
        assert isinstance(found, dict)
        return found

    def phase(self, name: str) -> str:
        return str(self.inspect(name)["status"]["phase"])

    def start(self, name: str, *arguments: str, image: str = "userland", command: Sequence[str] = ()) -> None:
        """A detached sandbox that runs when this returns."""
        self.ok("run", "-d", "--name", name, *arguments, image, "--", *(command or ("sleep", "100000")))
        self.wait_phase(name, "RUNNING")

    def wait_phase(self, name: str, *phases: str, deadline_s: float = 180.0) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def reached() -> bool:
            seen.update(self.inspect(name))
            return seen["status"]["phase"] in phases

        until(reached, deadline_s, lambda: f"{name} is {seen.get('status')}, wanted {phases}\n{self.logs()}")
        return seen

    def host_pid(self, name: str) -> int:
        """The VMM's pid."""
        return int(self.inspect(name)["status"]["host_pid"])

    def daemon_pid(self, name: str) -> int:
        return int(json.loads((self.home / "pids" / f"{name}.json").read_text())["pid"])

    def logs(self) -> str:
        """The daemons' last words, for a failing assertion."""
        texts = []
        for log in sorted((self.home / "log").glob("*.log")):
            texts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        return "\n".join(texts)


def until(condition: Callable[[], bool], deadline_s: float, why: Callable[[], str] = lambda: "") -> None:
    """Returns once `condition` holds; fails with `why` after the deadline."""
    give_up = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < give_up, why() or f"not so after {deadline_s} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@dataclass(frozen=True)
class Belongings:
    """What one fabric could leave behind on the machine."""

    processes: tuple[str, ...]
    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    sockets: tuple[str, ...]
    loops: tuple[str, ...]

    def nothing(self) -> bool:
        return not (self.processes or self.mounts or self.cgroups or self.sockets or self.loops)


def belongings(home: Path) -> Belongings:
    """Everything on this machine that is this fabric's."""
    return Belongings(
        processes=tuple(_processes(home)),
        mounts=tuple(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line),
        cgroups=tuple(str(folder) for folder in _cgroups(home)),
        sockets=tuple(line for line in Path("/proc/net/unix").read_text().splitlines() if str(home) in line),
        loops=tuple(_loops(home)),
    )


def _cgroups(home: Path) -> list[Path]:
    """Folders of the fabric's own slice, in every hierarchy."""
    name = cgroup_name(Home(home))
    return [*CGROUP_ROOT.glob(name), *CGROUP_ROOT.glob(f"*/{name}")]


def _processes(home: Path) -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(home) in words:
                yield f"{entry.name}: {words}"


def _loops(home: Path) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(home) in backing.read_text():
                yield str(backing)
