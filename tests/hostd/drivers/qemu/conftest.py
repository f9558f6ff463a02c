"""The surroundings of a QEMU driver, made once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostd.drivers.qemu.rig import Surroundings, surroundings


@pytest.fixture(scope="session")
def around() -> Iterator[Surroundings]:
    """Store, guest kernel, image, cgroups."""
    with surroundings() as made:
        yield made
