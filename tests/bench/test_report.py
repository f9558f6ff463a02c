"""The benchmarks' report: what a bar means, what the last line holds, when the exit status is 1."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from tests.bench.report import CannotMeasure, Report, Runs, interleaved, quantity, ratio, run


def runs(*values: float, unit: str = "ms") -> Runs:
    return Runs(values, unit)


def said(text: str) -> dict[str, Any]:
    """The JSON line: always the last one."""
    body: dict[str, Any] = json.loads(text.rstrip("\n").rsplit("\n", 1)[-1])
    return body


def test_a_met_bar_has_its_median_and_every_run() -> None:
    def body(report: Report) -> None:
        report.row("us", runs(1, 2, 4))
        report.bar("speed", ratio(runs(10, 20, 30), runs(1, 2, 4)), at_least=3, peer="mkfs")

    out = io.StringIO()
    assert run("demo", body, out=out) == 0
    line = said(out.getvalue())
    assert line["bench"] == "demo" and line["machine"]["cpus"] >= 1
    assert line["bars"]["speed"] == {
        "value": 10,
        "bar": 3,
        "at": "least",
        "ok": True,
        "peer": "mkfs",
        "unit": "x",
        "runs": [10, 10, 7.5],
        "min": 7.5,
        "max": 10,
    }
    assert "met (peer: mkfs; 7.5x to 10x)" in out.getvalue()


@pytest.mark.parametrize(
    ("values", "bound", "code"),
    [((2.9, 3.1, 2.8), (3.0, None), 1), ((3.0,), (3.0, None), 0), ((1.2,), (None, 1.15), 1)],
)
def test_a_missed_bar_exits_1(values: tuple[float, ...], bound: tuple[float | None, float | None], code: int) -> None:
    def body(report: Report) -> None:
        report.bar("other", runs(1), at_least=1)
        report.bar("speed", Runs(values, "x"), at_least=bound[0], at_most=bound[1])

    out = io.StringIO()
    assert run("demo", body, out=out) == code
    assert said(out.getvalue())["bars"]["speed"]["ok"] is (code == 0)
    assert ("MISSED" in out.getvalue()) is (code == 1)


def test_what_could_not_be_measured_is_said_and_is_not_met() -> None:
    def body(report: Report) -> None:
        report.bar("first", runs(5), at_least=1)
        raise CannotMeasure("no tmpfs with huge pages here")

    out = io.StringIO()
    assert run("demo", body, promised=[("first", 1), ("second", 80)], out=out) == 1
    bars = said(out.getvalue())["bars"]
    assert bars["first"]["ok"] is True
    assert bars["second"] == {
        "value": None,
        "bar": 80,
        "at": "least",
        "ok": False,
        "peer": "",
        "unit": "",
        "runs": [],
        "why": "no tmpfs with huge pages here",
    }
    assert "COULD NOT MEASURE: no tmpfs with huge pages here" in out.getvalue()


def test_a_benchmark_without_bars_proves_nothing() -> None:
    assert run("demo", lambda report: None, out=io.StringIO()) == 1


def test_work_is_done_turn_about() -> None:
    order: list[str] = []

    def worker(name: str, value: float) -> float:
        order.append(name)
        return value

    taken = interleaved({"peer": lambda: worker("peer", 3), "us": lambda: worker("us", 1)}, rounds=3)
    assert order == ["peer", "us", "us", "peer", "peer", "us"]
    assert taken["peer"] == runs(3, 3, 3) and taken["us"].median == 1


def test_a_fault_is_not_reported_as_a_result() -> None:
    def body(report: Report) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run("demo", body, out=io.StringIO())


def test_runs_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match="no runs"):
        Runs((), "ms")
    with pytest.raises(ValueError, match="finite"):
        runs(float("nan"))
    with pytest.raises(ValueError, match="pairs"):
        ratio(runs(1, 2), runs(1))
    with pytest.raises(ValueError, match="divided"):
        ratio(runs(1), runs(0))
    report = Report("demo")
    report.bar("a", runs(1), at_least=1)
    with pytest.raises(ValueError, match="already"):
        report.bar("a", runs(1), at_least=1)
    with pytest.raises(ValueError, match="one of them"):
        report.bar("b", runs(1))


def test_quantities_for_people() -> None:
    assert quantity(12.3456, "ms") == "12.35 ms"
    assert quantity(123456.7, "MiB") == "123457 MiB"
    assert quantity(3.9, "x") == "3.9x"
