"""Hosts of fake sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.hostd.hostkit import Host, running_host


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    """One that runs."""
    async with running_host(tmp_path) as running:
        yield running
