"""Guests, user-kernel and host-kernel sandboxes of one image hold its pages once: real ones, page by page."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from hostd import images, ledger
from hostd.drivers.contract import Engine, LayerFile, StartPlan
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.mounts import Layers, mounted
from hostd.drivers.onecopy import OneCopy, mapped_blobs
from hostd.drivers.pieces import MAGIC, PIECES_A_TABLE, Piece, chosen, find, tables
from hostd.drivers.qemu.vmm import ONE_COPY
from hostd.spec import Resources
from native import _dax
from sharedcache import oci
from tests.contract.driver_suite import SMALL, command, spec_of
from tests.hostd.busybox import busybox, rootfs_tar
from tests.hostd.drivers.oci.rig import OciRig, Surroundings, layer_of, run
from tests.hostd.drivers.qemu.rig import QemuRig
from tests.hostd.drivers.qemu.rig import surroundings as guests_surroundings
from tests.sharedcache.tarkit import header, make_tar

MIB = 1 << 20
BIG_MIB = 8
READER = """
import mmap, os, sys
blob = os.open(sys.argv[1], os.O_RDONLY)
whole = mmap.mmap(blob, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
for name in sys.argv[2:]:
    table = os.open(name, os.O_RDONLY)
    mmap.mmap(table, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ).close()
sys.stdout.buffer.write(whole[:])
sys.stdout.flush()
sys.stdin.read()
"""


# What is which piece.


def test_the_largest_pieces_are_chosen_and_stand_in_the_blob_s_order() -> None:
    pieces = [Piece(4096 * at, 4096 * length, b"%d" % at) for at, length in ((1, 1), (5, 3), (2, 2), (9, 2))]
    assert [one.offset >> 12 for one in chosen(pieces, 3)] == [2, 5, 9]


def test_tables_are_whole_pages_and_many_pieces_take_several() -> None:
    pieces = [Piece(4096 * at, 4096, b"name%d" % at) for at in range(PIECES_A_TABLE + 3)]
    first, second = tables((7, 9), Path("/some/mount"), pieces)
    assert len(first) % 4096 == len(second) % 4096 == 0
    assert first.startswith(MAGIC) and second.startswith(MAGIC)
    assert first.count(b"name") == PIECES_A_TABLE and second.count(b"name") == 3


def test_blobs_are_read_off_a_process_s_maps() -> None:
    maps = (
        "7f00-7f10 r--s 00000000 fe:00 12 /store/one/blob\n7f10-7f20 r--s 00002000 fe:00 12 /store/two/blob\n"
        "7f20-7f30 r--p 00000000 fe:00 13 /usr/lib/libc.so\n7f30-7f40 rw-s 00000000 00:01 14 /memfd:ram (deleted)\n"
    )
    assert mapped_blobs(maps) == [Path("/store/one/blob")]


@pytest.fixture
def place(around: Surroundings, tmp_path: Path) -> Iterator[tuple[LayerFile, Layers, Path]]:
    """A layer of files large and small, sparse and linked, mounted."""
    layer = layer_of(
        make_tar(
            header("bin", kind=b"5"),
            (header("bin/large"), os.urandom(3 * MIB + 17)),
            (header("bin/page"), os.urandom(4096)),
            (header("bin/small"), b"small"),
            header("bin/hard", linkname="bin/large", kind=b"1"),
            (header("secret", mode=0o600), os.urandom(9000)),
            header("link", linkname="bin/large", kind=b"2"),
        ),
        tmp_path / "blob",
    )
    layers, folder = Layers(tmp_path / "m"), tmp_path / "box"
    folder.mkdir()
    layers.mount_rootfs(folder, (layer,), 16)
    yield layer, layers, tmp_path
    layers.unmount_rootfs(folder)
    assert [one.at for one in mounted() if one.at.startswith(str(tmp_path))] == []
    assert list((tmp_path / "m").iterdir()) == []


def test_every_file_of_a_page_and_more_is_a_piece_of_the_blob(place: tuple[LayerFile, Layers, Path]) -> None:
    layer, layers, _ = place
    point, blob = layers.point(layer), layer.path.read_bytes()
    found = find(point)
    names = {one.path for one in found}
    assert names - {b"bin/hard", b"bin/large"} == {b"bin/page", b"secret"}
    assert len(names) == 3  # one of the two names of the large one
    for one in found:
        data = (point / one.path.decode()).read_bytes()
        assert blob[one.offset : one.offset + one.length] == data.ljust(one.length, b"\0")


def reader(blob: Path, *tables: Path) -> subprocess.Popen[bytes]:
    """A process that maps a blob as QEMU does, and is given tables."""
    argv = [sys.executable, "-c", READER, str(blob), *map(str, tables)]
    environment = {**os.environ, "LD_PRELOAD": str(ONE_COPY)}
    return subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def read_and_mapped(process: subprocess.Popen[bytes], size: int) -> tuple[bytes, set[str]]:
    """All that it read, and which files it maps."""
    assert process.stdout is not None
    data = process.stdout.read(size)
    return data, {one.path for one in _dax.smaps(process.pid)}


def test_a_mapping_s_pieces_are_the_mount_s_files_and_its_bytes_the_blob_s(
    place: tuple[LayerFile, Layers, Path],
) -> None:
    layer, layers, _ = place
    with reader(layer.path, *layers.tables(layer.path)) as process:
        data, paths = read_and_mapped(process, layer.size_bytes)
        assert data == layer.path.read_bytes()
        mount = layers.point(layer)
        assert {str(mount / name) for name in ("bin/page", "secret")} < paths
        assert layers.release() == []  # an overlay has it
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("flaw", ["writable", "another's", "cut off", "beyond", "elsewhere", "gone"])
def test_a_table_that_is_not_to_be_trusted_changes_nothing(place: tuple[LayerFile, Layers, Path], flaw: str) -> None:
    layer, layers, tmp_path = place
    good, point, info = layers.tables(layer.path)[0].read_bytes(), layers.point(layer), layer.path.stat()
    bad = tmp_path / "bad"
    pieces = find(point)
    match flaw:
        case "beyond":
            pieces = [Piece(layer.size_bytes - 4096, one.length, one.path) for one in pieces if one.length > 4096]
        case "elsewhere":
            point = tmp_path  # the blob's own file system
        case "gone":
            pieces = [Piece(one.offset, one.length, b"no/such") for one in pieces]
    data = tables((info.st_dev, info.st_ino), point, pieces)[0]
    bad.write_bytes(good[:4096].replace(b"\0\0\0bin", b"\1\1\1bin") if flaw == "cut off" else data)
    bad.chmod(0o666 if flaw == "writable" else 0o444)
    if flaw == "another's":
        os.chown(bad, 12345, 12345)
    with reader(layer.path, bad) as process:
        read, paths = read_and_mapped(process, layer.size_bytes)
        assert read == layer.path.read_bytes()
        mount = str(layers.point(layer))
        assert not [path for path in paths if path.startswith(mount)] or flaw == "cut off"
        process.communicate()


def test_a_mount_that_a_guest_maps_stays_until_it_ends(place: tuple[LayerFile, Layers, Path]) -> None:
    layer, layers, tmp_path = place
    (tmp_path / "other").mkdir()
    with reader(layer.path, *layers.tables(layer.path)) as process:
        read_and_mapped(process, layer.size_bytes)
        layers.unmount_rootfs(tmp_path / "box")
        assert layers.points() == {layers.point(layer)}
        layers.mount_rootfs(tmp_path / "other", (layer,), 16)
        assert len([one for one in mounted() if one.kind == "erofs" and one.at.startswith(str(tmp_path))]) == 1
        layers.unmount_rootfs(tmp_path / "other")
        process.communicate()
    give_up_s = time.monotonic() + 60
    while layers.release() and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert layers.points() == frozenset()


def test_the_files_of_a_mount_are_counted_once(place: tuple[LayerFile, Layers, Path]) -> None:
    layer, layers, _ = place
    with (layers.point(layer) / "bin" / "large").open("rb") as file:
        while file.read(MIB):
            pass
        assert _dax.cachestat(file).cached == 3 * 256 + 1
    assert ledger.mount_cache_bytes(layers.point(layer)) == 4096 * (3 * 256 + 1)


# All three classes.


def pages(path: Path) -> int:
    with path.open("rb") as file:
        return _dax.cachestat(file).cached


def offered_to_ksm(pid: int) -> list[str]:
    """The flags of a process's mappings that the kernel may merge with equal ones (proc(5), VmFlags)."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return [line for line in lines if line.startswith("VmFlags:") and "mg" in line.split()]


def file_sum(out: str) -> str:
    return out.split()[0]


@pytest.mark.slow
@pytest.mark.guest
async def test_sandboxes_of_all_three_classes_hold_an_image_once(around: Surroundings) -> None:
    program = busybox()
    assert program is not None
    with guests_surroundings() as host:
        archive = host.root / "big.tar"
        archive.write_bytes(rootfs_tar(program, {"big": os.urandom(BIG_MIB * MIB)}))
        image = oci.import_archive(host.store, archive, domain=images.domain_of("acme"), cmd=("sh",))
        ready = images.take(host.store, spec_of("onecopy", SMALL, image.digest))
        (layer,) = ready.layers
        layers = Layers(host.root / "mounts")
        async with AsyncExitStack() as stack, OneCopy(layers) as one_copy:
            guest, guest_plan = await guest_of(QemuRig(host, 263_000), ready.layers, stack)
            one_copy.started(guest)
            digest = file_sum((await run(guest, ("sha256sum", "/big")))[0])  # it is first, and maps the blob
            assert pages(layer.path) >= BIG_MIB * 256
            assert not offered_to_ksm(guest.handle.pid)
            boxes: list[Engine] = []
            async with AsyncExitStack() as ended:
                for name in ("runsc", "crun"):
                    box = await box_of(around, name, layers, ready.layers, ended)
                    one_copy.started(box)
                    boxes.append(box)
                    assert file_sum((await run(box, ("sha256sum", "/big")))[0]) == digest
                await one_copy.settled()
                assert file_sum((await run(guest, ("sha256sum", "/big")))[0]) == digest
                await held_once(layer, layers, {"guest": guest, "runsc": boxes[0], "crun": boxes[1]})
            assert layers.points() == {layers.point(layer)}  # the guest maps it
            assert file_sum((await run(guest, ("sha256sum", "/big")))[0]) == digest
            await guest.detach()
            await QemuRig(host).driver.destroy(guest_plan.spec.uid, guest_plan.folder, guest.handle)
            async with asyncio.timeout(60):
                while layers.points():
                    one_copy.look()
                    await one_copy.settled()
        assert [one.at for one in mounted() if one.at.startswith(str(host.root))] == []


async def held_once(layer: LayerFile, layers: Layers, engines: dict[str, Engine]) -> None:
    """The page cache has the image as the mount's files, and next to nothing as the blob; page tables agree."""
    big = layers.point(layer) / "big"
    assert BIG_MIB * 256 * 0.98 <= pages(big) <= BIG_MIB * 256  # the kernel may drop some meanwhile
    once = ledger.mount_cache_bytes(layers.point(layer))
    assert (once + 4096 * pages(layer.path)) <= 1.05 * once
    measured = ledger.measure({name: await engine.regions() for name, engine in engines.items()})
    rows = {row.uid: row for row in measured.rows}
    assert rows["guest"].layer_bytes >= BIG_MIB * MIB * 0.98
    for row in rows.values():
        assert dict(row.shared).get(3, 0) > 0, rows  # busybox's own pages, in all three
    total = sum(row.private_bytes for row in rows.values()) + sum(
        size // holders for row in rows.values() for holders, size in row.shared
    )
    assert abs(total - measured.distinct_bytes) <= 4096


async def guest_of(rig: QemuRig, layers: tuple[LayerFile, ...], stack: AsyncExitStack) -> tuple[Engine, StartPlan]:
    plan = rig.plan("onecopy", layers=layers)
    engine = await rig.driver.start(plan, lambda _: None)
    stack.push_async_callback(rig.driver.destroy, plan.spec.uid, plan.folder, engine.handle)
    stack.push_async_callback(engine.detach)
    await engine.spawn(command(("sleep", "100000")), main=True)
    return engine, plan


async def box_of(
    around: Surroundings, name: str, layers: Layers, image: tuple[LayerFile, ...], stack: AsyncExitStack
) -> Engine:
    rig = OciRig(around, name)
    driver = OciDriver(rig.runtime, layers, around.cgroups)
    plan = rig.plan("onecopy", Resources(256, 512, 256, 2000), image)
    engine = await driver.start(plan, lambda _: None)
    stack.push_async_callback(driver.destroy, plan.spec.uid, plan.folder, engine.handle)
    stack.push_async_callback(engine.detach)
    await engine.spawn(command(("sleep", "100000")), main=True)
    return engine
