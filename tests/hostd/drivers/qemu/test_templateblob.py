"""A template's memory: what is written comes back, sparse, and nobody can change it afterwards."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from pathlib import Path

import pytest

from hostd.drivers.qemu import templateblob
from hostd.errors import TemplateUnusable

RAM_BYTES = 16 << 20
STATE = b"device state " * 1001
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    """RAM with data in three places, state of odd length."""
    path = tmp_path / "blob"
    ram = templateblob.new_ram(RAM_BYTES)
    for at, data in ((0, b"start"), (5 << 20, b"x" * 9000), (RAM_BYTES - 4096, b"end" * 100)):
        os.pwrite(ram, data, at)
    os.pwrite(ram, bytes(1 << 20), 8 << 20)  # zeros that were written: no content
    with templateblob.FrozenGuest(ram, RAM_BYTES, STATE) as frozen, frozen.seal() as memory, path.open("wb") as out:
        templateblob.write_blob(memory, out)
    return path


def test_load_gives_back_what_was_written(blob: Path) -> None:
    with templateblob.load(blob) as memory:
        ram = os.pread(memory.ram_fd, RAM_BYTES, 0)
        assert memory.ram_bytes == len(ram) == RAM_BYTES
        assert ram[:5] == b"start"
        assert ram[5 << 20 : (5 << 20) + 9000] == b"x" * 9000
        assert ram[-4096:-3796] == b"end" * 100
        assert len(ram.replace(b"\0", b"")) == 5 + 9000 + 300
        assert os.pread(memory.state_fd, 1 << 20, 0) == STATE


def test_zeros_take_no_room(blob: Path) -> None:
    assert blob.stat().st_blocks * 512 < 128 << 10
    with templateblob.load(blob) as memory:
        assert os.fstat(memory.ram_fd).st_blocks * 512 < 128 << 10


def test_the_same_memory_gives_the_same_blob(blob: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    with templateblob.load(blob) as memory, again.open("wb") as out:
        templateblob.write_blob(memory, out)
    assert again.read_bytes() == blob.read_bytes()


def test_sealed_memory_cannot_be_written_punched_or_resized(blob: Path) -> None:
    with templateblob.load(blob) as memory:
        for descriptor in (memory.ram_fd, memory.state_fd):
            assert templateblob.is_sealed(descriptor)
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # as QEMU opens it
            try:
                with pytest.raises(PermissionError):
                    os.pwrite(again, b"evil", 0)
                with pytest.raises(PermissionError):
                    os.ftruncate(again, 0)
                with pytest.raises(PermissionError):
                    mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                assert _punch(again) == errno.EPERM
            finally:
                os.close(again)


def test_a_private_mapping_is_its_own(blob: Path) -> None:
    with templateblob.load(blob) as memory:
        with mmap.mmap(memory.ram_fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mine:
            mine[:5] = b"mine!"
            assert mine[:5] == b"mine!"
        assert os.pread(memory.ram_fd, 5, 0) == b"start"


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 5000, b"SLTMPL01" + b"\xff" * 16])
def test_what_is_no_template_is_named(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(damage)
    with pytest.raises(TemplateUnusable, match="odd"):
        templateblob.load(path)


def test_a_cut_blob_is_no_template(blob: Path) -> None:
    os.truncate(blob, blob.stat().st_size - 1)
    with pytest.raises(TemplateUnusable):
        templateblob.load(blob)


def test_a_guest_that_is_not_sealed_leaves_no_descriptor() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with templateblob.FrozenGuest(templateblob.new_ram(4096), 4096, b"s"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_memory_is_taken_over_from_a_running_clone(blob: Path) -> None:
    """A process that holds the template's memfd, as QEMU does, gives it to the next hostd: the same inode."""
    with templateblob.load(blob) as memory:
        holder = subprocess.Popen(["sleep", "100"], pass_fds=(memory.ram_fd,))
        inode = os.fstat(memory.ram_fd).st_ino
    try:
        with templateblob.from_clone(blob, holder.pid) as taken:
            assert os.fstat(taken.ram_fd).st_ino == inode
            assert templateblob.is_sealed(taken.ram_fd)
            assert os.pread(taken.state_fd, 1 << 20, 0) == STATE
        with pytest.raises(TemplateUnusable, match="maps no template"):
            templateblob.from_clone(blob, os.getpid())
    finally:
        holder.kill()
        holder.wait()


def test_failed_loads_leave_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(b"\0" * 100)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(TemplateUnusable):
            templateblob.load(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def _punch(descriptor: int) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate(descriptor, FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(4096))
    return ctypes.get_errno()
