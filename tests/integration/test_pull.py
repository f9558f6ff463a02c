"""`image pull` on a fabric that `dev up` made: real daemons, a real registry, and a host of simulated sandboxes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.fabric import Fabric
from tests.ociregistry import Registry, serving
from tests.sharedcache.ocikit import OciLayout, layer, squeeze


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with serving(tmp_path) as found:
        yield found


@pytest.fixture
def simulated() -> Iterator[Fabric]:
    """A fabric of one's own whose hostd boots no guests; its configuration says so before `dev up` does anything."""
    if os.geteuid() != 0:
        pytest.skip("needs root: `dev up` refuses to begin without it")
    folder = Path(tempfile.mkdtemp(prefix="sl-it-", dir="/var/tmp"))
    fabric = Fabric(folder / "home")
    fabric.home.mkdir(mode=0o711)
    (fabric.home / "hostd.toml").write_text('driver = "fake"\n')
    try:
        yield fabric
    finally:
        fabric.run("dev", "down", "--purge")
        shutil.rmtree(folder)


def test_an_image_is_pulled_onto_a_fabric_of_one_host(simulated: Fabric, registry: Registry) -> None:
    layout = OciLayout()
    layout.index(layout.image([layer("etc/one", content=b"x")], compress=squeeze, suffix="+gzip"))
    reference = registry.push(layout, "team/app:1.2")
    simulated.ok("dev", "up")
    refused = simulated.run("image", "pull", reference)
    assert refused.code == 1
    assert f"sandloom dev up --registry {registry.address}" in refused.err
    simulated.ok("dev", "up", "--plain-registry", registry.address)
    assert "app:1.2" in simulated.ok("image", "pull", reference)
    missing = simulated.run("image", "pull", f"{registry.address}/team/app:9")
    assert (missing.code, "check repository and tag" in missing.err) == (1, True), missing
    simulated.ok("dev", "up")  # the registry stays
    assert [image["name"] for image in simulated.asked("image", "ls")] == ["app:1.2"]
