"""Calibration files, right sizes, and what reports look like."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from controlplane.capacity import calibration, svg, textplot
from controlplane.capacity.calibration import Calibration
from controlplane.capacity.fit import HostMemory
from controlplane.capacity.html import Page, Table, page
from controlplane.capacity.measures import Moment
from controlplane.capacity.rightsize import Sample, read, rightsize
from controlplane.capacity.workload import normal_below, normal_quantile
from controlplane.errors import ConfigError


def test_a_calibration_is_read_as_it_is_written_and_strictly(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    measured = Calibration("here", guest_overhead_mib=47, layer_share=0.4)
    path.write_text(calibration.dump(measured))
    assert calibration.load(path) == measured
    for text, complaint in (
        ('{"schema": 1, "wat": 1}', "unknown key 'wat'"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1, "guest_pids": "x"}', "guest_pids"),
        ('{"schema": 1, "start_cold_s": -1}', "start_cold_s"),
        ("{", "is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            calibration.load(path)


def test_right_sizes_bound_what_was_seen() -> None:
    samples = [Sample("web", 60.0 * at, 100.0 + at % 20) for at in range(3000)]
    (size,) = rightsize(samples)
    assert size.lower_mib <= size.target_mib <= size.upper_mib
    assert 1.15 * 117 <= size.target_mib <= 1.15 * 117 * 1.06
    assert (size.samples, size.peak_mib, size.span_s, size.age_s) == (3000, 119, 2999 * 60.0, 0.0)
    (few,) = rightsize(samples[:30])
    assert few.upper_mib / few.target_mib > size.upper_mib / size.target_mib  # less history, wider bounds
    (old,) = rightsize(samples, now_s=3000 * 60.0 + 500)
    assert old.age_s == 560.0


def test_new_samples_count_more_than_old_ones() -> None:
    day = 86_400.0
    samples = [Sample("w", at * 60.0, 1000.0) for at in range(1440)]
    samples += [Sample("w", 8 * day + at * 60.0, 100.0) for at in range(1440)]
    assert rightsize(samples)[0].target_mib < 200
    assert rightsize(samples[:1440])[0].target_mib > 1000


def test_a_history_is_read(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("workload,time_s,memory_mib\nweb,0,10\nweb,60,20\n")
    assert read(path) == [Sample("web", 0.0, 10.0), Sample("web", 60.0, 20.0)]
    path.write_text("a,b\n")
    with pytest.raises(ConfigError, match="no history"):
        read(path)


def test_charts_are_well_formed_and_name_everything() -> None:
    hosts = [HostMemory(f"h<{at}>", 100 * at, 50, 10, 1000 - 100 * at) for at in range(9)]
    chart = svg.bar_chart("Memory & more", svg.memory_bars(hosts), svg.PARTS)
    texts = [node.text for node in ElementTree.fromstring(chart).iter() if node.tag.endswith("text")]
    assert {"Memory & more", "private", "shared", "reserved", "free", "h<8>"} <= set(texts)
    many = svg.memory_bars([HostMemory(f"h{at}", at, 0, 0, 1) for at in range(1000)])
    assert len(many) <= svg.MOST_BARS
    moments = [Moment(float(at), 100 * at, 60 * at, 500, at, 0) for at in range(10)]
    ElementTree.fromstring(svg.demand_chart("Demand", moments, (4.0,)))
    ElementTree.fromstring(svg.demand_chart("Nothing", []))
    whole = page(Page("T<", "it fits", True, (chart,), (Table("x", ("a",), (("1<",),)),), ("n",)))
    assert "T&lt;" in whole and "1&lt;" in whole
    assert "http://www.w3.org/2000/svg" in whole and "<script" not in whole and "src=" not in whole


def test_terminal_plots_keep_their_width() -> None:
    assert textplot.stacked((1, 1, 0, 2), 4, 8) == "██▓▓░░░░"
    assert textplot.stacked((1000, 1, 0, 0), 1001, 10).count("▓") in (0, 1)
    assert len(textplot.sparkline([float(at) for at in range(500)], 40)) == 40
    assert textplot.sparkline([], 40) == ""
    assert textplot.bar(5, 10, 4) == "██"


def test_the_normal_distribution_and_its_inverse_agree() -> None:
    for probability in (0.01, 0.5, 0.95, 0.999):
        assert normal_below(normal_quantile(probability)) == pytest.approx(probability, abs=1e-8)
    with pytest.raises(ValueError, match="no quantile"):
        normal_quantile(1.0)
