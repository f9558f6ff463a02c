"""A QEMU driver with a store, a guest kernel and a busybox image of its own, and a look at what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guestagent.binary import binary_path
from guestagent.errors import AgentMissing
from hostd import guestkernel, images
from hostd.cgroups import Hierarchy
from hostd.drivers.contract import Driver, LayerFile, StartPlan
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.plan import GuestKernel
from hostd.errors import KernelMissing
from hostd.journal import Handle
from hostd.spec import Resources
from sharedcache import oci
from sharedcache.store import Store
from tests.contract.driver_suite import SMALL, Programs, Rig, flood_bytes, spec_of
from tests.hostd.busybox import busybox, rootfs_tar

CACHE = Path("/var/cache/sandloom")
FIRST_UID = 260_000


def _sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


PROGRAMS = Programs(
    cat=("cat",),
    sleep=("sleep", "100000"),
    deaf=_sh("trap '' TERM INT HUP; echo ready; while :; do sleep 0.1; done"),
    polite=_sh("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done"),
    env=("env",),
    pwd=("pwd",),
    size=_sh("trap 'stty size' WINCH; stty size; read line & wait; while ! read -t 1 line; do :; done"),
    fault=_sh("kill -SEGV $$"),
    unrunnable=("/etc/passwd",),
    flood=("cat", "/flood"),
    say=_sh("printf out; printf err >&2; exit 7"),
)


@dataclass(frozen=True)
class Surroundings:
    """What drivers need and tests share: made once a session, since unpacking a kernel takes a while."""

    root: Path
    store: Store
    kernel: GuestKernel
    cgroups: Hierarchy
    layers: tuple[LayerFile, ...]
    archive: Path
    image_digest: str


@contextlib.contextmanager
def surroundings() -> Iterator[Surroundings]:
    """Skips, and says why, when guests cannot be booted here."""
    if os.geteuid() != 0:
        pytest.skip("needs root: each guest gets a uid and a cgroup of its own")
    program = busybox()
    if program is None:
        pytest.skip("needs busybox (Debian: busybox-static) for the guest's image")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64 (Debian: qemu-system-x86)")
    root = Path(tempfile.mkdtemp(prefix="sl-q-", dir="/var/tmp"))
    root.chmod(0o711)  # guests run as uids of their own and pass through it
    try:
        (root / "run").mkdir(mode=0o711)
        archive = root / "image.tar"
        archive.write_bytes(rootfs_tar(program, {"flood": flood_bytes()}))
        cgroups = Hierarchy.probe()
        cgroups.prepare()
        with Store.open(root / "store") as store:
            try:
                binary_path()
                kernel = guestkernel.prepare(store, root, CACHE)
            except (AgentMissing, KernelMissing) as error:
                pytest.skip(f"no guest can be booted: {error}")
            image = oci.import_archive(store, archive, domain=images.domain_of("acme"), cmd=("sh",))
            ready = images.take(store, spec_of("surroundings-image", SMALL, image.digest))
            yield Surroundings(root, store, kernel, cgroups, ready.layers, archive, image.digest)
    finally:
        shutil.rmtree(root)


class QemuRig(Rig):
    """See tests.contract.driver_suite.Rig."""

    programs = PROGRAMS

    def __init__(self, around: Surroundings, first_uid: int = FIRST_UID) -> None:
        self.around = around
        self.driver: Driver = self.new_driver()
        self._vm_uid = first_uid

    def new_driver(self) -> QemuDriver:
        return QemuDriver(self.around.kernel, "tcg", self.around.cgroups, boot_deadline_s=120.0)

    def plan(self, uid: str, resources: Resources = SMALL, layers: tuple[LayerFile, ...] | None = None) -> StartPlan:
        self._vm_uid += 1
        name = f"{uid}-{os.getpid()}"  # cgroups are the machine's: two test runs must not meet
        folder = self.around.root / "run" / name
        return StartPlan(
            spec_of(name, resources, hostname=uid),
            self.around.layers if layers is None else layers,
            self._vm_uid,
            folder,
        )

    def reborn(self) -> Driver:
        return self.new_driver()

    def kill(self, handle: Handle) -> None:
        os.kill(handle.pid, signal.SIGKILL)

    def left(self, plan: StartPlan) -> list[str]:
        return left_of(plan.spec.uid, plan.folder, plan.vm_uid)


def left_of(uid: str, folder: Path, vm_uid: int) -> list[str]:
    """Processes, cgroups, folders, sockets, mounts and memory files of one sandbox."""
    found = [f"folder {folder}"] if folder.exists() else []
    cgroup_root = Path("/sys/fs/cgroup")
    found += [
        f"cgroup {path}" for pattern in (f"*/sandloom/{uid}", f"sandloom/{uid}") for path in cgroup_root.glob(pattern)
    ]
    run = f"{folder.parent}/"  # another hostd on this machine gives its guests the same uids
    found += [
        f"process {pid}: {line}"
        for pid, line in processes()
        if uid in line or (owner(pid) == vm_uid and (run in line or parent(pid) == os.getpid()))
    ]
    for name in ("/proc/net/unix", "/proc/self/mountinfo"):
        found += [f"{name}: {line}" for line in Path(name).read_text().splitlines() if str(folder) in line]
    return found


def processes() -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process but this one; zombies show as their name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(entry.name), words or (entry / "comm").read_text().strip()


def parent(pid: int) -> int:
    """Whose child it is; -1 when it is gone. One that is ending has no command line to know it by."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def owner(pid: int) -> int:
    """The real uid of a process; -1 when it is gone."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return -1
