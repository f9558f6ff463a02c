"""The main job, end to end, as a user would do it by hand: `make demo`.

Everything goes through the `sandloom` command against a fabric of its own (its own HOME, so a fabric that already
runs on this machine is left alone). Ends with a table, and takes everything down, also on Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.userland import UserlandUnavailable, userland_tar

NAMES = ("loom-1", "loom-2", "loom-3", "loom-4")
MEMORY, GROWN = "256M:1G", "768M"
COMMAND_DEADLINE_S = 300.0
WORK = """
import os, platform
buffer, count = bytearray(1 << 20), 0
for top, _, names in os.walk('/usr'):
    for name in names:
        path = os.path.join(top, name)
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, 'rb', 0) as file:
                while got := file.readinto(buffer):
                    count += got
print(f'{platform.node()}: Python {platform.python_version()} on a Linux {platform.release()} of its own,'
      f' read {count >> 20} MiB of its image')
"""


class DemoFailed(Exception):
    """A step did not work; str() has what the command said."""


@dataclass
class Demo:
    """The fabric's HOME and the clock that stands in front of each line."""

    home: Path
    begun_s: float

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun_s:6.1f} s] {text}", flush=True)

    def sandloom(self, *arguments: str, show: bool = False, stdin: str | None = None) -> str:
        """Runs one command; its output. DemoFailed when its exit status is not 0."""
        argv = [sys.executable, "-m", "controlplane.cli.main", "--home", str(self.home), *arguments]
        if show:
            print(f"           $ sandloom {' '.join(arguments)}", flush=True)
        errors = None if show and sys.stderr.isatty() else subprocess.PIPE
        given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=COMMAND_DEADLINE_S, **given
        )
        if done.returncode:
            raise DemoFailed(f"`sandloom {' '.join(arguments)}` gave {done.returncode}: {done.stderr or done.stdout}")
        return str(done.stdout)

    def asked(self, *arguments: str) -> Any:
        """The JSON answer of one command."""
        return json.loads(self.sandloom(*arguments, "-o", "json"))

    def show(self, *arguments: str) -> None:
        """Runs one command and prints what it said, indented."""
        for line in self.sandloom(*arguments, show=True).splitlines():
            print(f"           {line}")


def mib(size_bytes: float) -> str:
    return f"{size_bytes / (1 << 20):7.1f} MiB"


def start_all(demo: Demo) -> None:
    """All at once: the host itself decides how many boot at a time."""
    with ThreadPoolExecutor(len(NAMES)) as pool:
        runs = [
            pool.submit(demo.sandloom, "run", "-d", "--name", name, "--memory", MEMORY, "demo", "--", "sleep", "86400")
            for name in NAMES
        ]
        for run in runs:
            run.result()
    for name in NAMES:
        wait_running(demo, name)
        demo.say(f"{name} is running: {demo.asked('inspect', name)['status']['origin']}")


def wait_running(demo: Demo, name: str, deadline_s: float = 240.0) -> None:
    """Returns once `name` runs. DemoFailed when it ends instead or takes too long."""
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up:
        status = demo.asked("inspect", name)["status"]
        if status["phase"] == "RUNNING":
            return
        if status["phase"] in ("EXITED", "FAILED"):
            raise DemoFailed(f"{name} did not come up: {status['reason']}: {status['message']}")
        time.sleep(0.2)
    raise DemoFailed(f"{name} was not running after {deadline_s:.0f} s")


def final_table(ledger: dict[str, Any], grown: dict[str, Any]) -> str:
    """The ledger in a newcomer's words."""
    rows = sorted(ledger["sandboxes"], key=lambda row: row["name"])
    resident = sum(row["resident_bytes"] for row in rows)
    distinct = sum(host["distinct_bytes"] for host in ledger["hosts"])
    head = f"{'sandbox':10} {'it sees':>12} {'holds alone':>12} {'shared with others':>19} {'of it image':>12}"
    lines = [head, "-" * len(head)]
    for row in rows:
        shared = row["resident_bytes"] - row["private_bytes"]
        lines.append(
            f"{row['name']:10} {mib(row['resident_bytes']):>12} {mib(row['private_bytes']):>12} {mib(shared):>19}"
            f" {mib(row['layer_bytes']):>12}"
        )
    lines += [
        "-" * len(head),
        f"{len(rows)} sandboxes see {mib(resident).strip()} together; the host holds {mib(distinct).strip()} for them:",
        f"{mib(resident - distinct).strip()} saved ({(resident - distinct) / max(1, resident):.0%}) against"
        f" {len(rows)} that share nothing. All figures are counted in the host's page tables, page by page.",
        f"{NAMES[0]} was grown while it ran: {grown['actual_memory_mib']} MiB now, as wanted.",
    ]
    return "\n".join(lines)


def job(demo: Demo, image: Path) -> None:
    demo.say("starting a one-host fabric: control plane, hostd, their own CA")
    demo.show("dev", "up")
    demo.say(f"importing {image.name} ({image.stat().st_size >> 20} MiB): each layer becomes one read-only EROFS blob")
    demo.show("image", "import", str(image), "--name", "demo")
    demo.show("image", "ls")
    demo.say(f"starting {len(NAMES)} guest-kernel sandboxes of it at once, {MEMORY} of memory each")
    start_all(demo)
    demo.show("ps")
    demo.say("running Python in each of them; every one reads the same image")
    print(f"           $ sandloom exec -i {NAMES[0]} -- python3 - < read_usr.py     (and in the others)", flush=True)
    with ThreadPoolExecutor(len(NAMES)) as pool:
        for said in pool.map(lambda name: demo.sandloom("exec", "-i", name, "--", "python3", "-", stdin=WORK), NAMES):
            print(f"           {said.strip()}", flush=True)
    demo.say(f"growing {NAMES[0]} to {GROWN} while it runs")
    demo.show("resize", NAMES[0], "--memory", GROWN, "--wait")
    grown = demo.asked("inspect", NAMES[0])["status"]["resize"]
    demo.say("the sharing ledger, measured now from the host's page tables")
    demo.show("share")
    ledger = demo.asked("share")
    demo.say("taking everything down")
    take_down(demo)
    print("\n" + final_table(ledger, grown), flush=True)


def take_down(demo: Demo) -> None:
    demo.sandloom("dev", "down")


def left_running(home: Path) -> list[str]:
    """Processes that still name the demo's HOME, this one and its parents left out."""
    mine = {os.getpid(), os.getppid()}
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in mine:
            continue
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in words:
            found.append(f"{entry.name}: {words[:120]}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when the whole job worked and nothing is left."""
    if os.geteuid() != 0:
        print("sandloom demo: run it as root: each guest gets a uid and a cgroup of its own", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="sandloom-demo-", dir="/var/tmp"))
    folder.chmod(0o711)  # guests run as uids of their own and pass through it
    demo = Demo(folder / "home", time.monotonic())
    try:
        demo.say("a Debian userland with python3 (made by mmdebstrap the first time: about a minute)")
        job(demo, userland_tar())
    except (DemoFailed, UserlandUnavailable, subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        print(f"sandloom demo: {error or type(error).__name__}", file=sys.stderr)
        for log in sorted((demo.home / "log").glob("*.log")):
            print(f"--- the end of {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        try:
            take_down(demo)
        except (DemoFailed, subprocess.TimeoutExpired) as failed:
            print(f"sandloom demo: could not take it down: {failed}", file=sys.stderr)
        return 1
    finally:
        left = left_running(demo.home)
        if left:
            print("sandloom demo: still running: " + "; ".join(left), file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if not left else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
