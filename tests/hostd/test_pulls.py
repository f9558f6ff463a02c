"""Images from a registry: Debian's docker-registry on loopback, skopeo on both sides of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controlplane.api.v1 import images_pb2
from hostd.errors import HostdError, InvalidSpec, NotAdmitted
from hostd.images import domain_of
from hostd.pulls import argv_of, pull_image, registry_of
from hostd.sandboxes import IMPORT_PREFIX
from sharedcache.store import Store
from tests.hostd.hostkit import config_of, open_store
from tests.sharedcache.ocikit import OciLayout, layer, squeeze

UP_S = 60.0


@dataclass(frozen=True)
class Registry:
    """One that runs. `pushed` puts a layout there under a name."""

    address: str
    folder: Path

    def push(self, layout: OciLayout, name: str) -> str:
        source = layout.to_folder(self.folder / name.replace(":", "_").replace("/", "_"))
        subprocess.run(
            [
                "skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false",
                f"oci:{source}", f"docker://{self.address}/{name}",
            ],
            check=True, capture_output=True, timeout=UP_S,
        )  # fmt: skip
        return f"{self.address}/{name}"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    binary = shutil.which("docker-registry")
    if binary is None or shutil.which("skopeo") is None:
        pytest.skip("Debian's docker-registry or skopeo is not installed")
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder / 'data'}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, "serve", str(config)], stdout=log, stderr=log)
    try:
        _until_up(port, process)
        yield Registry(f"127.0.0.1:{port}", folder)
    finally:
        process.kill()
        process.wait()


def _until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(int(UP_S / 0.1)):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            raise AssertionError(f"the registry ended: {process.returncode}")
    raise AssertionError("the registry does not listen")


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
    with pytest.raises(HostdError, match="skopeo") as caught:
        await pull(registry, store, tmp_path, f"{registry.address}/team/none:1")
    assert caught.value.reason == "PullFailed"


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
    argv = argv_of("r.example/a:1", tmp_path / "archive", tmp_path / "tmp", verify=True)
    assert "--src-tls-verify=true" in argv and argv[-2:] == [
        "docker://r.example/a:1",
        f"oci-archive:{tmp_path / 'archive'}",
    ]
