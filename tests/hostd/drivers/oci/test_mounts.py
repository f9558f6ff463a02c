"""One mount a layer, for as long as a root filesystem is made of it, and nothing afterwards."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.drivers.contract import LayerFile
from hostd.drivers.oci import identity
from hostd.drivers.oci.mounts import Layers, mounted, parse_mountinfo, unmount_below, unused_layers
from hostd.errors import ConfigError, HostdError, StartFailed
from native import _dax
from tests.hostd.drivers.oci.rig import Surroundings, layer_of
from tests.sharedcache.tarkit import header, make_tar

DATA = bytes(range(256)) * 4096  # 1 MiB


def test_mountinfo_is_parsed_with_its_escapes() -> None:
    text = (
        "36 35 98:0 / /mnt/a\\040b rw,noatime shared:1 - ext3 /dev/root rw,errors=continue\n"
        "40 35 0:50 / /run/x rw - overlay overlay rw,lowerdir=/m/g0/2:/m/g0/1,upperdir=/u\n"
    )
    first, second = parse_mountinfo(text)
    assert (first.at, first.kind, first.source, first.device) == ("/mnt/a b", "ext3", "/dev/root", (98, 0))
    assert second.options == "rw,lowerdir=/m/g0/2:/m/g0/1,upperdir=/u"


def test_a_layer_is_unused_when_no_overlay_names_it() -> None:
    text = "".join(
        f"{n} 1 0:{n} / {at} ro - {kind} {kind} ro{options}\n"
        for n, (at, kind, options) in enumerate(
            [
                ("/m/g0/1", "erofs", ""),
                ("/m/g0/2", "erofs", ""),
                ("/m/g0/3", "erofs", ""),
                ("/m/g0/30", "erofs", ""),
                ("/m/g0/deep/1", "erofs", ""),
                ("/run/a", "overlay", ",lowerdir=/m/g0/2:/m/g0/1,upperdir=/u/1"),
                ("/run/b", "overlay", ",lowerdir+=/m/g0/30,lowerdir+=/m/g0/1,upperdir=/u/2"),
            ]
        )
    )
    assert unused_layers(parse_mountinfo(text), Path("/m")) == ["/m/g0/3"]


@pytest.mark.parametrize("path", ["", "/", "/run", "/run/x", "relative/to/some/place", "/run/../../x/y"])
def test_what_is_no_sandbox_s_is_not_unmounted(path: str) -> None:
    with pytest.raises(HostdError, match="nothing is unmounted"):
        unmount_below(Path(path))


def test_a_path_that_overlayfs_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comma, colon or backslash"):
        Layers(tmp_path / "a:b")


@pytest.fixture
def place(around: Surroundings, tmp_path: Path) -> Iterator[Path]:
    """A folder below which nothing is mounted afterwards."""
    yield tmp_path
    left = [one.at for one in mounted() if one.at.startswith(str(tmp_path))]
    unmount_below(tmp_path)
    assert left == []


def layer(place: Path, name: str, *members: object) -> LayerFile:
    return layer_of(make_tar(*members), place / f"{name}.blob")  # type: ignore[arg-type]


def sandbox(place: Path, name: str) -> Path:
    folder = place / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize("way", ["file", "loop"])
def test_two_roots_share_one_mount_and_one_copy(place: Path, way: str) -> None:
    blob = layer(place, "one", (header("data"), DATA))
    layers = Layers(place / "m", [way])
    loops = len(list(Path("/sys/block").glob("loop*/loop/backing_file")))
    a, b = sandbox(place, "a"), sandbox(place, "b")
    for folder in (a, b):
        layers.mount_rootfs(folder, (blob,), 16)
        assert (folder / "rootfs" / "data").read_bytes() == DATA
    assert [one.at for one in mounted() if one.kind == "erofs" and one.at.startswith(str(place))] == [
        str(layers.point(blob))
    ]
    with (layers.point(blob) / "data").open("rb") as shared, blob.path.open("rb") as file:
        assert _dax.cachestat(shared).cached == len(DATA) // 4096
        assert _dax.cachestat(file).cached <= 16  # metadata that passed by, not the data a second time
    layers.unmount_rootfs(a)
    assert (b / "rootfs" / "data").read_bytes() == DATA
    layers.unmount_rootfs(b)
    layers.unmount_rootfs(b)  # idempotent
    assert list((place / "m").iterdir()) == []
    assert len(list(Path("/sys/block").glob("loop*/loop/backing_file"))) == loops


def test_a_blob_that_was_verified_again_is_no_second_copy(place: Path) -> None:
    blob = layer(place, "one", (header("data"), DATA))
    layers = Layers(place / "m")
    for name in "ab":
        assert len(blob.path.read_bytes()) == blob.size_bytes  # as a new hostd does at its first use
        layers.mount_rootfs(sandbox(place, name), (blob,), 16)
        with blob.path.open("rb") as file:
            assert _dax.cachestat(file).cached <= 16
    for name in "ab":
        layers.unmount_rootfs(place / name)


def test_upper_layers_win_and_writes_stay_in_the_sandbox(place: Path) -> None:
    low = layer(place, "low", (header("name"), b"low"), (header("gone"), b"x"))
    high = layer(place, "high", (header("name"), b"high"), header(".wh.gone"))
    layers = Layers(place / "m")
    a, b = sandbox(place, "a"), sandbox(place, "b")
    layers.mount_rootfs(a, (low, high), 16)
    layers.mount_rootfs(b, (low, high, low), 16)  # of equal layers the topmost decides
    assert (a / "rootfs" / "name").read_bytes() == b"high"
    assert not (a / "rootfs" / "gone").exists()
    assert (b / "rootfs" / "name").read_bytes() == b"low"
    (a / "rootfs" / "name").write_bytes(b"mine")
    assert (b / "rootfs" / "name").read_bytes() == b"low"
    with pytest.raises(OSError, match="No space left"):
        (a / "rootfs" / "big").write_bytes(bytes(20 << 20))
    for folder in (a, b):
        layers.unmount_rootfs(folder)


def test_an_image_of_very_many_layers(place: Path) -> None:
    many = [layer(place, f"layer{n:03}", (header(f"file{n}"), b"%d" % n)) for n in range(90)]
    deep = place / ("long" * 12)
    deep.mkdir()
    layers, folder = Layers(deep / "m"), sandbox(place, "a")
    layers.mount_rootfs(folder, many, 16)
    assert sorted(path.name for path in (folder / "rootfs").iterdir()) == sorted(f"file{n}" for n in range(90))
    layers.unmount_rootfs(folder)
    assert list((deep / "m").iterdir()) == []


def test_a_broken_layer_leaves_nothing_mounted(place: Path) -> None:
    good = layer(place, "good", (header("data"), b"x"))
    bad = place / "bad.blob"
    bad.write_bytes(bytes(1 << 20))
    layers, folder = Layers(place / "m"), sandbox(place, "a")
    with pytest.raises(StartFailed, match="a root of 2 layers cannot be mounted"):
        layers.mount_rootfs(folder, (good, LayerFile(bad, 1 << 20, bytes(16), 0)), 16)
    layers.unmount_rootfs(folder)


def test_what_a_dead_hostd_left_is_taken_over(place: Path) -> None:
    blob = layer(place, "one", (header("data"), DATA))
    a, b = sandbox(place, "a"), sandbox(place, "b")
    Layers(place / "m").mount_rootfs(a, (blob,), 16)
    again = Layers(place / "m")
    again.mount_rootfs(b, (blob,), 16)
    assert len([one for one in mounted() if one.kind == "erofs" and one.at.startswith(str(place))]) == 1
    again.unmount_rootfs(a)
    again.unmount_rootfs(b)


async def test_starts_and_ends_at_once_do_not_meet(place: Path) -> None:
    blob = layer(place, "one", (header("data"), DATA))
    layers = Layers(place / "m")

    async def come_and_go(name: str) -> None:
        for turn in range(5):
            folder = sandbox(place, f"{name}{turn}")
            await asyncio.to_thread(layers.mount_rootfs, folder, (blob,), 16)
            assert (folder / "rootfs" / "data").read_bytes() == DATA
            await asyncio.to_thread(layers.unmount_rootfs, folder)

    await asyncio.gather(*(come_and_go(name) for name in "abcd"))


def test_the_host_is_not_written_through_an_image_s_links(place: Path) -> None:
    outside = place / "outside"
    outside.mkdir()
    kind = {"kind": b"2"}
    hostile = layer(
        place, "hostile",
        header("etc", kind=b"5"),
        header("etc/hosts", linkname=str(outside / "hosts"), **kind),
        header("etc/hostname", linkname="/../../../../../../../../tmp/x", **kind),
        header("etc/machine-id", kind=b"5"),
    )  # fmt: skip
    linked = layer(place, "linked", header("etc", linkname=str(outside), **kind))
    layers = Layers(place / "m")
    for name, blob in (("a", hostile), ("b", linked)):
        folder = sandbox(place, name)
        layers.mount_rootfs(folder, (blob,), 16)
        identity.write(folder / "rootfs", "box-1", "box")
        if name == "a":
            assert (folder / "rootfs" / "etc" / "hosts").read_text().startswith("127.0.0.1\tlocalhost\n")
            assert (folder / "rootfs" / "etc" / "hostname").read_text() == "box\n"
            assert not (folder / "rootfs" / "etc" / "hosts").is_symlink()
        layers.unmount_rootfs(folder)
    assert os.listdir(outside) == []  # noqa: PTH208


def test_a_sandbox_knows_itself_after_a_restart() -> None:
    assert identity.files("u", "h") == identity.files("u", "h")
    assert identity.machine_id("u") != identity.machine_id("v")
    assert len(identity.machine_id("u")) == 32


def test_what_a_guest_maps_is_a_second_copy_and_no_third(place: Path) -> None:
    """What it would be without hostd/drivers/onecopy.py: a guest's virtio-pmem maps the blob, as mmap does here."""
    blob = layer(place, "one", (header("data"), DATA))
    layers, folder = Layers(place / "m"), sandbox(place, "a")
    with blob.path.open("rb") as file:
        layers.mount_rootfs(folder, (blob,), 16)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as guest:
            assert sum(guest[at] for at in range(0, len(guest), 4096)) >= 0
            assert (folder / "rootfs" / "data").read_bytes() == DATA
            with (layers.point(blob) / "data").open("rb") as shared:
                assert _dax.cachestat(shared).cached == len(DATA) // 4096
            assert _dax.mincore(file) == blob.size_bytes // 4096
    layers.unmount_rootfs(folder)
