"""Curves of demand: what is read, what is refused by line, and what replaying one amounts to."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from controlplane.capacity.demand import Curve, Step, paced, parse_curve, read_curve, written
from controlplane.capacity.following import Answer, Sample, drawn, figures_of, plotted, table
from controlplane.errors import ConfigError

TEXT = "# an app\n\ntime_s,memory_mib\n10,24\n20,310.2\n30,310.2\n40,24\n70,24\n"
CURVES = Path(__file__).parents[2] / "bench/curves"


def test_a_curve_begins_at_0_and_keeps_only_changes() -> None:
    curve = parse_curve(TEXT.splitlines(), "x.csv")
    assert curve == Curve((Step(0, 24), Step(10, 311), Step(30, 24)), 60)
    assert (curve.peak_mib, round(curve.wanted_gib_s * 1024)) == (311, 10 * 24 + 20 * 311 + 30 * 24)
    assert parse_curve(written(curve, ["note"]).splitlines(), "y") == curve


def test_another_pace_and_height() -> None:
    curve = paced(parse_curve(TEXT.splitlines(), "x.csv"), speed=10, scale=0.5)
    assert curve == Curve((Step(0, 12), Step(1, 156), Step(3, 12)), 6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "x.csv: is empty; its first line should be time_s,memory_mib"),
        ("time,mem\n", "x.csv:1: the header is 'time,mem'"),
        ("time_s,memory_mib\n0,5\n", "x.csv: has 1 lines of demand: two are needed"),
        ("time_s,memory_mib\n0,5\n0,6\n", "x.csv:3: time_s 0 is not after 0"),
        ("time_s,memory_mib\n0,5\n# more\n3,6,7\n", "x.csv:4: has 3 fields"),
        ("time_s,memory_mib\n0,5\nsoon,6\n", "x.csv:3: time_s = 'soon' is not a number"),
        ("time_s,memory_mib\n0,-5\n1,6\n", "x.csv:2: memory_mib = '-5' is not a number of at least 0"),
        ("time_s,memory_mib\n0,nan\n1,6\n", "x.csv:2: memory_mib = 'nan'"),
        ("time_s,memory_mib\n0,536870912\n1,6\n", "in MiB, not in bytes"),
        ('time_s,memory_mib\n0,"5\n1,6\n', "x.csv:2: is not CSV"),
    ],
)
def test_what_is_wrong_is_told_by_its_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_curve(text.splitlines(), "x.csv")
    assert says in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.csv: cannot be read: No such file"):
        read_curve(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.csv: is not UTF-8"):
        read_curve(tmp_path / "binary.csv")


def test_the_samples_that_come_with_it_are_curves() -> None:
    curves = [read_curve(path) for path in sorted(CURVES.glob("*.csv"))]
    assert len(curves) == 8
    assert all(curve.peak_mib > 2 * min(step.memory_mib for step in curve.steps) for curve in curves)


SAMPLES = [Sample(0, 0, 0, 256, 250), Sample(1, 512, 0, 256, 250), Sample(2, 512, 512, 768, 700),
           Sample(4, 0, 0, 256, 256)]  # fmt: skip
ANSWERS = [Answer(1.0, 1.5, 512, 0.25), Answer(3.0, 4.0, 0, 0.25)]


def test_figures_are_integrals_and_lags_of_growing_only() -> None:
    figures = figures_of(SAMPLES, ANSWERS, 1024)
    assert (figures.duration_s, figures.ceiling_gib_s) == (4, 4.0)
    assert (figures.demand_gib_s, figures.held_gib_s, figures.shortfall_gib_s) == (1.5, 1.0, 0.5)
    assert (figures.allocated_gib_s, figures.saved) == (2.0, 0.5)
    assert (figures.lag_median_s, figures.lag_most_s, figures.busy_s) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="two are"):
        figures_of(SAMPLES[:1], ANSWERS, 1024)


def test_pictures_show_each_series_on_one_scale() -> None:
    root = ET.fromstring(drawn("a <b> & c", SAMPLES, 1024))
    texts = [element.text for element in root.iter() if element.text]
    assert "a <b> & c" in texts
    assert {"demand", "held by it", "allocated", "actual", "its maximum"} <= set(texts)
    assert not [element for element in root.iter() if element.tag.endswith(("script", "image", "style"))]
    lines = plotted(SAMPLES, 1024, 20).splitlines()
    assert [line.split()[-4] for line in lines if line.startswith(("demand", "allocated"))] == ["512", "768"]
    assert table(SAMPLES).splitlines()[2] == "1.000,512,0,256,250"
    assert "nothing happened" in drawn("t", [], 0) or "its maximum" in drawn("t", [], 0)
