"""Which OCI runtimes truly work here, found by running a container with a deadline, not by version or by looking.

runsc's platforms are tried in this order: systrap (no special hardware, newer releases), kvm (fast on bare metal;
there are nested hosts where /dev/kvm opens and no guest ever comes up), ptrace (works everywhere, slowly). crun is
tried with everything in sight, then without a cgroup v2 tree beside v1, which it refuses. Verdicts are kept per boot
of the host and version of the runtime:

    CACHE/oci/<sha256 of boot id and the runtime's own words>.json   {"platform": "ptrace", "hide": "", ...}: a Verdict

Whether runsc saves a container and goes on from that is tried, too, and whether crun hands over a container's seccomp
listener (`listenerPath`), with the flag by which no signal interrupts what is being served (Linux 5.19), or without.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hostd.cgroups import Hierarchy, Limits
from hostd.drivers.oci.bundle import BundleShape, Notify, config_json
from hostd.drivers.oci.driver import require_root
from hostd.drivers.oci.monitor import MONITOR
from hostd.drivers.oci.runtime import Runtime
from hostd.drivers.oci.users import Identity
from hostd.errors import ConfigError
from hostd.services.notified import NotifiedCall
from hostd.spec import Command

PROBE_DEADLINE_S = 8.0
"""A working runtime needs well under a second."""

CHECKPOINT_DEADLINE_S, POLL_S = 30.0, 0.01

PLATFORMS = ("systrap", "kvm", "ptrace")
HYBRID_CGROUPS = "/sys/fs/cgroup/unified"
PROBE_LIMITS = Limits(memory_bytes=512 << 20, cpu_milli=2000, pids=512)
SAID = b"sandloom runs here\n"
TAIL_BYTES = 300
SCHEMA = 3
"""Of verdicts: what is asked has grown since 1 and 2."""

KILLABLE = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
NOTIFIED = (NotifiedCall("connect", None, 0),)


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime is of use, and with which settings. `why` is for people."""

    works: bool
    platform: str
    hide: str
    why: str
    no_checkpoints: str = "it was not tried"  # "" when a container went on from a checkpoint
    no_services: str = "it was not tried"  # "" when the listener of a container's filter was handed over
    notify_flag: str = ""  # with which it was


def version_of(binary: str) -> str:
    """The runtime's own words; "" when it is not installed."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def candidates(name: str, binary: str, *, hybrid: bool) -> list[Runtime]:
    """What to try, best first. Pure."""
    if name == "runsc":
        return [Runtime(name, binary, platform=platform) for platform in PLATFORMS]
    return [Runtime(name, binary), *([Runtime(name, binary, hide=HYBRID_CGROUPS)] if hybrid else [])]


def cache_path(cache_dir: Path, version: str) -> Path:
    """Where the verdict for this boot and runtime is kept."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return cache_dir / "oci" / f"{hashlib.sha256(f'{boot_id} {version} {SCHEMA}'.encode()).hexdigest()[:32]}.json"


def _cached(path: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def kept(cache_dir: Path, binary: str) -> Verdict | None:
    """What was found out since this machine booted, if anything. Blocks."""
    return _cached(cache_path(cache_dir, version_of(binary)))


def _keep(path: Path, verdict: Verdict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(verdict)))
    temporary.rename(path)


async def decide(name: str, cgroups: Hierarchy, cache_dir: Path) -> tuple[Runtime | None, str]:
    """The runtime `name` ("crun", "runsc") as it works here, or None, and why. Tries once a boot; seconds then."""
    try:
        require_root()
    except ConfigError as error:
        return None, str(error)
    binary = await asyncio.to_thread(shutil.which, name, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin")
    if binary is None:
        return None, f"{name} is not installed: apt-get install {name}"
    version = await asyncio.to_thread(version_of, binary)
    path = cache_path(cache_dir, version)
    verdict = _cached(path)
    if verdict is None:
        hybrid = await asyncio.to_thread(os.path.ismount, HYBRID_CGROUPS)
        verdict = await _try_all(candidates(name, binary, hybrid=hybrid), cgroups)
        _keep(path, verdict)
    if not verdict.works:
        return None, verdict.why
    checkpoints = not verdict.no_checkpoints
    flags = (verdict.notify_flag,) if verdict.notify_flag else ()
    runtime = Runtime(
        name, binary, verdict.platform, verdict.hide, version=version, checkpoints=checkpoints,
        no_services=verdict.no_services, notify_flags=flags,
    )  # fmt: skip
    why = f"{verdict.why}; checkpoints: {verdict.no_checkpoints or 'it went on from one'}"
    return runtime, why if name == "runsc" else verdict.why


async def _try_all(runtimes: list[Runtime], cgroups: Hierarchy) -> Verdict:
    failures: list[str] = []
    for runtime in runtimes:
        problem = await try_run(runtime, cgroups)
        if not problem:
            why = f"a container ran on {runtime.accel}" + (f"; not on {'; '.join(failures)}" if failures else "")
            no_checkpoints = await try_checkpoint(runtime, cgroups) if runtime.name == "runsc" else "crun has none"
            no_services, flag = await try_services(runtime, cgroups)
            return Verdict(True, runtime.platform, runtime.hide, why, no_checkpoints, no_services, flag)
        failures.append(f"{runtime.platform or runtime.name}: {problem}")
    return Verdict(False, "", "", f"no container runs here: {'; '.join(failures)}")


def _argv(runtime: Runtime, folder: Path, procs: list[Path], name: str) -> list[str]:
    """A foreground run in the probe's cgroup, and in a mount namespace of its own when something is to be hidden."""
    join = "".join(f'echo $$ > "{path}"; ' for path in procs)
    run = [*runtime.base(folder), "run", "--bundle", str(folder), name]
    if not runtime.hide:
        return ["/bin/sh", "-ec", f'{join}exec "$@"', "sandloom-probe", *run]
    script = (
        f'{join}exec unshare --mount --propagation slave sh -ec "umount -l {runtime.hide}; exec \\"\\$@\\"" sh "$@"'
    )
    return ["/bin/sh", "-ec", script, "sandloom-probe", *run]


async def try_run(runtime: Runtime, cgroups: Hierarchy, *, deadline_s: float = PROBE_DEADLINE_S) -> str:
    """Runs a program that says SAID in a container. "" when it did, else what went wrong. Leaves nothing."""
    try:
        async with _container(runtime, cgroups, "probe") as (folder, procs, name):
            return await _run(_argv(runtime, folder, procs, name), deadline_s)
    except OSError as error:
        return f"{error.filename}: {error.strerror}: build it with `make setup`"


async def try_services(runtime: Runtime, cgroups: Hierarchy) -> tuple[str, str]:
    """Whether the runtime hands over the listener of a container's filter: "" and the flag with which it does ("" for
    none), else why not. Leaves nothing."""
    if runtime.name != "crun":
        return "its kernel is in user space and answers all calls itself", ""
    problem = ""
    for flag in (KILLABLE, ""):
        try:
            async with _container(runtime, cgroups, "probe", (flag,) if flag else ()) as (folder, procs, name):
                problem = await _hand_over(_argv(runtime, folder, procs, name), folder / "notify")
        except OSError as error:
            problem = f"{error.filename or runtime.binary}: {error.strerror}"
        if not problem:
            return "", flag
    return problem, ""


async def _hand_over(argv: list[str], path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(4)
        listener.setblocking(False)
        problem = await _run(argv, PROBE_DEADLINE_S)
        if problem:
            return problem
        try:
            with listener.accept()[0] as connection:
                connection.setblocking(False)
                _, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        except BlockingIOError:
            return "it ran a container and handed over no listener of its filter (linux.seccomp.listenerPath)"
        for descriptor in descriptors:
            os.close(descriptor)
        return "" if len(descriptors) == 1 else f"it handed over {len(descriptors)} descriptors, not a listener"


@asynccontextmanager
async def _container(
    runtime: Runtime, cgroups: Hierarchy, program: str, notify_flags: tuple[str, ...] | None = None
) -> AsyncIterator[tuple[Path, list[Path], str]]:
    """A bundle that runs the monitor as `program`, a cgroup for it, and its name. All of it goes. OSError."""
    name = f"probe-{os.getpid()}-{runtime.accel.replace('/', '-')}"
    with tempfile.TemporaryDirectory(prefix="sandloom-probe-") as temporary:
        folder = Path(temporary)
        (folder / "rootfs").mkdir()
        shutil.copy(MONITOR, folder / "rootfs" / "probe")
        for point in ("proc", "dev", "sys"):
            (folder / "rootfs" / point).mkdir()
        shape = BundleShape(folder / "rootfs", "probe", open_files=64)
        if runtime.name == "crun":
            notify = None if notify_flags is None else Notify(folder / "notify", NOTIFIED, notify_flags)
            shape = replace(shape, machine=os.uname().machine, root_hook=MONITOR, notify=notify)
        command = Command(("/probe", program), (), "/", "", False, False, 24, 80)
        (folder / "config.json").write_text(json.dumps(config_json(command, Identity(0, 0), shape)))
        procs = await asyncio.to_thread(cgroups.create, name, PROBE_LIMITS)
        try:
            yield folder, procs, name
        finally:
            await asyncio.to_thread(cgroups.remove, name)


async def try_checkpoint(runtime: Runtime, cgroups: Hierarchy, *, deadline_s: float = CHECKPOINT_DEADLINE_S) -> str:
    """Saves a container that waits for a byte, goes on from that, and gives it one. "" when it then said SAID a second
    time, else what went wrong. Leaves nothing."""
    try:
        async with asyncio.timeout(deadline_s), _container(runtime, cgroups, "probe-twice") as (folder, procs, name):
            return await _say_twice(runtime, folder, procs, name)
    except TimeoutError:
        return f"it did not go on within {deadline_s:.0f} s"
    except OSError as error:
        return f"{error.filename or runtime.binary}: {error.strerror}"


async def _say_twice(runtime: Runtime, folder: Path, procs: list[Path], name: str) -> str:
    image, join = folder / "image", "".join(f'echo $$ > "{path}"; ' for path in procs)
    image.mkdir()
    (stdin, give), (take, stdout) = os.pipe(), os.pipe()

    async def asked(what: str, argv: list[str]) -> str:
        script = ["/bin/sh", "-ec", f'{join}exec "$@"', "sandloom-probe", *argv]
        with (folder / "said").open("wb") as said:
            process = await asyncio.create_subprocess_exec(*script, stdin=stdin, stdout=stdout, stderr=said)
            status = await _ended(process)
        words = (folder / "said").read_text(errors="replace").strip()[-TAIL_BYTES:]
        return "" if status == 0 else f"{what}: {words or status}"

    try:
        os.set_blocking(take, False)
        problem = await asked("run", runtime.run_argv(folder, name, 1, tty=False)) or await _said(take)
        problem = problem or await asked("checkpoint", runtime.checkpoint_argv(folder, name, image))
        problem = problem or await asked("delete", runtime.delete_argv(folder, name))
        problem = problem or await asked("restore", runtime.restore_argv(folder, name, 1, image))
        if problem:
            return problem
        os.write(give, b"\n")
        return await _said(take)
    finally:
        for descriptor in (stdin, give, take, stdout):
            os.close(descriptor)


async def _ended(process: asyncio.subprocess.Process) -> int:
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _said(descriptor: int) -> str:
    """Waits for SAID to come, byte for byte. "" then."""
    got = b""
    while len(got) < len(SAID):
        try:
            got += os.read(descriptor, len(SAID) - len(got))
        except BlockingIOError:
            await asyncio.sleep(POLL_S)
    return "" if got == SAID else f"it said {got!r}"


async def _run(argv: list[str], deadline_s: float) -> str:
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(deadline_s):
            said = await process.stdout.read()
            await process.wait()
    except TimeoutError:
        return f"nothing came up within {deadline_s:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if said.endswith(SAID) and process.returncode == 0:
        return ""
    return said.decode(errors="replace").strip()[-TAIL_BYTES:] or f"it ended with status {process.returncode}"
