"""Where the built in-guest program is."""

from __future__ import annotations

from pathlib import Path

from guestagent.errors import AgentMissing

BUILT = Path(__file__).parent / "_build" / "sandloom-agent"


def binary_path(built: Path = BUILT) -> Path:
    """The static program that is PID 1 of a guest. AgentMissing when it is not built."""
    if not built.is_file():
        raise AgentMissing(f"the in-guest agent is not built ({built} is missing): run `make setup`")
    return built
