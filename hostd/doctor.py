"""`sandloom doctor`: is this machine fit, what protects what, and what to do about the rest.

Each check is a fact with a verdict (ok, warn, fail) and, where it is not ok, what mends it. fail means that sandboxes
cannot run; warn that something promised is weaker here. hostd refuses to start on KSM and on a missing cgroup.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from guestagent.binary import binary_path
from guestagent.errors import AgentError
from hostd import doctorclasses
from hostd.cgroups import Hierarchy
from hostd.drivers.qemu.accel import TCG_NOTE, Verdict, cache_path, cached, decide, qemu_version
from hostd.drivers.qemu.command import GuestShape
from hostd.errors import ConfigError, HostdError
from hostd.kernel import META_PACKAGE, extract, fetch, package_name
from hostd.memory import elasticfile
from hostd.spec import MIN_BASE_RAM_MIB, MemoryShape

KSM_RUN = Path("/sys/kernel/mm/ksm/run")
WANTED_MEMORY_MIB, WANTED_DISK_MIB = 1024, 2048
_SYS_CACHESTAT = 451  # x86-64 and the generic table (include/uapi/asm-generic/unistd.h, Linux 6.5)


@dataclass(frozen=True)
class Check:
    """One line of the report. `status` is ok, warn or fail; `fix` says what to do about the last two."""

    name: str
    status: str
    detail: str
    fix: str = ""


def require_no_ksm(path: Path = KSM_RUN) -> None:
    """ConfigError when the kernel merges equal pages: it would share across domains behind our back."""
    try:
        running = path.read_text().strip() == "1"
    except OSError:
        return
    if running:
        raise ConfigError(
            f"KSM is on: it shares equal pages across sharing domains, which tenants can time. `echo 2 > {path}` turns"
            " it off and unmerges what it merged"
        )


def check_root() -> Check:
    """hostd gives each VM a uid and a cgroup of its own, which takes root."""
    if os.geteuid() == 0:
        return Check("root", "ok", "running as root")
    return Check("root", "fail", f"running as uid {os.geteuid()}", "run as root (sudo)")


def check_qemu() -> Check:
    """Is there a QEMU for x86-64 guests?"""
    version = qemu_version()
    if version:
        return Check("qemu", "ok", version)
    return Check("qemu", "fail", "qemu-system-x86_64 is not installed", "apt-get install qemu-system-x86")


def check_tools() -> Check:
    """Programs that are called by name."""
    missing = [name for name in ("setpriv", "dpkg-deb", "apt-get") if shutil.which(name) is None]
    if missing:
        return Check("tools", "fail", f"not found: {', '.join(missing)}", "apt-get install util-linux dpkg apt")
    return Check("tools", "ok", "setpriv, dpkg-deb, apt-get")


def check_agent() -> Check:
    """Is the in-guest agent built?"""
    try:
        path = binary_path()
    except AgentError as error:
        return Check("agent", "fail", str(error), "make setup")
    return Check("agent", "ok", f"{path.stat().st_size >> 10} KiB, static")


def check_kernel() -> Check:
    """Can apt give us a guest kernel?"""
    try:
        return Check("guest kernel", "ok", package_name())
    except HostdError as error:
        return Check("guest kernel", "warn", str(error), f"apt-get update, so that apt knows {META_PACKAGE}")


def check_ksm() -> Check:
    """Kernel samepage merging must be off."""
    try:
        require_no_ksm()
    except ConfigError as error:
        return Check("ksm", "fail", str(error), f"echo 2 > {KSM_RUN}")
    return Check("ksm", "ok", "off: pages are shared only where a sharing domain says so")


def check_cgroups() -> Check:
    """Which cgroups are there?"""
    try:
        hierarchy = Hierarchy.probe()
    except ConfigError as error:
        return Check("cgroups", "fail", str(error), "mount cgroup2 on /sys/fs/cgroup")
    return Check("cgroups", "ok", f"v{hierarchy.version}")


def check_residency() -> Check:
    """How page-cache residency can be asked for."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_SYS_CACHESTAT, -1, 0, 0, 0)
    if ctypes.get_errno() == 38:  # ENOSYS; with the call there it is EBADF
        return Check("page cache", "warn", "no cachestat(2): residency by mincore, without dirty and evicted counts")
    return Check("page cache", "ok", "cachestat(2)")


def check_huge_tmpfs() -> Check:
    """Whether elastic memory stands on huge pages, which makes taking it back far cheaper. By trying."""
    backing = elasticfile.probe()
    return Check("elastic memory", "ok" if backing.huge else "warn", str(backing))


def check_resources() -> Check:
    """Is there room for a guest or two?"""
    memory_mib = psutil.virtual_memory().available >> 20
    disk_mib = shutil.disk_usage("/").free >> 20
    detail = f"{memory_mib} MiB of memory available, {disk_mib} MiB of disk free, {os.cpu_count()} CPUs"
    if memory_mib < WANTED_MEMORY_MIB or disk_mib < WANTED_DISK_MIB:
        return Check(
            "room", "warn", detail, f"want {WANTED_MEMORY_MIB} MiB of memory and {WANTED_DISK_MIB} MiB of disk"
        )
    return Check("room", "ok", detail)


def check_accel(probe: bool, cache_dir: Path) -> Check:
    """Which accelerator works: a guest is booted to find out (only with --probe, or when it was done before)."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Check("accelerator", "warn", f"tcg: no usable /dev/kvm. {TCG_NOTE}", "run where KVM is")
    try:
        verdict = asyncio.run(_probe(cache_dir)) if probe else _kept_verdict(cache_dir)
    except (HostdError, AgentError) as error:
        return Check("accelerator", "fail", str(error), "mend what it names and probe again")
    if verdict is None:
        return Check(
            "accelerator", "ok", "/dev/kvm is there; `sandloom doctor --probe` boots a guest to see if it works"
        )
    if verdict.accel == "kvm":
        return Check("accelerator", "ok", "kvm: a guest booted on it")
    why = " ".join(verdict.why.split())  # QEMU's own words, of several lines
    return Check("accelerator", "warn", f"tcg: {why}. {TCG_NOTE}", "run where KVM works")


def check_classes(cache_dir: Path) -> list[Check]:
    """What each class protects against, and what not."""
    found = doctorclasses.words(cache_dir)
    return [
        Check(
            one.name,
            "warn" if one.missing else "ok",
            f"{one.missing + ': ' if one.missing else ''}{one.detail}",
            one.fix,
        )
        for one in found
    ]


def _kept_verdict(cache_dir: Path) -> Verdict | None:
    """What a probe, or a hostd that started since this machine did, found out for the present kernel and QEMU."""
    try:
        version = package_name().removeprefix("linux-image-")
    except HostdError:
        return None  # its own check says so
    return cached(cache_path(cache_dir, version))


async def _probe(cache_dir: Path) -> Verdict:
    files = await asyncio.to_thread(lambda: extract(fetch(cache_dir)))
    with tempfile.TemporaryDirectory(prefix="sandloom-doctor-") as folder:
        kernel, initrd = Path(folder) / "vmlinuz", Path(folder) / "initrd"
        kernel.write_bytes(files.vmlinuz)
        initrd.write_bytes(files.initramfs(binary_path().read_bytes()))
        shape = GuestShape(
            "probe", Path(folder), kernel, initrd, "kvm", 1, MemoryShape(MIN_BASE_RAM_MIB, 0)
        )  # fmt: skip
        return await decide("auto", shape, files.version, cache_dir)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_root,
    check_qemu,
    check_tools,
    check_agent,
    check_kernel,
    check_ksm,
    check_cgroups,
    check_residency,
    check_huge_tmpfs,
    check_resources,
)


def report(*, probe: bool, cache_dir: Path) -> list[Check]:
    """Every check, in order."""
    return [*(check() for check in CHECKS), check_accel(probe, cache_dir), *check_classes(cache_dir)]


def main(arguments: list[str], cache_dir: Path = Path("/var/cache/sandloom")) -> int:
    """Prints the report; exit status 1 when a check failed."""
    checks = report(probe="--probe" in arguments, cache_dir=cache_dir)
    if "--json" in arguments:
        json.dump({"checks": [asdict(check) for check in checks]}, sys.stdout)
        print()
    else:
        for check in checks:
            print(f"{check.status:4}  {check.name:20} {check.detail}")
            if check.fix and check.status != "ok":
                print(f"      {'':20} -> {check.fix}")
    return 1 if any(check.status == "fail" for check in checks) else 0
