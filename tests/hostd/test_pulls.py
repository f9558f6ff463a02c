"""Images from a registry: Debian's docker-registry on loopback, skopeo on both sides of it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.api.v1 import images_pb2
from hostd.errors import ImageMissing, InvalidSpec, NotAdmitted, RegistryUnavailable
from hostd.images import domain_of
from hostd.pulls import argv_of, pull_image, registry_of
from hostd.sandboxes import IMPORT_PREFIX
from sharedcache.store import Store
from tests.hostd.hostkit import config_of, open_store
from tests.ociregistry import Registry, serving
from tests.sharedcache.ocikit import OciLayout, layer, squeeze

USER, PASSWORD = "loom", "open sesame"
PASSWORD_HASH = "$2b$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW"  # bcrypt, by libxcrypt


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serving(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that knows a single user."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "users").write_text(f"{USER}:{PASSWORD_HASH}\n")
    auth = f"auth:\n  htpasswd:\n    realm: closed\n    path: {folder / 'users'}\n"
    with serving(folder, auth) as found:
        yield replace(found, credentials=f"{USER}:{PASSWORD}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "state").mkdir()
    with open_store(tmp_path) as store:
        yield store


def image_layout(content: bytes = b"x") -> OciLayout:
    layout = OciLayout()
    return layout.index(
        layout.image([layer("etc/one", content=content), layer("etc/two")], compress=squeeze, suffix="+gzip")
    )


async def pull(registry: Registry, store: Store, folder: Path, reference: str, **config: object) -> images_pb2.Image:
    """The image, after its progress; nothing is left in the spool."""
    named = {"registries": (registry.address,), "plain_registries": (registry.address,), **config}
    request = images_pb2.PullImageRequest(reference=reference, tenant="acme")
    try:
        answers = [answer async for answer in pull_image(request, store, config_of(folder, **named))]
    finally:
        assert list((folder / "state").glob(f"{IMPORT_PREFIX}*")) == []
    assert {answer.progress.step for answer in answers[:-1]} >= {"convert", "publish"}
    return answers[-1].image


async def test_an_image_is_pulled_converted_and_the_tenants(registry: Registry, store: Store, tmp_path: Path) -> None:
    reference = registry.push(image_layout(), "team/app:1.2")
    image = await pull(registry, store, tmp_path, reference)
    kept = store.get_image(domain_of("acme"), image.digest)
    assert (image.format, len(kept.layers), kept.config.entrypoint) == ("oci", 2, ("/bin/app",))
    assert (await pull(registry, store, tmp_path, reference)).digest == image.digest
    for one in kept.layers:
        store.get(domain_of("acme"), one.digest)


async def test_what_is_not_there_says_so(registry: Registry, store: Store, tmp_path: Path) -> None:
    registry.push(image_layout(), "team/tagged:1")
    for name in ("team/none:1", "team/tagged:2"):
        with pytest.raises(ImageMissing, match=rf"no image {registry.address}/{name}: check repository and tag"):
            await pull(registry, store, tmp_path, f"{registry.address}/{name}")


async def test_a_registry_that_does_not_answer_or_has_no_tls_is_told_apart(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(RegistryUnavailable, match=f"{away} cannot be reached"):
            await pull(registry, store, tmp_path, f"{away}/a:1", registries=("*",))
    with pytest.raises(RegistryUnavailable, match="does not speak TLS") as caught:
        await pull(registry, store, tmp_path, f"{registry.address}/a:1", plain_registries=())
    assert caught.value.reason == "RegistryPlain"


def login(folder: Path, registry: Registry, tenant: str, credentials: str) -> Path:
    """The tenant's file of credentials, as `skopeo login` writes it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{tenant}.json"
    word = base64.b64encode(credentials.encode()).decode()
    path.write_text(json.dumps({"auths": {registry.address: {"auth": word}}}))
    path.chmod(0o600)
    return path


async def test_a_tenants_credentials_are_its_own_and_are_told_to_nobody(
    closed: Registry, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    reference = closed.push(image_layout(b"secret"), "team/closed:1")
    folder = tmp_path / "auth"
    login(folder, closed, "other", closed.credentials)
    with pytest.raises(NotAdmitted, match=f"skopeo login --authfile DIR/acme.json {closed.address}") as caught:
        await pull(closed, store, tmp_path, reference, registry_auth_dir=folder)
    assert caught.value.reason == "RegistryDenied"
    mine = login(folder, closed, "acme", f"{USER}:wrong")
    with pytest.raises(NotAdmitted, match="the credentials that this host has"):
        await pull(closed, store, tmp_path, reference, registry_auth_dir=folder)
    login(folder, closed, "acme", closed.credentials)
    assert (await pull(closed, store, tmp_path, reference, registry_auth_dir=folder)).digest
    mine.chmod(0o640)
    with pytest.raises(NotAdmitted, match="chmod 600"):
        await pull(closed, store, tmp_path, reference, registry_auth_dir=folder)
    argv = argv_of(reference, tmp_path / "archive", tmp_path / "tmp", verify=True, credentials=mine)
    assert not any(PASSWORD in word for word in [*argv, caplog.text])


async def test_what_root_is_logged_in_to_is_no_tenants(
    closed: Registry, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = closed.push(image_layout(b"roots"), "team/roots:1")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login(tmp_path / "root", closed, "root", closed.credentials)))
    with pytest.raises(NotAdmitted):
        await pull(closed, store, tmp_path, reference)


async def test_a_registry_that_is_not_named_is_never_asked(registry: Registry, store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotAdmitted, match="registries") as caught:
        await pull(registry, store, tmp_path, f"{registry.address}/team/app:1.2", registries=("r.example",))
    assert caught.value.reason == "RegistryNotAllowed"


async def test_a_pull_that_nobody_waits_for_ends(registry: Registry, store: Store, tmp_path: Path) -> None:
    reference = registry.push(image_layout(b"y" * 1000), "team/left:1")
    config = config_of(tmp_path, registries=("*",), plain_registries=(registry.address,))
    pulling = pull_image(images_pb2.PullImageRequest(reference=reference, tenant="acme"), store, config)
    await anext(aiter(pulling))
    await pulling.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    assert list((tmp_path / "state").glob(f"{IMPORT_PREFIX}*")) == []


def test_which_registries_may_be_asked(tmp_path: Path) -> None:
    assert registry_of("r.example:5000/a/b:1", config_of(tmp_path, registries=("r.example:5000",))) == "r.example:5000"
    assert registry_of("any.example/a", config_of(tmp_path, registries=("*",))) == "any.example"
    for text in ("nothing", "-o/x", "r.example/a b"):
        with pytest.raises(InvalidSpec):
            registry_of(text, config_of(tmp_path, registries=("*",)))


def test_skopeo_is_told_whether_to_verify(tmp_path: Path) -> None:
    argv = argv_of("r.example/a:1", tmp_path / "archive", tmp_path / "tmp", verify=True, credentials=None)
    assert "--src-no-creds" in argv
    assert "--src-tls-verify=true" in argv and argv[-2:] == [
        "docker://r.example/a:1",
        f"oci-archive:{tmp_path / 'archive'}",
    ]
