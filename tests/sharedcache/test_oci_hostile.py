"""Images that lie, are damaged or want out of their archive: a clear error, and no trace in the store."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharedcache.domains import Domain
from sharedcache.errors import BadArchive, LimitExceeded
from sharedcache.limits import Limits
from sharedcache.oci import import_archive
from sharedcache.store import Store
from tests.sharedcache import ocikit
from tests.sharedcache.ocikit import Json, OciLayout, archive, docker_files, layer, sha256, squeeze
from tests.sharedcache.storekit import ACME, tree
from tests.sharedcache.tarkit import header, make_tar

LAYERS = [layer("a", "b"), layer("c")]


def refused(store: Store, path: Path, said: str, domain: Domain = ACME, limits: Limits | None = None) -> str:
    """The import fails, says `said` and what to do, and leaves nothing."""
    with pytest.raises((BadArchive, LimitExceeded)) as caught:
        import_archive(store, path, domain=domain, limits=limits or Limits())
    message = str(caught.value)
    assert re.search(said, message), message
    assert "; " in message and message.isprintable() and len(message) < 1000
    root = path.parent / "store"
    assert tree(root / "staging") == tree(root / "objects") == tree(root / "images") == tree(root / "quarantine") == []
    return message


def layout_of(*layers: bytes, **image: Any) -> tuple[OciLayout, Json]:
    layout = OciLayout()
    descriptor = layout.image(layers or LAYERS, **image)
    return layout.index(descriptor), descriptor


def manifest_of(layout: OciLayout, descriptor: Json) -> Json:
    body: Json = json.loads(layout.files[f"blobs/sha256/{descriptor['digest'][7:]}"])
    return body


def with_manifest(change: Callable[[OciLayout, Json], None]) -> OciLayout:
    """An honest layout whose manifest was changed, its digest made right again."""
    layout, descriptor = layout_of()
    body = manifest_of(layout, descriptor)
    change(layout, body)
    return layout.index(layout.json(body, ocikit.MANIFEST))


def with_config(**changes: Any) -> OciLayout:
    layout, _ = layout_of(config=changes)
    return layout


def with_run(**changes: Any) -> OciLayout:
    layout, _ = layout_of(run={**ocikit.RUN, **changes})
    return layout


# ── digests ──


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("part", ["manifest", "config", "layer", "gzip layer"])
def test_a_flipped_byte_anywhere_is_refused(store: Store, tmp_path: Path, part: str, folder: bool) -> None:
    zipped = part == "gzip layer"
    layout, descriptor = layout_of(compress=squeeze if zipped else bytes, suffix="+gzip" if zipped else "")
    body = manifest_of(layout, descriptor)
    blob = {"manifest": descriptor, "config": body["config"]}.get(part, body["layers"][1])
    name = f"blobs/sha256/{blob['digest'][7:]}"
    data = bytearray(layout.files[name])
    data[len(data) // 2] ^= 0x20
    layout.files[name] = bytes(data)
    path = layout.to_folder(tmp_path / "image") if folder else layout.to_tar(tmp_path / "image")
    assert name in refused(store, path, r"its bytes have the digest sha256:.*, not the one in its name")


def test_a_flipped_byte_in_a_docker_archive(store: Store, tmp_path: Path) -> None:
    for suffix, said in (("layer.tar", "diff_id"), (".json", "do not have the digest that is its name")):
        files = docker_files(LAYERS)
        name = next(name for name in files if name.endswith(suffix) and name != "manifest.json")
        data = bytearray(files[name])
        data[60 if suffix == ".json" else 600] ^= 1
        files[name] = bytes(data)
        (tmp_path / "image").write_bytes(archive(files))
        refused(store, tmp_path / "image", said)


def test_a_layer_that_is_not_what_the_config_says(store: Store, tmp_path: Path) -> None:
    wrong = {"type": "layers", "diff_ids": [sha256(LAYERS[0]), sha256(b"another")]}
    path = with_config(rootfs=wrong).to_tar(tmp_path / "image")
    refused(store, path, r"blobs/sha256/.*: its tar has the digest sha256:.*, the config's diff_id is")
    zipped, _ = layout_of(compress=lambda data: squeeze(data + bytes(512)), suffix="+gzip")
    refused(store, zipped.to_tar(tmp_path / "image"), "diff_id")


def test_known_layers_are_checked_too(store: Store, tmp_path: Path) -> None:
    """A tenant cannot claim a layer it has not got, even where its own domain holds it."""
    honest, _ = layout_of()
    import_archive(store, honest.to_tar(tmp_path / "honest"), domain=ACME)
    files = docker_files(LAYERS)
    name = next(name for name in files if name.endswith("layer.tar"))
    files[name] = layer("forged")
    (tmp_path / "forged").write_bytes(archive(files))
    with pytest.raises(BadArchive, match="diff_id"):
        import_archive(store, tmp_path / "forged", domain=ACME)
    assert len(store.images()) == 1


# ── names that want out ──


def test_symbolic_links_in_a_folder_are_not_followed(store: Store, tmp_path: Path) -> None:
    layout, descriptor = layout_of()
    path = layout.to_folder(tmp_path / "image")
    blob = path / "blobs" / "sha256" / descriptor["digest"][7:]
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    refused(store, path, r"cannot be opened: Too many levels of symbolic links; copy the layout again")
    blob.unlink()
    (tmp_path / "elsewhere").rename(blob)
    (path / "blobs").rename(tmp_path / "blobs")
    (path / "blobs").symlink_to(tmp_path / "blobs")
    refused(store, path, r"cannot be opened: Not a directory; copy the layout again")


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing"])
def test_what_is_no_file_is_refused_without_waiting(store: Store, tmp_path: Path, kind: str) -> None:
    layout, descriptor = layout_of()
    path = layout.to_folder(tmp_path / "image")
    blob = path / "blobs" / "sha256" / manifest_of(layout, descriptor)["layers"][0]["digest"][7:]
    blob.unlink()
    if kind == "folder":
        blob.mkdir()
    elif kind == "fifo":
        os.mkfifo(blob)
    refused(store, path, r"is no regular file|cannot be opened")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_docker_manifest_cannot_point_out(store: Store, tmp_path: Path, name: str) -> None:
    for field in ("Config", "Layers"):
        files = docker_files(LAYERS)
        body = json.loads(files["manifest.json"])
        body[0][field] = name if field == "Config" else [name, *body[0]["Layers"][1:]]
        files["manifest.json"] = json.dumps(body).encode()
        (tmp_path / "image").write_bytes(archive(files))
        refused(store, tmp_path / "image", "manifest.json: points at .*, which is no name inside an archive")


@pytest.mark.parametrize("target", ["../../../etc/passwd", "/etc/passwd", "nothing", "LOOP"])
def test_links_in_an_archive_stay_inside_it(store: Store, tmp_path: Path, target: str) -> None:
    files = docker_files(LAYERS)
    name = json.loads(files["manifest.json"])[0]["Layers"][0]
    del files[name]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        meant = (name if kind == tarfile.LNKTYPE else "layer.tar") if target == "LOOP" else target
        (tmp_path / "image").write_bytes(archive(files, header(name, kind=kind, linkname=meant)))
        refused(store, tmp_path / "image", "missing from the archive|lead in a circle")


def test_odd_names_beside_an_image_are_refused(store: Store, tmp_path: Path) -> None:
    for odd in ("../x", "/abs", "a/../b"):
        layout, _ = layout_of()
        (tmp_path / "image").write_bytes(archive(layout.files, header(odd)))
        refused(store, tmp_path / "image", r"^.*: a name that is absolute or has \.\. in it")


def test_the_last_of_two_members_counts(store: Store, tmp_path: Path) -> None:
    """As every extracting tool has it; the digest is checked against that one."""
    layout, descriptor = layout_of()
    name = f"blobs/sha256/{manifest_of(layout, descriptor)['layers'][0]['digest'][7:]}"
    good, bad = (header(name), layout.files[name]), (header(name), b"x" * len(layout.files[name]))
    rest = [(header(other), data) for other, data in layout.files.items() if other != name]
    (tmp_path / "image").write_bytes(make_tar(*rest, good, bad))
    refused(store, tmp_path / "image", "not the one in its name")
    (tmp_path / "image").write_bytes(make_tar(*rest, bad, good))
    import_archive(store, tmp_path / "image", domain=ACME)


# ── documents ──


def bad_index(body: bytes) -> OciLayout:
    layout, _ = layout_of()
    layout.files["index.json"] = body
    return layout


def bigger(layout: OciLayout, body: Json) -> None:
    body["layers"][0]["size"] += 1


def retyped(media_type: str) -> Callable[[OciLayout, Json], None]:
    return lambda layout, body: body["layers"][0].update(mediaType=media_type)


def artifact(layout: OciLayout, body: Json) -> None:
    body["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json"


def platforms(*names: str) -> OciLayout:
    layout = OciLayout()
    made = []
    for name in names:
        system, _, machine = name.partition("/")
        made.append(layout.image([layer(name)], platform={"os": system, "architecture": machine}))
    return layout.index(*made)


def tagged(*tags: str) -> OciLayout:
    layout = OciLayout()
    notes = [{"org.opencontainers.image.ref.name": tag} for tag in tags]
    return layout.index(*(layout.image([layer(str(note))], annotations=note) for note in notes))


def nested(depth: int) -> OciLayout:
    layout = OciLayout()
    descriptor = layout.image(LAYERS)
    for _ in range(depth):
        descriptor = layout.json({"manifests": [descriptor]}, ocikit.INDEX)
    return layout.index(descriptor)


DOCUMENTS: dict[str, tuple[Callable[[], OciLayout], str]] = {
    "no JSON": (lambda: bad_index(b"{nonsense"), r"^index\.json: is not the JSON"),
    "JSON in latin-1": (lambda: bad_index(b'{"a":"\xff"}'), r"is not the JSON"),
    "JSON number": (lambda: bad_index(b"17"), r"is JSON, but no object"),
    "list": (lambda: bad_index(b"[]"), r"is no JSON object"),
    "deep": (lambda: bad_index(b"[" * 200_000), r"is not the JSON"),
    "doubled key": (lambda: bad_index(b'{"manifests":[],"manifests":[]}'), r"same key twice"),
    "huge": (lambda: bad_index(b" " * (5 << 20)), r"JSON text of 5242880 bytes; 4194304 are allowed"),
    "no manifests": (lambda: bad_index(b"{}"), r"manifests is no list"),
    "empty index": (lambda: bad_index(b'{"manifests":[]}'), r"no image for linux/amd64, only nothing"),
    "digest with a path": (
        lambda: bad_index(json.dumps({"manifests": [
            {"mediaType": ocikit.MANIFEST, "digest": "sha256:../../../etc/passwd", "size": 1}]}).encode()),
        r"without mediaType, sha256 digest and size",
    ),
    "other algorithm": (
        lambda: bad_index(json.dumps({"manifests": [
            {"mediaType": ocikit.MANIFEST, "digest": "sha512:" + "0" * 128, "size": 1}]}).encode()),
        r"sha256 digest",
    ),
    "layout version": (
        lambda: OciLayout({"oci-layout": b'{"imageLayoutVersion":"9"}', "index.json": b"{}"}), r"not version 1\.0\.0",
    ),
    "size differs": (lambda: with_manifest(bigger), r"has \d+ bytes, its descriptor says \d+"),
    "foreign layer": (
        lambda: with_manifest(retyped("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")), r"is foreign",
    ),
    "unknown layer": (lambda: with_manifest(retyped("text/plain")), r"'text/plain', which is no layer known here"),
    "artifact": (lambda: with_manifest(artifact), r"is no container image: its config is '.*helm"),
    "index as manifest": (lambda: with_manifest(lambda _, body: body.update(manifests=[])), r"not an image manifest"),
    "arm64": (lambda: platforms("linux/arm64", "windows/amd64"), r"for linux/amd64, only linux/arm64, windows/amd64"),
    "config for arm64": (lambda: with_config(architecture="arm64"), r"the image is for linux/arm64; export"),
    "several images": (
        lambda: tagged("one", "two"), r"^index\.json: has 2 images: one, two; export the one you want",
    ),
    "nested": (lambda: nested(5), r"nested more than 4 deep"),
    "no layers": (lambda: with_manifest(lambda _, body: body.update(layers=[])), r"has 0 layers; 1 to 127"),
    "128 layers": (lambda: layout_of(*(layer(str(n)) for n in range(128)))[0], r"has 128 layers; 1 to 127"),
    "diff_ids short": (lambda: with_config(rootfs={"diff_ids": [sha256(b"")]}), r"has 1 diff_ids for 2 layers"),
    "diff_ids no digest": (lambda: with_config(rootfs={"diff_ids": ["x", "y"]}), r"not all sha256"),
    "no rootfs": (lambda: with_config(rootfs=None), r"rootfs: is no JSON object"),
    "Env": (lambda: with_run(Env=["=x"]), r"Env has '=x', which is not NAME=VALUE"),
    "Env bare": (lambda: with_run(Env=["PATH"]), r"not NAME=VALUE"),
    "Cmd": (lambda: with_run(Cmd="/bin/sh"), r"Cmd is no list of strings"),
    "Cmd number": (lambda: with_run(Cmd=[1]), r"Cmd is no plain text"),
    "Cmd NUL": (lambda: with_run(Cmd=["a\0b"]), r"Cmd is no plain text"),
    "User": (lambda: with_run(User=["root"]), r"User is no plain text"),
    "long nonsense": (lambda: with_manifest(retyped("\x1b" * 100_000)), r"no layer known here|is '\\"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_checked_field_by_field(store: Store, tmp_path: Path, name: str) -> None:
    make, said = DOCUMENTS[name]
    refused(store, make().to_tar(tmp_path / "image"), said)
    refused(store, make().to_folder(tmp_path / "folder"), said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{}", "is no list of images"),
        (b"[]", "is no list of images"),
        (b"[7]", "is no JSON object"),
        (b'[{"Config":1,"Layers":[]}]', "not member names"),
        (b'[{"Config":"c","Layers":["missing"]}]', "^c: this file is missing from the archive"),
        (b'[{"Config":"a","Layers":["x"],"RepoTags":["a:1"]},{"Config":"b","Layers":["x"],"RepoTags":["b:2"]}]',
         r"has 2 images: a:1, b:2; export the one you want by itself"),
    ],
)  # fmt: skip
def test_docker_manifests_are_checked(store: Store, tmp_path: Path, body: bytes, said: str) -> None:
    (tmp_path / "image").write_bytes(archive({**docker_files(LAYERS), "manifest.json": body}))
    refused(store, tmp_path / "image", said)


# ── the file itself ──


def test_what_cannot_be_an_archive(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    refused(store, tmp_path / "empty", "is empty, or no regular file")
    (tmp_path / "folder").mkdir()
    refused(store, tmp_path / "folder", "is a folder, but no OCI layout")
    os.mkfifo(tmp_path / "fifo")
    refused(store, tmp_path / "fifo", "no regular file")
    with pytest.raises(FileNotFoundError):
        import_archive(store, tmp_path / "missing", domain=ACME)


def test_an_archive_that_was_cut(store: Store, tmp_path: Path) -> None:
    layout, _ = layout_of()
    whole = archive(layout.files)
    for cut in (100, 600, len(whole) // 2 + 100, len(whole) // 2 + 512):
        (tmp_path / "image").write_bytes(whole[:cut])
        refused(store, tmp_path / "image", "truncated|no end-of-archive|ends inside|missing")
    (tmp_path / "image").write_bytes(gzip.compress(whole)[:-20])
    refused(store, tmp_path / "image", "gzip|compressed stream ends too early")


def test_bombs(store: Store, tmp_path: Path) -> None:
    big = make_tar((header("f"), bytes(3 << 20)))
    limits = Limits(total_bytes=2 << 20)
    layout, _ = layout_of(big, compress=squeeze, suffix="+gzip")
    refused(store, layout.to_tar(tmp_path / "image"), "total_bytes", limits=limits)
    (tmp_path / "image").write_bytes(squeeze(big))
    refused(store, tmp_path / "image", "total_bytes", limits=limits)
    (tmp_path / "image").write_bytes(big)
    refused(store, tmp_path / "image", "total_bytes", limits=limits)


def test_one_bad_layer_publishes_none(store: Store, tmp_path: Path) -> None:
    layout, _ = layout_of(*LAYERS, make_tar(header("../evil")))
    refused(store, layout.to_tar(tmp_path / "image"), r"blobs/sha256/\w+: \.\./evil: the path has a '\.\.' component")
