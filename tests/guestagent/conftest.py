"""Fixtures: the real agent on this machine (one for a module), and one configured for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guestagent.realagent import Link, RealAgent, built, why_not_here


@pytest.fixture(scope="session")
def sanitized_agent() -> Path:
    """The program built with ASan and UBSan."""
    reason = why_not_here()
    if reason:
        pytest.skip(reason)
    return built("sandloom-agent-asan")


@pytest.fixture
def agent(sanitized_agent: Path, tmp_path: Path) -> Iterator[RealAgent]:
    """A fresh agent that nobody has spoken to; at the end it must leave cleanly."""
    running = RealAgent(sanitized_agent, tmp_path)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture
def link(agent: RealAgent) -> Link:
    """A configured agent's connection."""
    return agent.configured()
