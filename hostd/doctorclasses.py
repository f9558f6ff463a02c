"""What the doctor says of the three classes: which kernel serves a sandbox, what that protects, and what not."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hostd.drivers.oci import probe

GUEST = (
    "a kernel of its own in a virtual machine. Protects the host's kernel and other sandboxes from its programs and"
    " from its kernel, with KVM. Not: from flaws of QEMU or KVM, nor from what CPUs leak between threads"
)
USER = (
    "a kernel in user space (runsc) answers its system calls with few of the host's own. Protects the host's kernel"
    " from its programs. Not: from flaws of that kernel, nor from what CPUs leak; rare calls are not there"
)
HOST = (
    "the host's own kernel behind namespaces, no new privileges, few capabilities, a seccomp filter, masked paths and a"
    " cgroup (crun). Protects files, processes and memory of others from mistakes. Not: from flaws of the host's"
    " kernel, which all of its programs can reach: trusted work only"
)
NO_ROOT = "needs root: EROFS, overlayfs and cgroups are mounted and made on the host; there is no rootless mode"


@dataclass(frozen=True)
class ClassWord:
    """What is said of one class. `missing` says why this machine cannot run it; "" when it can, or nothing is known."""

    name: str
    detail: str
    missing: str = ""
    fix: str = ""


def words(cache_dir: Path) -> list[ClassWord]:
    """Of all three. What was found out by trying (hostd does, at its start) is said, too. Blocks."""
    return [ClassWord("class guest-kernel", GUEST), _oci("user-kernel", "runsc", USER, cache_dir), _oci(
        "host-kernel", "crun", HOST, cache_dir)]  # fmt: skip


def _oci(name: str, runtime: str, detail: str, cache_dir: Path) -> ClassWord:
    title = f"class {name}"
    if os.geteuid() != 0:
        return ClassWord(title, detail, NO_ROOT, "run as root (sudo)")
    binary = shutil.which(runtime)
    if binary is None:
        return ClassWord(title, detail, f"{runtime} is not installed", f"apt-get install {runtime}")
    verdict = probe.kept(cache_dir, binary)
    if verdict is not None and not verdict.works:
        return ClassWord(title, detail, " ".join(verdict.why.split()), "mend that, or leave the class out")
    found = "" if verdict is None else f" Here: {' '.join(verdict.why.split())}."
    return ClassWord(title, f"{detail}.{found}")
