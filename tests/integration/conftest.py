"""One fabric a test module: starting it and booting guests takes seconds, so tests of a module share it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.fabric import Fabric, belongings
from tests.userland import UserlandUnavailable, userland_tar


@pytest.fixture(scope="session")
def userland() -> Path:
    """The tar of a Debian userland with python3."""
    try:
        return userland_tar()
    except UserlandUnavailable as error:
        pytest.skip(f"no Debian userland can be made here: {error}")


@pytest.fixture(scope="module")
def fabric(userland: Path) -> Iterator[Fabric]:
    """A running fabric that holds the image `userland`. Afterwards nothing of it is left: that is asserted."""
    if os.geteuid() != 0:
        pytest.skip("needs root: each guest gets a uid and a cgroup of its own")
    folder = Path(tempfile.mkdtemp(prefix="sl-it-", dir="/var/tmp"))
    folder.chmod(0o711)
    running = Fabric(folder / "home")
    try:
        running.ok("dev", "up")
        running.ok("image", "import", str(userland), "--name", "userland")
        yield running
    finally:
        down = running.run("dev", "down")
        left = belongings(running.home)
        logs = running.logs()
        shutil.rmtree(folder, ignore_errors=True)
    assert down.code == 0, f"dev down: {down}\n{logs}"
    assert left.nothing(), f"{left}\n{logs}"
