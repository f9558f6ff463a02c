"""QEMU keeps the contract of warm guests, with real clones."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hostd import images
from hostd.drivers.contract import LayerFile
from hostd.drivers.qemu import rehearsal
from hostd.drivers.qemu.accel import cpu_identity, qemu_version
from hostd.drivers.qemu.cloning import Cloner
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.template import GuestIdentity
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Vmms
from sharedcache import oci
from tests.contract.driver_suite import Rig, collect, command, spec_of
from tests.contract.warming_suite import WarmingSuite, sandbox_for, warming_of
from tests.hostd.busybox import busybox
from tests.hostd.drivers.qemu.rig import QemuRig, Surroundings
from tests.sharedcache.tarkit import header, make_tar

pytestmark = pytest.mark.guest
FIRST_UID = 262_000
BOOT_DEADLINE_S = 120.0
CLINGING = b"""#!/bin/busybox sh
trap '' TERM INT HUP
for path in /tmp/left /etc/left /dev/shm/left /left; do echo left > $path; done 2>/dev/null
(trap '' TERM; busybox setsid busybox sleep 100000 &)
while :; do busybox sleep 1; done
"""
LOOK = """
echo /proc/[0-9]*
busybox find / -xdev -type f -mmin -60 | busybox sort
busybox ls -A /tmp /dev/shm
busybox cat /proc/self/personality
busybox hostname
"""
OWN_FILES = ["/etc/hostname", "/etc/hosts", "/etc/machine-id", "/etc/resolv.conf"]


def clinging_image(around: Surroundings, folder: Path) -> tuple[LayerFile, ...]:
    """An image whose sh and true write wherever they can, leave another behind, and never end."""
    program = busybox()
    assert program is not None, "surroundings skip without it"
    folders = [header(name, kind=tarfile.DIRTYPE) for name in ("bin", "etc", "tmp", "proc", "sys", "dev")]
    files = [(header("bin/busybox", mode=0o755), program.read_bytes())]
    files += [(header(f"bin/{name}", mode=0o755), CLINGING) for name in ("sh", "true")]
    archive = folder / "clinging.tar"
    archive.write_bytes(make_tar(*folders, *files))
    image = oci.import_archive(around.store, archive, domain=images.domain_of("acme"), cmd=("sh",))
    return images.take(around.store, spec_of("clinging-image", image_digest=image.digest)).layers


class WarmQemuRig(QemuRig):
    """With templates to clone from."""

    def __init__(self, around: Surroundings, templates: Templates) -> None:
        self._templates = templates
        super().__init__(around, FIRST_UID)

    def new_driver(self) -> QemuDriver:
        kernel, cgroups = self.around.kernel, self.around.cgroups
        identity = GuestIdentity(kernel.digest, kernel.initrd_digest, qemu_version(), cpu_identity("tcg"))
        vmms = Vmms(cgroups, BOOT_DEADLINE_S)
        cloner = Cloner(self._templates, kernel, identity, "tcg", vmms, self.around.root / "run")
        return QemuDriver(kernel, "tcg", cgroups, boot_deadline_s=BOOT_DEADLINE_S, cloner=cloner)


class TestQemuWarming(WarmingSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, around: Surroundings) -> AsyncIterator[Rig]:
        told: list[tuple[str, str]] = []
        async with Templates(around.store, lambda reason, message: told.append((reason, message))) as templates:
            yield WarmQemuRig(around, templates)
            assert [reason for reason, _ in told if reason != "TemplateReady"] == []

    async def test_nothing_that_a_clinging_image_did_is_left_for_the_claim(
        self, rig: Rig, around: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rehearsal, "RUN_DEADLINE_S", 0.5)
        assert isinstance(rig, QemuRig)
        plan = rig.plan("clung-to", layers=await asyncio.to_thread(clinging_image, around, tmp_path))
        guest = await warming_of(rig).prewarm(plan, lambda _: None)
        assert guest.unrehearsed == ""
        mine = sandbox_for(plan, "victim")
        engine = await warming_of(rig).claim(guest, mine, lambda _: None)
        try:
            looking = await engine.spawn(command(("/bin/busybox", "sh", "-c", LOOK)), main=False)
            out, _, ended = await collect(looking)
            assert ended.code == 0
            seen = ["/proc/1", "/proc/2", *OWN_FILES, "/dev/shm:", "/tmp:", "00000000", "victim"]
            assert sorted(out.decode().split()) == sorted(seen)
        finally:
            await engine.detach()
            await rig.driver.destroy("victim", mine.folder, engine.handle)
        assert rig.left(plan) == []
