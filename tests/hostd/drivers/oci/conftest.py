"""The surroundings of the OCI drivers, made once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostd.drivers.oci.rig import RUNTIMES, OciRig, Surroundings, surroundings


@pytest.fixture(scope="session")
def around() -> Iterator[Surroundings]:
    """Runtimes as they work here, an image, cgroups."""
    with surroundings() as made:
        yield made


@pytest.fixture(params=RUNTIMES)
def each(request: pytest.FixtureRequest, around: Surroundings) -> OciRig:
    """Both classes, one after the other."""
    return OciRig(around, request.param)
