"""`sandloom checkpoint`, `restore` and `fork`: what they ask for, and what they print."""

from __future__ import annotations

import json

import pytest

from controlplane.api.v1 import sandboxes_pb2
from tests.controlplane.cli.conftest import NOW_S, Cli
from tests.controlplane.cli.fakefabric import FakeFabric


def test_a_checkpoint_from_its_taking_to_its_end(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("web").spec.image = "debian"
    done = cli("checkpoint", "web", "--name", "warm")
    assert (done.code, done.out) == (0, "warm\n")
    assert "web stood still for 0.25 s; warm has 64" in done.err
    fabric.checkpoints.kept["warm"].created_at.FromSeconds(int(NOW_S) - 300)
    listed = cli.ok("checkpoint", "ls").splitlines()
    assert listed[0].split() == ["NAME", "OF", "IMAGE", "SIZE", "PAUSE", "AGE", "HOST"]
    assert listed[1].split()[:3] == ["warm", "web", "debian"] and listed[1].split()[-3:] == ["0.25s", "5m", "loom"]
    assert "c0ffee" in cli.ok("checkpoint", "ls", "-o", "wide")
    assert cli.ok("checkpoint", "ls", "-o", "name") == "warm\n"
    assert cli.ok("checkpoint", "rm", "warm") == "warm\n"
    assert cli("checkpoint", "rm", "warm").code == 1
    assert cli("checkpoint", "rm", "-f", "warm").code == 0
    assert "sandloom checkpoint SANDBOX" in cli("checkpoint", "ls").err


def test_a_name_that_is_left_out_is_made_up_and_told(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("web")
    assert cli.ok("checkpoint", "web", "-o", "name") == "made-up\n"
    assert json.loads(cli.ok("checkpoint", "web", "-o", "json"))["pause_s"] == 0.25


def test_restore_prints_the_name_once_it_runs(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("web")
    cli.ok("checkpoint", "web", "--name", "warm")
    assert cli.ok("restore", "warm", "--name", "web-2") == "web-2\n"
    assert "sandloom checkpoint ls" in cli("restore", "nothing").err


def test_a_restore_that_fails_says_why(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("web")
    cli.ok("checkpoint", "web", "--name", "warm")
    fabric.checkpoints.phase = sandboxes_pb2.FAILED
    done = cli("restore", "warm", "--name", "web-2")
    assert done.code == 1 and "why not" in done.err


def test_fork_prints_each_name(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("web")
    done = cli("fork", "web", "--count", "3", "--prefix", "try")
    assert (done.code, done.out) == (0, "try-1\ntry-2\ntry-3\n")
    assert "web stood still for 0.50 s" in done.err
    assert cli.ok("fork", "web") == "made-up-1\n"


@pytest.mark.parametrize("count", ["0", "101", "-1", "many", "2.5", "²"])
def test_a_bad_count_is_refused(fabric: FakeFabric, cli: Cli, count: str) -> None:
    done = cli("fork", "web", f"--count={count}")
    assert done.code == 2 and "not a number of forks" in done.err


def test_hosts_that_do_not_answer_are_named(fabric: FakeFabric, cli: Cli) -> None:
    fabric.checkpoints.silent.append("loom-2")
    assert "loom-2" in cli("checkpoint", "ls").err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("checkpoint", "--help"), "usage: sandloom checkpoint "),
        (("checkpoint", "ls", "--help"), "usage: sandloom checkpoint ls"),
        (("checkpoint", "rm", "--help"), "usage: sandloom checkpoint rm"),
    ],
)
def test_the_noun_is_a_command_and_has_verbs(cli: Cli, argv: tuple[str, ...], words: str) -> None:
    assert words in cli(*argv).out


def test_a_checkpoint_of_nothing_is_wrong(cli: Cli) -> None:
    assert cli("checkpoint").code == 2
    assert cli("checkpoint", "web", "ls").code == 2
