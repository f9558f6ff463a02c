"""A real cgroup v2 hierarchy: a guest whose kernel has no other, our own code in it, on a Debian userland's Python.

The machines that tests run on have v1, and may have v2 without controllers: here memory, cpu and pids are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostd.drivers.contract import LayerFile
from hostd.drivers.qemu.command import GuestShape
from hostd.spec import MemoryShape
from tests.integration.rawguest import RawGuest, boot_files
from tests.sharedcache.tarkit import convert

pytestmark = pytest.mark.guest
ROOT = Path(__file__).parents[2]
MIB = 1 << 20
BIG_BYTES = 24 << 20
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from hostd.cgroups import Hierarchy, Limits
from hostd.drivers.oci.memory import SandboxMemory

MIB = 1 << 20
HOLD = "import sys; held = bytearray(b'x') * (int(sys.argv[1]) << 20); print('held', flush=True); sys.stdin.read()"


def inside(procs, code, *words):
    join = "".join(f"open({str(path)!r}, 'w').write('0');" for path in procs)
    argv = [sys.executable, "-c", join + code, *map(str, words)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


told = {}
cgroups = Hierarchy.probe()
told["version"] = cgroups.version
cgroups.prepare()
procs = cgroups.create("box", Limits(96 * MIB, 500, 64))
folder = cgroups.folders("box")[0]
told["files"] = {name: (folder / name).read_text().strip() for name in ("memory.max", "cpu.max", "pids.max")}
memory = SandboxMemory(cgroups, "box")

holder = inside(procs, HOLD, 40)
told["held"] = holder.stdout.readline().decode()
told["pids"] = cgroups.pids("box") == {holder.pid}
told["used"] = memory.usage().used_bytes >> 20
told["grown"] = memory.step(160 * MIB), memory.limit_bytes() >> 20
told["shrink_in_use"] = memory.step(24 * MIB), memory.limit_bytes() >> 20
told["alive"] = holder.poll() is None
holder.stdin.close()
holder.wait()
told["shrunk"] = memory.step(24 * MIB), memory.limit_bytes() >> 20

memory.step(128 * MIB)
reader = inside(procs, "import sys; open('/mnt/code/big', 'rb').read(); print('read', flush=True); sys.stdin.read()")
reader.stdout.readline()
told["cached"] = memory.usage().file_bytes >> 20
told["reclaimed"] = memory.reclaim(16 * MIB) >> 20
told["cached_after"] = memory.usage().file_bytes >> 20
told["limit_after"] = memory.limit_bytes() >> 20

greedy = inside(procs, HOLD, 400)
told["greedy"] = greedy.wait()
told["oom_kills"] = memory.oom_kills(), memory.signals().oom_kills
told["psi"] = memory.signals().psi_some_us > 0
cgroups.set_limits("box", Limits(64 * MIB, 1500, 8))
told["set"] = (folder / "cpu.max").read_text().strip()
killed = cgroups.remove("box")
told["removed"] = not folder.exists(), reader.pid in killed, reader.wait()
cgroups.retire()
told["retired"] = not folder.parent.exists()
print("TOLD", json.dumps(told))
"""
CODE = (
    "hostd/__init__.py", "hostd/cgroups.py", "hostd/errors.py", "hostd/drivers/__init__.py", "hostd/memory/__init__.py",
    "hostd/memory/values.py", "hostd/drivers/oci/__init__.py", "hostd/drivers/oci/memory.py",
)  # fmt: skip
SET_UP = """
mkdir -p /u /code /w; mount -t erofs -o ro,dax=always /dev/pmem0 /u && mount -t erofs -o ro /dev/pmem1 /code &&
 mount -t proc p /u/proc && mount -t sysfs s /u/sys && mount -t cgroup2 c /u/sys/fs/cgroup && mount -t tmpfs t /u/mnt &&
 mkdir /u/mnt/code && mount -t tmpfs -o size=64m t /u/tmp && mount --bind /code /u/mnt/code && echo UP
"""


def layer_of(tar: Path, blob: Path) -> LayerFile:
    meta = convert(tar, blob)
    return LayerFile(blob, meta.blob_bytes, meta.volume_uuid, 0)


@pytest.fixture(scope="module")
def told(userland: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What our code found in a guest that has cgroup v2 only."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox (Debian: busybox-static) for the guest's shell")
    folder = tmp_path_factory.mktemp("v2")
    with tarfile.open(folder / "code.tar", "w") as archive:
        for name in CODE:
            archive.add(ROOT / name, name)
        (folder / "program.py").write_text(PROGRAM)
        (folder / "big").write_bytes(os.urandom(BIG_BYTES))
        archive.add(folder / "big", "big")
        archive.add(folder / "program.py", "program.py")
    layers = layer_of(userland, folder / "userland.blob"), layer_of(folder / "code.tar", folder / "code.blob")
    boot = boot_files(folder, Path(busybox))
    with contextlib.ExitStack() as stack:
        guest = RawGuest(GuestShape("v2", folder, *boot, "tcg", 1, MemoryShape(640, 0), layers))
        stack.callback(guest.end)
        guest.connect()
        guest.until(b"READY")
        assert "UP" in guest.sh(SET_UP.replace("\n", " "))
        line = "PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/mnt/code chroot /u /usr/bin/python3 /mnt/code/program.py 2>&1"
        said = guest.sh(line)
        assert "TOLD" in said, said
        yield json.loads(said.rpartition("TOLD")[2])


def test_it_is_v2_with_its_controllers(told: dict[str, Any]) -> None:
    assert told["version"] == 2
    assert told["files"] == {"memory.max": str(96 * MIB), "cpu.max": "50000 100000", "pids.max": "64"}
    assert told["set"] == "150000 100000"


def test_memory_grows_and_shrinks_without_a_kill(told: dict[str, Any]) -> None:
    assert told["held"] == "held\n" and told["pids"] and told["used"] >= 40
    assert told["grown"] == [True, 160]
    reached, limit_mib = told["shrink_in_use"]
    assert not reached and 40 <= limit_mib < 160
    assert told["alive"]
    assert told["shrunk"] == [True, 24]


def test_idle_page_cache_is_taken_back_and_the_limit_stays(told: dict[str, Any]) -> None:
    assert told["limit_after"] == 128
    assert told["cached"] >= 20
    assert told["reclaimed"] >= 12
    assert told["cached_after"] <= told["cached"] - 12


def test_the_limit_is_hard_and_kills_are_counted(told: dict[str, Any]) -> None:
    assert told["greedy"] == -9
    assert told["oom_kills"][0] == told["oom_kills"][1] >= 1


def test_nothing_stays(told: dict[str, Any]) -> None:
    assert told["removed"] == [True, True, -9]
    assert told["retired"]
    assert os.geteuid() == 0
