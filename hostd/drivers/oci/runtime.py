"""The two OCI runtimes' command lines and words, as pure functions. One driver serves both.

Facts behind the options (crun 1.8, runsc 20221219):
- `runsc checkpoint` ends the container, also when it fails. `runsc restore` needs the file of it to its last byte and
  no further, and takes only the three standard streams: processes with others of the host's (exec) cannot be saved.
- both put the workload's pid into --pid-file and end with status 0 once it runs (--detach); what they started is then
  a child of the nearest subreaper, which is the sandbox's monitor.
- `runsc` itself is that process: its sandbox process, and one of `runsc exec`, end with the workload's exit status.
- PID 1 of a Linux PID namespace is spared every signal that it has no handler for; the user-space kernel's is not.
  So crun's containers get an init, whose program is descriptor 3 (hostd/drivers/oci/src/init.c) and needs no file in
  the image.
- neither shall make cgroups: the sandbox's is made by hostd and inherited (hostd/cgroups.py).
- crun refuses to run where cgroup v1 and a v2 tree with controllers are both mounted; `hide` is what it must not see.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

INIT = ("/proc/self/fd/3", "init", "--")
INIT_DESCRIPTORS = 2

NOT_FOUND, CANNOT_RUN = 127, 126
_NOT_FOUND = ("not found in $path", "error finding executable", "failed to load")
_CANNOT_RUN = (
    "permission denied", "operation not permitted", "exec format error", "chdir", "working directory", "is a directory",
    "invalid argument",
)  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """One of the two. `platform` is runsc's, `hide` a mount point that crun must not see. `state` is where crun keeps
    the state of all its containers and, once for all, its compiled seccomp filter (None: in each sandbox's folder)."""

    name: str  # "crun" or "runsc"
    binary: str
    platform: str = ""
    hide: str = ""
    state: Path | None = None
    version: str = ""  # its own words
    network: str = "none"  # runsc's: "sandbox" takes over what is in the network namespace
    no_services: str = "it was not tried"  # why no tool can answer a container's calls; "" when one can
    notify_flags: tuple[str, ...] = ()  # with which filters go to their tool
    checkpoints: bool = False  # whether it can save a container and go on from that, by trying (probe.py)

    @property
    def accel(self) -> str:
        """What serves the sandbox's system calls, for status and journal: "crun", "runsc/ptrace"."""
        return f"{self.name}/{self.platform}" if self.platform else self.name

    @property
    def init(self) -> tuple[str, ...]:
        """What stands before the main command."""
        return INIT if self.name == "crun" else ()

    def base(self, folder: Path) -> list[str]:
        """The command with its global options."""
        state = [f"--root={self.state or folder / 'state'}", f"--log={folder / 'runtime.log'}", "--log-format=json"]
        if self.name == "crun":
            return [self.binary, *state, "--cgroup-manager=disabled"]
        return [self.binary, *state, f"--platform={self.platform}", f"--network={self.network}", "--ignore-cgroups"]

    def _process(self, folder: Path, proc: int, tty: bool) -> list[str]:
        options = ["--detach", "--pid-file", str(folder / f"{proc}.pid")]
        return [*options, *(["--console-socket", str(folder / f"{proc}.tty")] if tty else [])]

    def run_argv(self, folder: Path, uid: str, proc: int, *, tty: bool) -> list[str]:
        """Makes and starts the container of the bundle in `folder`."""
        keep = ["--preserve-fds", str(INIT_DESCRIPTORS)] if self.init else []
        return [*self.base(folder), "run", *self._process(folder, proc, tty), "--bundle", str(folder), *keep, uid]

    def exec_argv(self, folder: Path, uid: str, proc: int, *, tty: bool) -> list[str]:
        """Starts the process of FOLDER/PROC.json in the running container."""
        process = ["--process", str(folder / f"{proc}.json")]
        inside = ["--internal-pid-file", str(folder / f"{proc}.inside")] if self.name == "runsc" else []
        return [*self.base(folder), "exec", *self._process(folder, proc, tty), *inside, *process, uid]

    def kill_argv(self, folder: Path, uid: str, signo: int, inside_pid: int | None) -> list[str]:
        """Sends a signal to the main process, or to the one with this pid inside the container (runsc only)."""
        one = ["--pid", str(inside_pid)] if inside_pid is not None else []
        return [*self.base(folder), "kill", *one, uid, str(signo)]

    def checkpoint_argv(self, folder: Path, uid: str, image: Path) -> list[str]:
        """Saves the container into the folder `image` and ends it, whether that worked or not (runsc only)."""
        return [*self.base(folder), "checkpoint", f"--image-path={image}", uid]

    def delete_argv(self, folder: Path, uid: str) -> list[str]:
        """Forgets an ended container, so that another one can have its name."""
        return [*self.base(folder), "delete", "--force", uid]

    def restore_argv(self, folder: Path, uid: str, proc: int, image: Path) -> list[str]:
        """Makes a container of the bundle in `folder` that goes on from what is saved in the folder `image`."""
        options = [*self._process(folder, proc, tty=False), f"--image-path={image}", "--bundle", str(folder)]
        return [*self.base(folder), "restore", *options, uid]


def exit_code_of(words: str) -> int | None:
    """127 or 126 when a runtime's error says that the command itself could not be run; None for anything else."""
    lower = words.lower()
    if any(phrase in lower for phrase in _CANNOT_RUN):
        return CANNOT_RUN
    return NOT_FOUND if any(phrase in lower for phrase in _NOT_FOUND) else None


def last_words(log: str) -> str:
    """The last error in a runtime's JSON log, "" when there is none."""
    for line in reversed(log.replace("}{", "}\n{").splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") == "error":
            return str(entry.get("msg", ""))
    return ""
