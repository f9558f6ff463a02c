"""Guests whose kernel is an attacker's: the product's command line, and a root shell of busybox on the agent's port.

Only the initramfs differs: busybox instead of our agent, since our workloads never get near a device.
The shell outlives its host's connection, so that such a guest can be frozen and cloned.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hostd import initramfs, kernel
from hostd.drivers.qemu.command import GuestShape, qemu_argv

BOOT_DEADLINE_S = 90.0
CACHE = Path("/var/cache/sandloom")
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
while :; do
  while read -r line; do eval "$line"; echo "DONE $?"; done
  usleep 5000
done
"""
APPLETS = (
    "sh",
    "chroot",
    "mount",
    "insmod",
    "cat",
    "usleep",
    "echo",
    "dd",
    "sha256sum",
    "ls",
    "mkdir",
    "grep",
    "sleep",
    "cut",
)


class RawGuest:
    """Its QEMU and its shell. `inherit` are descriptors that the command line names."""

    def __init__(self, shape: GuestShape, inherit: Sequence[int] = ()) -> None:
        self.shape = shape
        argv = qemu_argv(shape)
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=inherit)
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """To the shell's port, as soon as QEMU listens."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(BOOT_DEADLINE_S)
        give_up = time.monotonic() + 20
        while True:
            try:
                self._socket.connect(str(self.shape.agent_path))
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < give_up, self.shape.folder
                time.sleep(0.01)
        self._file = self._socket.makefile("rwb", buffering=0)

    def disconnect(self) -> None:
        """The shell stays."""
        if self._socket is not None:
            self._file.close()
            self._socket.close()
            self._socket = None

    def until(self, word: bytes) -> bytes:
        """What it says before a line that begins with `word`."""
        said = b""
        for line in iter(self._file.readline, b""):
            if line.startswith(word):
                return said
            said += line
        raise AssertionError(f"the guest ended before {word!r}: {said!r}")

    def sh(self, line: str) -> str:
        """What a line of shell says."""
        self._file.write(line.encode() + b"\n")
        return self.until(b"DONE").decode()

    def end(self) -> None:
        self.disconnect()
        self.process.kill()
        self.process.communicate(timeout=20)


def boot_files(folder: Path, busybox: Path, programs: Mapping[str, Path] | None = None) -> tuple[Path, Path]:
    """(kernel, initramfs) in `folder`; `programs` are more static ones for /bin."""
    files = kernel.extract(kernel.fetch(CACHE))
    order = initramfs.load_order(initramfs.WANTED, files.modules, files.built_in)
    archive = initramfs.initramfs(INIT, files.modules, order)
    extra = folder / "extra"
    (extra / "bin").mkdir(parents=True)
    binaries = {"busybox": busybox, **(programs or {})}
    for name, source in binaries.items():
        shutil.copy(source, extra / "bin" / name)
    for applet in APPLETS:
        (extra / "bin" / applet).symlink_to("busybox")
    names = ["bin", *(f"bin/{name}" for name in (*binaries, *APPLETS))]
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=extra,
        input="\n".join(names).encode(),
        capture_output=True,
        check=True,
    ).stdout
    vmlinuz, initrd = folder / "vmlinuz", folder / "initrd"
    vmlinuz.write_bytes(files.vmlinuz)
    initrd.write_bytes(archive + packed)  # the kernel unpacks one archive after the other
    return vmlinuz, initrd
