"""`sandloom explain`, and where `sandloom run` says a sandbox may go."""

from __future__ import annotations

import json

import pytest

from controlplane.api.v1 import sandboxes_pb2 as pb
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric


def test_why_a_sandbox_is_where_it_is(fabric: FakeFabric, cli: Cli) -> None:
    fabric.add("web")
    fabric.explanation = pb.Explanation(
        name="web", host="h1", message="placed on h1, the best of 3 hosts then", hosts_then=3, marginal_mib=320,
        shared_mib=150, charge_mib=256, placed_because=[pb.Reason(what="memory", why="it adds 320 MiB there")],
        verdicts=[
            pb.HostVerdict(host="h2", fits=True, score=[pb.Reason(what="memory", why="it adds 470 MiB there")]),
            pb.HostVerdict(host="h3", reason="ShortOfMemory", message="h3: 470 MiB needed, 9 left", lacking=461),
        ],
        refused=[pb.ReasonCount(reason="ShortOfMemory", hosts=1)], fitting=1,
    )  # fmt: skip
    assert cli.ok("explain", "web").splitlines() == [
        "web: placed on h1, the best of 3 hosts then",
        "  memory  it adds 320 MiB there",
        "  sizes   charged 256 MiB; added 320 MiB to its host, shares 150 MiB that were there",
        "",
        "other hosts now:",
        "HOST  VERDICT        LACKING  WHY",
        "h2    fits                 -  it adds 470 MiB there",
        "h3    ShortOfMemory      461  470 MiB needed, 9 left",
        "in all: 1 could take it now; 1 ShortOfMemory",
    ]
    assert json.loads(cli.ok("explain", "web", "-o", "json"))["verdicts"][1]["lacking"] == 461
    assert fabric.calls[-1][1].hosts == 20


def test_a_wrong_number_of_hosts_and_an_unknown_sandbox(fabric: FakeFabric, cli: Cli) -> None:
    assert cli("explain", "web", "--hosts", "0").code == 2
    done = cli("explain", "none")
    assert (done.code, "no sandbox none" in done.err) == (1, True)


def test_run_takes_rules_along(fabric: FakeFabric, cli: Cli) -> None:
    cli(
        "run", "-d", "--affinity", "zone=eu", "--affinity", "!slow", "--tolerate", "gpu", "--spread", "zone:1",
        "--trust", "kvm", "debian", "--", "true",
    )  # fmt: skip
    (rules,) = (request.spec.rules for name, request in fabric.calls if name == "CreateSandbox")
    assert list(rules.affinity) == ["zone=eu", "!slow"]
    assert (list(rules.tolerations), rules.spread, list(rules.trust)) == (["gpu"], "zone:1", ["kvm"])


@pytest.mark.parametrize(
    "wrong", [("--affinity", "zone="), ("--spread", "zone:0"), ("--trust", "me"), ("--tolerate", "=x")]
)
def test_a_wrong_rule_is_told_before_anything_is_done(fabric: FakeFabric, cli: Cli, wrong: tuple[str, str]) -> None:
    done = cli("run", *wrong, "debian", "--", "true")
    assert done.code == 125
    assert wrong[0] in done.err
    assert not fabric.calls
