"""`sandloom replay` over a real connection: the real program, run in this process instead of a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import memoryload
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric, FakeProcess

CURVE = "time_s,memory_mib\n0,4\n1,20\n2,6\n3,6\n"


@pytest.fixture
def curve(tmp_path: Path) -> str:
    path = tmp_path / "curve.csv"
    path.write_text(CURVE)
    return str(path)


def lines_of(process: FakeProcess) -> Iterator[str]:
    pending = b""
    while piece := process.stdin.get():
        *lines, pending = (pending + piece).split(b"\n")
        yield from (line.decode() for line in lines)


def load(process: FakeProcess) -> int:
    assert list(process.asked.argv)[:3] == ["python3", "-u", "-c"]
    compile(process.asked.argv[3], "memoryload", "exec")
    memoryload.follow(lines_of(process), lambda text: process.out(text.encode() + b"\n"))
    return 0


def test_a_replay_tells_draws_and_writes(fabric: FakeFabric, cli: Cli, curve: str, tmp_path: Path) -> None:
    fabric.programs["python3"] = load
    box = fabric.add("web")
    box.status.resize.allocated_memory_mib, box.status.resize.actual_memory_mib = 512, 500
    svg, samples = tmp_path / "web.svg", tmp_path / "web.csv"
    done = cli("replay", "web", curve, "--speed", "10", "--passes", "1", "--every", "0.05",
               "--svg", str(svg), "--samples", str(samples))  # fmt: skip
    assert done.code == 0, done
    assert "3 of 3 in" in done.out and "512 MiB at most" in done.out and "50% less than its maximum" in done.out
    assert svg.read_text().startswith("<svg ")
    rows = [line.split(",") for line in samples.read_text().splitlines()[1:]]
    assert {row[1] for row in rows} >= {"4", "20", "6"} and rows[-1][2:] == ["6", "512", "500"]
    asked = json.loads(cli.ok("replay", "web", curve, "--speed", "30", "--scale", "0.5", "-o", "json"))
    assert asked["broken"] == "" and asked["figures"]["busy_s"] > 0


def test_what_the_sandbox_lacks_is_said(fabric: FakeFabric, cli: Cli, curve: str) -> None:
    fabric.add("web")
    done = cli("replay", "web", curve)
    assert (done.code, "python3" in done.err, "whose image has python3" in done.err) == (1, True, True)


def test_a_workload_that_is_killed_leaves_figures_and_an_error(fabric: FakeFabric, cli: Cli, curve: str) -> None:
    def killed(process: FakeProcess) -> int:
        process.out(b"ready\nPython says hello\n")
        next(lines_of(process))
        process.out(b"done 4 0.1\nhas 8\n")
        return 137

    fabric.programs["python3"] = killed
    fabric.add("web")
    done = cli("replay", "web", curve, "--speed", "10")
    assert (done.code, "1 of 3 in" in done.out) == (1, True)
    assert "web did not come to the curve's end" in done.err and "exit status 137" in done.err


def test_bad_input_is_refused_before_anything_runs(fabric: FakeFabric, cli: Cli, curve: str, tmp_path: Path) -> None:
    fabric.add("web")
    (tmp_path / "bad.csv").write_text("time_s,memory_mib\n0,1\n0,2\n")
    done = cli("replay", "web", str(tmp_path / "bad.csv"))
    assert (done.code, "bad.csv:3: time_s 0 is not after 0" in done.err) == (1, True)
    for words in (("--speed", "0"), ("--scale", "many"), ("--passes", "-1"), ("--every", "0.001")):
        assert cli("replay", "web", curve, *words).code == 2
    fabric.add("old", sandboxes_pb2.EXITED)
    assert "it has ended (EXITED)" in cli("replay", "old", curve).err
    assert "ExecSandbox" not in [name for name, _ in fabric.calls]


def test_a_curve_above_the_maximum_is_noted(fabric: FakeFabric, cli: Cli, curve: str) -> None:
    fabric.programs["python3"] = load
    box = fabric.add("web")
    box.spec.resources.memory_max_mib = 16
    assert "it will not come to its end" in cli("replay", "web", curve, "--speed", "30").err
