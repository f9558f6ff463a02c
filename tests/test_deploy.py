"""What deploy/ ships is what the daemons take: the examples parse, the units start what exists."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import controlplane.config
import hostd.config
from tests.test_architecture import ROOT

EXAMPLES = sorted((ROOT / "deploy").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_right(path: Path) -> None:
    if path.name.startswith("hostd"):
        assert hostd.config.load(path).host
    else:
        assert controlplane.config.load(path).listen


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.service")), ids=lambda path: path.name)
def test_units_start_commands_that_are_installed(path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (start,) = [line for line in path.read_text().splitlines() if line.startswith("ExecStart=")]
    words = start.removeprefix("ExecStart=").split()
    assert words[0] == "/usr/bin/env" and words[1] in scripts and words[2] == "--config"
