"""A store in a temporary folder, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedcache.store import Store
from tests.sharedcache.storekit import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path, clock: Clock) -> Iterator[Store]:
    with Store.open(root, clock=clock, min_free_bytes=0) as opened:
        yield opened
