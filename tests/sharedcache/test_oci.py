"""Images in, in every form they come in; real tools (skopeo, umoci) are the oracle where they are installed."""

from __future__ import annotations

import bz2
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from sharedcache.errors import NotAllowed, NotFound
from sharedcache.images import ImageConfig, ImageRecord
from sharedcache.oci import import_archive
from sharedcache.store import Store
from tests.sharedcache import ocikit
from tests.sharedcache.image_reader import Image
from tests.sharedcache.ocikit import OciLayout, archive, docker_files, layer, sha256, squeeze
from tests.sharedcache.storekit import ACME, GLOBEX, Clock, tree
from tests.sharedcache.tarkit import END, header, make_tar

LAYERS = [layer("bin/sh", "etc/os-release"), layer("app/main", ".wh.old"), layer("bin/sh", content=b"newer")]
WANTED = ImageConfig(
    entrypoint=("/bin/app",), cmd=("--serve", "ü"),
    env=(("PATH", "/bin:/usr/bin"), ("EMPTY", ""), ("EQ", "a=b")), workdir="/srv", user="1000:100",
)  # fmt: skip


def take(store: Store, path: Path) -> ImageRecord:
    """Imports, and checks what every import promises."""
    image = import_archive(store, path, domain=ACME)
    assert store.get_image(ACME, image.digest) == image
    for stored in image.layers:
        item = store.get(ACME, stored.digest)
        assert (item.key, item.layer.source_digest, item.layer.volume_uuid) == (
            stored.key, stored.source_digest, stored.volume_uuid,
        )  # fmt: skip
        Image(item.path)
    assert tree(item.path.parents[3] / "staging") == []
    return image


def plain(path: Path) -> Path:
    layout = OciLayout()
    return layout.index(layout.image(LAYERS)).to_folder(path)


FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": plain,
    "tar": lambda path: (layout := OciLayout()).index(layout.image(LAYERS)).to_tar(path),
    "tar with ./": lambda path: _prefixed(path, "./"),
    "gnu tar": lambda path: (layout := OciLayout()).index(layout.image(LAYERS)).to_tar(path, format=tarfile.GNU_FORMAT),
    "tar.gz": lambda path: _compressed(path, squeeze),
    "tar.xz": lambda path: _compressed(path, lzma.compress),
    "tar.bz2": lambda path: _compressed(path, bz2.compress),
    "tar.zst": lambda path: _compressed(path, zstandard.compress),
    "gzip layers": lambda path: _layers(path, squeeze, "+gzip"),
    "two gzip members": lambda path: _layers(path, lambda d: squeeze(d[:700]) + squeeze(d[700:]), "+gzip"),
    "zstd layers": lambda path: _layers(path, zstandard.compress, "+zstd"),
    "zstd frames": lambda path: _layers(path, _zstd_frames, "+zstd"),
    "docker": lambda path: _docker(path, docker_files(LAYERS, tags=["app:latest"])),
    "docker without repositories": lambda path: _docker(path, docker_files(LAYERS, repositories=False)),
    "docker, several tags": lambda path: _docker(path, docker_files(LAYERS, tags=["a:1", "b:2"])),
    "docker 25": lambda path: _docker_25(path),
    "nested index": lambda path: _nested(path),
}


def _prefixed(path: Path, prefix: str) -> Path:
    layout = OciLayout()
    layout.index(layout.image(LAYERS))
    folders = [header(f"{prefix}blobs/sha256/", kind=tarfile.DIRTYPE)]
    path.write_bytes(archive({prefix + name: data for name, data in layout.files.items()}, *folders))
    return path


def _compressed(path: Path, compress: Callable[[bytes], bytes]) -> Path:
    layout = OciLayout()
    layout.index(layout.image(LAYERS))
    path.write_bytes(compress(archive(layout.files)))
    return path


def _layers(path: Path, compress: Callable[[bytes], bytes], suffix: str) -> Path:
    layout = OciLayout()
    return layout.index(layout.image(LAYERS, compress=compress, suffix=suffix)).to_tar(path)


def _zstd_frames(data: bytes) -> bytes:
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    return skippable + zstandard.compress(data[:600]) + zstandard.compress(data[600:])


def _docker(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(archive(files))
    return path


def _docker_25(path: Path) -> Path:
    """Since version 25 `docker save` writes an OCI layout with a manifest.json beside it."""
    layout = OciLayout()
    layout.index(layout.image(LAYERS, annotations={"org.opencontainers.image.ref.name": "latest"}))
    layout.files["manifest.json"] = b"[]"
    layout.files["repositories"] = b"{}"
    return layout.to_tar(path)


def _nested(path: Path) -> Path:
    layout = OciLayout()
    inner = {"schemaVersion": 2, "manifests": [layout.image(LAYERS, platform={"os": "linux", "architecture": "amd64"})]}
    return layout.index(layout.json(inner, ocikit.INDEX)).to_tar(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_image(store: Store, tmp_path: Path, form: str) -> None:
    image = take(store, FORMS[form](tmp_path / "image"))
    assert image.config == WANTED
    assert [stored.source_digest for stored in image.layers] == [sha256(tar) for tar in LAYERS]
    expected = take(store, plain(tmp_path / "plain"))
    assert image.digest == expected.digest
    assert len(store.images()) == 1 and len(store.objects()) == 3


def test_layers_lie_lowest_first_and_hold_what_their_tars_held(store: Store, tmp_path: Path) -> None:
    image = take(store, plain(tmp_path / "image"))
    found = [Image(store.get(ACME, stored.digest).path) for stored in image.layers]
    assert found[0].content(b"bin/sh") == b"xbin/sh" and found[2].content(b"bin/sh") == b"newerbin/sh"
    assert set(found[1].paths) == {b"", b"app", b"app/main", b"old"}


# ── root filesystems ──


@pytest.mark.parametrize("compress", [lambda data: data, squeeze, lzma.compress, bz2.compress, zstandard.compress])
def test_a_root_filesystem_is_one_layer(store: Store, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    tar = make_tar(
        header("./", kind=tarfile.DIRTYPE), (header("./bin/true"), b"elf"),
        header("./dev/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
    )  # fmt: skip
    (tmp_path / "rootfs").write_bytes(compress(tar))
    image = import_archive(store, tmp_path / "rootfs", domain=ACME, cmd=("/bin/true", "-x"))
    assert (image.format, image.config) == ("rootfs", ImageConfig(cmd=("/bin/true", "-x")))
    assert [stored.source_digest for stored in image.layers] == [sha256(tar)]
    assert import_archive(store, tmp_path / "rootfs", domain=ACME, cmd=("/bin/true", "-x")) == image


def test_a_root_filesystem_need_not_look_like_one(store: Store, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(make_tar((header("hello"), b"static binary"), (header("index.json"), b"[]")))
    assert take(store, tmp_path / "t").format == "rootfs"


# ── shapes of layers ──


def test_equal_layers_are_one_object(store: Store, tmp_path: Path) -> None:
    layout = OciLayout()
    twice = [LAYERS[0], LAYERS[1], LAYERS[0]]
    image = take(store, layout.index(layout.image(twice)).to_tar(tmp_path / "t"))
    assert [stored.source_digest for stored in image.layers] == [sha256(tar) for tar in twice]
    assert len(store.objects()) == 2
    assert image.layers[0] == image.layers[2]


def test_the_same_tar_compressed_in_two_ways_is_one_object(store: Store, tmp_path: Path) -> None:
    layout = OciLayout()
    one = layout.image([LAYERS[0]], compress=squeeze, suffix="+gzip")
    body = json.loads(layout.files[f"blobs/sha256/{one['digest'][7:]}"])
    body["layers"].append(layout.blob(zstandard.compress(LAYERS[0]), ocikit.LAYER + "+zstd"))
    config = json.loads(layout.files[f"blobs/sha256/{body['config']['digest'][7:]}"])
    config["rootfs"]["diff_ids"] *= 2
    body["config"] = layout.json(config, ocikit.CONFIG)
    image = take(store, layout.index(layout.json(body, ocikit.MANIFEST)).to_tar(tmp_path / "t"))
    assert image.layers[0] == image.layers[1] and len(store.objects()) == 1


def test_docker_links_between_equal_layers(store: Store, tmp_path: Path) -> None:
    """docker save writes an equal layer once and a symbolic link for the second."""
    files = docker_files([LAYERS[0], LAYERS[0]])
    names = json.loads(files["manifest.json"])[0]["Layers"]
    del files[names[1]]
    link = header(names[1], kind=tarfile.SYMTYPE, linkname=f"../{names[0]}")
    (tmp_path / "t").write_bytes(archive(files, link))
    assert len(take(store, tmp_path / "t").layers) == 2


def test_empty_layers(store: Store, tmp_path: Path) -> None:
    layout = OciLayout()
    image = take(store, layout.index(layout.image([END, bytes(10_240), LAYERS[0]])).to_tar(tmp_path / "t"))
    assert [store.get(ACME, stored.digest).layer.files for stored in image.layers] == [0, 0, 2]


@pytest.mark.slow
def test_127_layers(store: Store, tmp_path: Path) -> None:
    layout = OciLayout()
    image = take(store, layout.index(layout.image(layer(f"f{n}") for n in range(127))).to_tar(tmp_path / "t"))
    assert len(image.layers) == len(image.keys) == 127


# ── platforms and tags ──


def test_amd64_is_chosen_among_platforms(store: Store, tmp_path: Path) -> None:
    layout = OciLayout()
    platforms = [{"os": "linux", "architecture": "arm64"}, {"os": "windows", "architecture": "amd64"},
                 {"os": "linux", "architecture": "amd64", "variant": "v3"}]  # fmt: skip
    others = [layout.image([layer(str(number))], platform=where) for number, where in enumerate(platforms)]
    ours = layout.image(LAYERS, platform={"os": "linux", "architecture": "amd64"})
    unknown = {"os": "unknown", "architecture": "unknown"}
    attests = {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": ours["digest"]}
    about = [
        layout.json({"schemaVersion": 2}, ocikit.MANIFEST, platform=unknown, annotations=attests),
        layout.json({"schemaVersion": 2, "a": 1}, ocikit.MANIFEST, annotations=attests),
    ]
    image = take(store, layout.index(*about, *others, ours).to_tar(tmp_path / "t"))
    assert [stored.source_digest for stored in image.layers] == [sha256(tar) for tar in LAYERS]


def test_several_tags_of_one_image(store: Store, tmp_path: Path) -> None:
    layout = OciLayout()
    one = layout.image(LAYERS)
    tagged = [{**one, "annotations": {"org.opencontainers.image.ref.name": tag}} for tag in ("1", "latest")]
    take(store, layout.index(*tagged).to_tar(tmp_path / "t"))


# ── the store's side ──


def test_an_import_again_converts_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(store, FORMS["gzip layers"](tmp_path / "a"))
    monkeypatch.setattr("sharedcache.oci.convert_layer", None)  # would fail
    assert take(store, FORMS["docker"](tmp_path / "b")) == first
    assert take(store, plain(tmp_path / "c")) == first


def test_each_domain_has_its_own_objects(store: Store, tmp_path: Path) -> None:
    archive = plain(tmp_path / "image")
    mine, theirs = (import_archive(store, archive, domain=domain) for domain in (ACME, GLOBEX))
    assert mine.digest == theirs.digest and not mine.keys & theirs.keys
    inodes = [store.get(image.domain, stored.digest).path.stat().st_ino
              for image in (mine, theirs) for stored in image.layers]  # fmt: skip
    assert len(set(inodes)) == 6


def test_an_import_tells_a_tenant_nothing_of_anothers(store: Store, tmp_path: Path) -> None:
    """The steps, their bytes and the work are those of a first import, whatever other domains hold."""
    path = plain(tmp_path / "image")
    seen: dict[str, list[tuple[str, int, int]]] = {}
    for domain in (ACME, GLOBEX):
        steps: list[tuple[str, int, int]] = []
        import_archive(store, path, domain=domain, progress=lambda *step, told=steps: told.append(step))
        seen[str(domain)] = steps
    assert seen[str(ACME)] == seen[str(GLOBEX)]
    assert {step for step, _, _ in seen[str(ACME)]} == {"verify", "convert", "publish"}


def test_progress_ends_at_its_total(store: Store, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def tell(step: str, done_bytes: int, total_bytes: int) -> None:
        assert done_bytes >= last.get(step, (0, 0))[0]
        last[step] = (done_bytes, total_bytes)

    import_archive(store, FORMS["tar.gz"](tmp_path / "t"), domain=ACME, progress=tell)
    assert last.keys() == {"receive", "verify", "convert", "publish"}
    assert all(done == total > 0 for done, total in last.values())


def test_public_is_the_operators(store: Store, tmp_path: Path) -> None:
    from sharedcache.domains import Domain

    with pytest.raises(NotAllowed):
        import_archive(store, plain(tmp_path / "image"), domain=Domain.public())
    image = import_archive(store, plain(tmp_path / "image"), domain=Domain.public(), operator_signed=True)
    assert store.get_image(Domain.public(), image.digest) == image


def test_many_threads_import_the_same_image(store: Store, root: Path, tmp_path: Path) -> None:
    path = plain(tmp_path / "image")
    gate = threading.Barrier(6)

    def work(_: int) -> ImageRecord:
        gate.wait(30)
        return import_archive(store, path, domain=ACME)

    with ThreadPoolExecutor(6) as pool:
        images = list(pool.map(work, range(6)))
    assert len({image.digest for image in images}) == 1 == len(store.images())
    assert len(store.objects()) == 3 and tree(root / "staging") == []


def test_garbage_collection_runs_while_an_import_does(store: Store, clock: Clock, tmp_path: Path) -> None:
    """A collector that finds everything old takes nothing of an image under way."""
    layout = OciLayout()
    path = layout.index(layout.image(layer(f"f{n}") for n in range(12))).to_tar(tmp_path / "t")
    take(store, FORMS["tar"](tmp_path / "other"))
    store.forget_image(ACME, store.images()[0].digest)

    def tell(step: str, done_bytes: int, total_bytes: int) -> None:
        clock.now_s += 10_000
        store.collect()

    image = import_archive(store, path, domain=ACME, progress=tell)
    assert all(store.get(ACME, stored.digest) for stored in image.layers)
    assert len(store.objects()) == 12


def test_a_corrupt_layer_is_fetched_again_by_an_import(store: Store, tmp_path: Path) -> None:
    path = plain(tmp_path / "image")
    image = take(store, path)
    blob = store.get(ACME, image.layers[1].digest).path
    data = bytearray(blob.read_bytes())
    data[5000] ^= 1
    blob.write_bytes(data)
    assert take(store, path) == image
    blob.unlink()
    with pytest.raises(NotFound, match="import it"):
        store.scrub()
        store.get(ACME, image.layers[1].digest)
    assert take(store, path) == image


# ── real tools ──

skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo (apt install skopeo)")
umoci = pytest.mark.skipif(shutil.which("umoci") is None, reason="needs umoci (apt install umoci)")


def run(*argv: str | Path) -> None:
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@skopeo
@pytest.mark.parametrize("to", ["docker-archive", "oci-archive", "oci"])
def test_what_skopeo_writes(store: Store, tmp_path: Path, to: str) -> None:
    layout = OciLayout()
    layout.index(layout.image(LAYERS, annotations={"org.opencontainers.image.ref.name": "t"})).to_folder(tmp_path / "l")
    run("skopeo", "--insecure-policy", "copy", f"oci:{tmp_path / 'l'}:t", f"{to}:{tmp_path / 'copy'}:app:latest")
    image = take(store, tmp_path / "copy")
    assert image.config == WANTED
    assert image.digest == take(store, tmp_path / "l").digest


@umoci
def test_what_umoci_writes_and_unpacks(store: Store, tmp_path: Path) -> None:
    """umoci makes an image of two layers; ours, joined by its rules, are what it unpacks itself."""
    reference = f"{tmp_path / 'layout'}:app"
    source = tmp_path / "source"
    (source / "usr/bin").mkdir(parents=True)
    (source / "usr/bin/tool").write_bytes(os.urandom(70_000))
    (source / "usr/bin/alias").symlink_to("tool")
    os.link(source / "usr/bin/tool", source / "usr/bin/same")
    (source / "later").write_text("from the second layer")
    run("umoci", "init", "--layout", tmp_path / "layout")
    run("umoci", "new", "--image", reference)
    run("umoci", "insert", "--image", reference, source / "usr", "/usr")
    run("umoci", "insert", "--image", reference, source / "later", "/usr/later")
    run("umoci", "insert", "--image", reference, "--whiteout", "/usr/gone")
    run("umoci", "config", "--image", reference, "--config.cmd", "/usr/bin/tool", "--config.env", "A=b")
    image = take(store, tmp_path / "layout")
    assert (image.config.cmd, image.config.env[-1]) == (("/usr/bin/tool",), ("A", "b"))
    run("umoci", "unpack", "--image", reference, tmp_path / "bundle")
    seen: dict[bytes, bytes] = {}
    for stored in image.layers:
        found = Image(store.get(ACME, stored.digest).path)
        for name, inode in found.paths.items():
            if inode.extents and not inode.mode & 0o040000:
                seen[name] = found.content(name)
    root = tmp_path / "bundle" / "rootfs"
    for path in root.rglob("*"):
        name = os.fsencode(path.relative_to(root))
        if path.is_symlink():
            assert seen.pop(name) == os.fsencode(path.readlink())
        elif path.is_file():
            assert seen.pop(name) == path.read_bytes()
    assert seen == {}
