"""A guest's kernel turned against the layers: raw writes to the layer's device reach nobody.

The machine is the product's own command line; only the initramfs differs: busybox instead of our agent, since our
workloads never get near the device's node.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import initramfs, kernel
from hostd.drivers.contract import LayerFile
from hostd.drivers.qemu.command import GuestShape, qemu_argv
from hostd.spec import MemoryShape

pytestmark = pytest.mark.guest

BLOB_BYTES = 8 << 20
BOOT_DEADLINE_S = 90.0
INIT = b"""#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for m in $(cat /mod/order); do insmod /mod/$m; done
while [ ! -e /dev/pmem0 ]; do usleep 10000; done
for p in /sys/class/virtio-ports/*; do
  [ "$(cat $p/name)" = sandloom.agent ] && port=/dev/${p##*/}
done
exec <>$port >&0
echo READY
while read -r line; do eval "$line"; echo "DONE $?"; done
"""
APPLETS = ("sh", "mount", "insmod", "cat", "usleep", "echo", "dd", "sha256sum", "ls")


class Guest:
    """A busybox on the agent's port."""

    def __init__(self, folder: Path, shape: GuestShape) -> None:
        self.process = subprocess.Popen(qemu_argv(shape), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(BOOT_DEADLINE_S)
        give_up = time.monotonic() + 20
        while True:
            try:
                self._socket.connect(str(shape.agent_path))
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < give_up, folder
                time.sleep(0.01)
        self._file = self._socket.makefile("rwb", buffering=0)
        self._until(b"READY")

    def _until(self, word: bytes) -> bytes:
        said = b""
        for line in iter(self._file.readline, b""):
            if line.startswith(word):
                return said
            said += line
        raise AssertionError(f"the guest ended before {word!r}: {said!r}")

    def sh(self, line: str) -> str:
        self._file.write(line.encode() + b"\n")
        return self._until(b"DONE").decode()

    def end(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def boot_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox (Debian: busybox-static) for the guest's shell")
    folder = tmp_path_factory.mktemp("boot")
    files = kernel.extract(kernel.fetch(Path("/var/cache/sandloom")))
    order = initramfs.load_order(initramfs.WANTED, files.modules, files.built_in)
    archive = initramfs.initramfs(INIT, files.modules, order)
    extra = folder / "extra"
    (extra / "bin").mkdir(parents=True)
    shutil.copy(busybox, extra / "bin/busybox")
    for applet in APPLETS:
        (extra / "bin" / applet).symlink_to("busybox")
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=extra,
        input="\n".join(["bin", "bin/busybox", *(f"bin/{applet}" for applet in APPLETS)]).encode(),
        capture_output=True,
        check=True,
    ).stdout
    vmlinuz, initrd = folder / "vmlinuz", folder / "initrd"
    vmlinuz.write_bytes(files.vmlinuz)
    initrd.write_bytes(archive + packed)  # the kernel unpacks one archive after the other
    return vmlinuz, initrd


@pytest.fixture
def two_guests(boot_files: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[Guest, Guest, Path]]:
    """Two guests over one blob of random bytes."""
    blob = tmp_path / "blob"
    blob.write_bytes(os.urandom(BLOB_BYTES))
    layer = LayerFile(blob, BLOB_BYTES, bytes(16), 0)
    with contextlib.ExitStack() as stack:
        guests = []
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            shape = GuestShape(name, folder, *boot_files, "tcg", 1, MemoryShape(160, 0), (layer,))
            guest = Guest(folder, shape)
            stack.callback(guest.end)
            guests.append(guest)
        yield guests[0], guests[1], blob


def test_a_raw_write_reaches_neither_the_hosts_file_nor_another_guest(two_guests: tuple[Guest, Guest, Path]) -> None:
    writer, reader, blob = two_guests
    content = blob.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest in writer.sh("sha256sum /dev/pmem0")
    wrote = writer.sh("dd if=/dev/zero of=/dev/pmem0 bs=1M count=8 conv=fsync; echo wrote $?")
    assert "wrote" in wrote
    assert digest in reader.sh("sha256sum /dev/pmem0")
    assert digest in writer.sh("echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/pmem0")
    assert blob.read_bytes() == content
