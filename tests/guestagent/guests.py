"""Real guests: QEMU under TCG, Debian's cloud kernel, our agent as PID 1, layers of our own EROFS writer."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestagent.binary import binary_path
from guestagent.messages import Configure
from guestagent.protocol import SessionCarry
from hostd.drivers.contract import LayerFile
from hostd.drivers.qemu.command import CONSOLE_BYTES, GuestShape, qemu_argv
from hostd.initramfs import WANTED, initramfs, load_order
from hostd.kernel import KernelFiles, extract, fetch
from hostd.spec import MemoryShape
from tests.guestagent.realagent import Link
from tests.hostd.busybox import busybox
from tests.sharedcache.tarkit import convert

CACHE = Path("/var/cache/sandloom")
BOOT_DEADLINE_S = 90.0
UPPER_MIB = 32
MACHINE_ID = b"00112233445566778899aabbccddeeff"


def why_no_guests() -> str:
    """Why no guest can be booted here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root: layers are read and written as root's"
    if shutil.which("qemu-system-x86_64") is None:
        return "needs qemu-system-x86_64 (Debian: qemu-system-x86)"
    return "" if busybox() else "needs busybox (Debian: busybox-static) for the guest's image"


@functools.cache
def kernel_files() -> KernelFiles:
    """Debian's cloud kernel, from the cache or by apt."""
    return extract(fetch(CACHE))


@dataclass
class Image:
    """Layers in a folder, lowest first."""

    folder: Path
    layers: list[LayerFile] = field(default_factory=list)

    def add(self, tar: bytes) -> LayerFile:
        path = self.folder / f"layer{len(self.layers)}"
        meta = convert(tar, path)
        layer = LayerFile(path=path, size_bytes=path.stat().st_size, volume_uuid=meta.volume_uuid, gid=0)
        self.layers.append(layer)
        return layer

    @property
    def uuids(self) -> tuple[bytes, ...]:
        return tuple(layer.volume_uuid for layer in self.layers)


class Guest:
    """One QEMU. `elapsed_s` is from its exec to the agent's answer."""

    def __init__(self, folder: Path, image: Image, *, layers_as: str = "pmem", extra_module: str = "") -> None:
        files = kernel_files()
        order = load_order(WANTED, files.modules, files.built_in)
        modules = dict(files.modules)
        if extra_module:
            order.append(extra_module)
            modules[extra_module] = b"this is no module"
        self.folder, self._image = folder, image
        (folder / "vmlinuz").write_bytes(files.vmlinuz)
        (folder / "initrd").write_bytes(initramfs(binary_path().read_bytes(), modules, order))
        shape = GuestShape(
            uid="agenttest", folder=folder, kernel=folder / "vmlinuz", initrd=folder / "initrd", accel="tcg", vcpus=1,
            memory=MemoryShape(256, 512), layers=tuple(image.layers), layers_as=layers_as,
        )  # fmt: skip
        ring, file = f"ringbuf,id=console0,size={CONSOLE_BYTES}", f"file,id=console0,path={folder / 'console'}"
        argv = [file if word == ring else word for word in qemu_argv(shape)]
        begin = time.monotonic()
        with (folder / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.link = self.connect(deadline_s=BOOT_DEADLINE_S)
        except BaseException:
            self.close()
            raise
        self.elapsed_s = time.monotonic() - begin

    def connect(self, carry: SessionCarry | None = None, *, deadline_s: float = 20.0) -> Link:
        """A new connection to the agent's port; the one before must be closed."""
        give_up = time.monotonic() + deadline_s
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(self.folder / "agent.sock"))
                return Link.greet(sock, carry, deadline_s=give_up - time.monotonic())
            except OSError as error:
                sock.close()
                if self.process.poll() is not None or time.monotonic() > give_up:
                    raise AssertionError(f"no agent: {error}: {self.console}{self.log}") from error
            time.sleep(0.02)

    def configuration(self, **changes: Any) -> Configure:
        values: dict[str, Any] = {
            "hostname": b"loom-1", "layers": self._image.uuids, "upper_mib": UPPER_MIB, "entropy": os.urandom(64),
            "machine_id": MACHINE_ID, "time_unix_ns": time.time_ns(), "deadline_ms": 20_000,
        }  # fmt: skip
        return Configure(**{**values, **changes})

    def qmp(self, command: str, **arguments: object) -> Any:
        """One command over a connection of its own."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self.folder / "qmp.sock"))
            stream = sock.makefile("rw", encoding="utf-8")
            stream.readline()
            for step in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(step) + "\n")
                stream.flush()
                answer: dict[str, Any] = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(stream.readline())
            assert "return" in answer, answer
            return answer["return"]

    @property
    def console(self) -> str:
        path = self.folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def log(self) -> str:
        return (self.folder / "qemu.log").read_text(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
