"""A guest's kernel turned against the layers: raw writes to the layer's device reach nobody."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.drivers.contract import LayerFile
from hostd.drivers.qemu.command import GuestShape
from hostd.spec import MemoryShape
from tests.integration.rawguest import RawGuest, boot_files

pytestmark = pytest.mark.guest

BLOB_BYTES = 8 << 20


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox (Debian: busybox-static) for the guest's shell")
    return boot_files(tmp_path_factory.mktemp("boot"), Path(busybox))


@pytest.fixture
def two_guests(booted: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[RawGuest, RawGuest, Path]]:
    """Two guests over one blob of random bytes."""
    blob = tmp_path / "blob"
    blob.write_bytes(os.urandom(BLOB_BYTES))
    layer = LayerFile(blob, BLOB_BYTES, bytes(16), 0)
    with contextlib.ExitStack() as stack:
        guests = []
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            guest = RawGuest(GuestShape(name, folder, *booted, "tcg", 1, MemoryShape(160, 0), (layer,)))
            stack.callback(guest.end)
            guest.connect()
            guest.until(b"READY")
            guests.append(guest)
        yield guests[0], guests[1], blob


def test_a_raw_write_reaches_neither_the_hosts_file_nor_another_guest(
    two_guests: tuple[RawGuest, RawGuest, Path],
) -> None:
    writer, reader, blob = two_guests
    content = blob.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest in writer.sh("sha256sum /dev/pmem0")
    wrote = writer.sh("dd if=/dev/zero of=/dev/pmem0 bs=1M count=8 conv=fsync; echo wrote $?")
    assert "wrote" in wrote
    assert digest in reader.sh("sha256sum /dev/pmem0")
    assert digest in writer.sh("echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/pmem0")
    assert blob.read_bytes() == content
