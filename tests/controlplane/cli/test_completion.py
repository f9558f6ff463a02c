"""The completion scripts under real shells, with the real command answering for live names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.cli.commands import TABLE
from controlplane.cli.completion import script
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric

COMPLETE = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_sandloom
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def command(folder: Path) -> str:
    """A `sandloom` of its own that runs this checkout."""
    path = folder / "sandloom"
    root = Path(__file__).resolve().parents[3]
    path.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m controlplane.cli.main "$@"\n')
    path.chmod(0o755)
    return str(path)


def complete(folder: Path, line: str, shell: str = "bash") -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    text = script(TABLE, shell)
    (folder / "completion").write_text(text)
    words = " ".join(f"'{word}'" for word in [command(folder), *line.split(" ")])
    plain = "--norc" if shell == "bash" else "-f"
    text = COMPLETE.format(script=folder / "completion", words=words)
    done = subprocess.run([shell, plain, "-c", text], capture_output=True, text=True, timeout=30, cwd=folder)
    assert done.stderr == ""
    return sorted(done.stdout.split())


CASES = [
    ("re", ["replay", "resize", "restore"]),
    ("dev ", ["down", "status", "up"]),
    ("image im", ["import"]),
    ("run --cl", ["--class"]),
    ("run --class ", ["guest-kernel", "host-kernel", "user-kernel"]),
    ("--home /x ps --o", ["--output"]),
    ("ps -o j", ["json"]),
    ("completion ", ["bash", "zsh"]),
    ("exec box -- l", []),
    ("run --name ", []),
    ("image import som", ["some-file.tar"]),
]


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line for line, _ in CASES])
def test_bash_completes(tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / "some-file.tar").touch()
    assert complete(tmp_path, line) == words


def test_bash_completes_live_names(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    fabric.add("webserver")
    fabric.add("worker")
    assert complete(tmp_path, f"--home {cli.home} exec w") == ["webserver", "worker"]
    assert complete(tmp_path, f"--home {cli.home} image rm d") == ["debian"]
    assert complete(tmp_path, "--home /none exec w") == []


def test_the_whole_script_is_right_for_each_shell(cli: Cli) -> None:
    for shell in ("bash", "zsh"):
        text = cli.ok("completion", shell)
        if shutil.which(shell):
            assert subprocess.run([shell, "-n"], input=text, text=True, capture_output=True, timeout=10).stderr == ""
        assert "@" not in text.replace("[@]", "")


def test_zsh_takes_the_script_and_knows_the_command(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "completion").write_text(script(TABLE, "zsh"))
    done = subprocess.run(
        ["zsh", "-f", "-c", f"source {tmp_path}/completion; print -r -- $_comps[sandloom]"],
        capture_output=True, text=True, timeout=30, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("_bash_complete -o bashdefault -F _sandloom", "")
