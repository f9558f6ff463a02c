"""Which accelerator truly works here, found by booting a guest with a deadline, not by looking at /dev/kvm.

There are hosts (nested ones) where /dev/kvm opens and makes vCPUs and no stock guest kernel ever comes up on it.
The verdict is cached per boot of the host, guest kernel and QEMU:

    CACHE/accel/<sha256 of boot id, kernel version, QEMU version>.json   {"accel": "tcg", "why": "..."}
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hostd.drivers.qemu.command import GuestShape, qemu_argv

PROBE_DEADLINE_S = 10.0
"""A guest on working KVM answers in well under 2 s; on one that does not work it never does."""

ACCELS = ("kvm", "tcg")

TCG_NOTE = "QEMU promises no isolation under TCG: do not run hostile work on this host"


@dataclass(frozen=True)
class Verdict:
    """`accel` is "kvm" or "tcg"; `why` is for people."""

    accel: str
    why: str


def qemu_version(binary: str = "qemu-system-x86_64") -> str:
    """QEMU's own words, e.g. "QEMU emulator version 7.2.22"; empty when it is not installed."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()


def cpu_identity(accel: str) -> str:
    """What the CPU that a guest sees is made from: QEMU's own under TCG, the host's model and flags under KVM."""
    if accel != "kvm":
        return "tcg max"
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    kept = [
        line for line in lines if line.split("\t")[0] in ("vendor_id", "model name", "stepping", "microcode", "flags")
    ]
    return "kvm host " + hashlib.sha256("\n".join(kept).encode()).hexdigest()


def cache_path(cache_dir: Path, kernel_version: str) -> Path:
    """Where the verdict for this boot, kernel and QEMU is kept."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = hashlib.sha256("\n".join((boot_id, kernel_version, qemu_version())).encode()).hexdigest()
    return cache_dir / "accel" / f"{key[:32]}.json"


def cached(path: Path) -> Verdict | None:
    """The kept verdict, if there is a readable one."""
    try:
        values = json.loads(path.read_text())
        return Verdict(values["accel"], str(values["why"])) if values["accel"] in ACCELS else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(path: Path, verdict: Verdict) -> None:
    """Keeps a verdict, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(verdict)))
    temporary.rename(path)


async def decide(wanted: str, probe_shape: GuestShape, kernel_version: str, cache_dir: Path) -> Verdict:
    """The accelerator to use: as configured, or by probing once."""
    if wanted != "auto":
        return Verdict(wanted, "configured")
    path = cache_path(cache_dir, kernel_version)
    verdict = cached(path)
    if verdict is None:
        verdict = await probe_kvm(probe_shape)
        keep(path, verdict)
    return verdict


async def probe_kvm(shape: GuestShape, deadline_s: float = PROBE_DEADLINE_S) -> Verdict:
    """Boots `shape` on KVM and waits for the first byte on its agent port's socket being accepted by the guest.

    What is waited for is the agent's answer to a SYNC (guestagent/PROTOCOL.md), so a kernel that comes up half
    does not count."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Verdict("tcg", "there is no usable /dev/kvm")
    with tempfile.TemporaryDirectory(prefix="sandloom-probe-") as folder:
        shape = replace(shape, accel="kvm", folder=Path(folder), layers=())
        process = await asyncio.create_subprocess_exec(
            *qemu_argv(shape),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(deadline_s):
                answered = await _agent_answers(shape.agent_path, process)
        except TimeoutError:
            return Verdict("tcg", f"a guest on /dev/kvm did not come up within {deadline_s:.0f} s")
        finally:
            if process.returncode is None:
                process.kill()
            _, errors = await process.communicate()
        if answered:
            return Verdict("kvm", "a guest booted on /dev/kvm")
        return Verdict("tcg", f"QEMU ended on /dev/kvm: {errors.decode(errors='replace').strip()[-200:]}")


async def _agent_answers(path: Path, process: asyncio.subprocess.Process) -> bool:
    nonce = os.urandom(8)
    while process.returncode is None:
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError:
            ended = asyncio.ensure_future(process.wait())
            await asyncio.wait({ended}, timeout=0.01)
            ended.cancel()
            continue
        try:
            writer.write((b"SLSYNC\x00\x01" + nonce) * 8194)
            await reader.readuntil(b"SLSYNA\x00\x01" + nonce)
            return True
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return False
        finally:
            writer.close()
    return False
