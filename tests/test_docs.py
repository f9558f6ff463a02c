"""The documents name only what exists: commands, make targets, files, and nothing of anybody's machine."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, tracked

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "guestagent/PROTOCOL.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.M))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(name))
    missing = [link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()]
    assert missing == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    named = set(re.findall(r"`make ([a-z][a-z-]*)`|^ {4}make ([a-z][a-z-]*)", text_of(name), re.M))
    wanted = {first or second for first, second in named}
    assert wanted - make_targets() == set()


def test_every_make_target_is_explained() -> None:
    """`make help` lists every target that a person calls."""
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"make ([a-z-]+)", shown))
    assert make_targets() - {"default"} <= listed | {"help"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_that_are_named_exist(name: str) -> None:
    """`hostd/sandbox.py` in backquotes is a file; with a star it is at least one."""
    named = set(re.findall(r"`((?:[\w*]+/)+[\w*]+\.(?:py|proto|c|h|md|sh))`", text_of(name)))
    missing = [path for path in named if not any(ROOT.glob(path)) and not any(ROOT.glob(f"*/{path}"))]
    assert missing == []


def sandloom(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controlplane.cli.main", *arguments], capture_output=True, text=True, timeout=60
    )


def test_commands_in_the_readme_exist() -> None:
    code = [first or second for first, second in re.findall(r"`([^`]+)`|^ {4}(.+)$", text_of("README.md"), re.M)]
    named = set(re.findall(r"\bsandloom ([a-z]+)", "\n".join(code)))
    assert {"run", "exec", "doctor", "dev", "image", "share"} <= named
    unknown = [name for name in sorted(named) if sandloom(name, "--help").returncode != 0]
    assert unknown == []


def test_an_unknown_command_would_be_noticed() -> None:
    assert sandloom("no-such-command", "--help").returncode != 0


def test_clean_names_every_folder_that_a_build_or_a_test_makes() -> None:
    done = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True)
    removed = {path for word in done.stdout.split() for path in (word, *map(str, ROOT.glob(word)))}
    built = {str(path) for top in ("native", "guestagent", "hostd") for path in (ROOT / top).rglob("_build")}
    assert built | {".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"} <= removed | {
        str(ROOT / word) for word in removed
    }


def test_nothing_names_a_machine_or_a_registry() -> None:
    """No absolute path of somebody's checkout, no registry's host, in anything that is committed."""
    banned = re.compile(r"/work/|/home/[a-z]+/|/root/\.|pypi\.org|deb\.debian\.org|registry\.npmjs|artifact-registry")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if banned.search(line)
    ]
    assert found == []
