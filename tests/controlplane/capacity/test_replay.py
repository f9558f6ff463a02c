"""A replay equals the same simulation written plainly, to the last sandbox; what it measures is what happened."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.cluster import Planning, empty_host
from controlplane.capacity.measures import weighted
from controlplane.capacity.replay import Losses, replay
from controlplane.capacity.sizing import Target, hosts_of, met, run_with, smallest
from controlplane.capacity.trace import FOREVER, Arrival, Trace, compressed, in_order, written
from controlplane.capacity.trace_public import Assumed, read
from controlplane.capacity.workload import Image, Workload
from controlplane.errors import ConfigError
from controlplane.model import LayerSize
from controlplane.scheduler_values import MIB
from tests.bench.plainsim import Plain

CALIBRATION = Calibration()
HOSTS = [empty_host(f"h{at}", 4096 + 2048 * (at % 2), 4000, CALIBRATION) for at in range(5)]


def workload(number: int, memory_mib: int = 512, **how: object) -> Workload:
    image = Image(f"i{number % 3}", (LayerSize("base", 200 * MIB), LayerSize(f"own{number % 3}", 90 * MIB)))
    return replace(Workload(f"w{number}", memory_mib, 2 * memory_mib, 700, image, f"t{number % 2}"), **how)  # type: ignore[arg-type]


def trace(seed: int, count: int) -> Trace:
    random = Random(seed)
    works = [workload(number, 100 * (1 + number)) for number in range(8)]
    long_s = FOREVER if seed % 3 == 0 else 9.0
    return in_order(
        Arrival(float(random.randrange(count)), random.choice((0.0, 3.0, 40.0, long_s)), f"s{at}",
                random.choice(works))
        for at in range(count)
    )  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 1 << 16),
    st.integers(1, 150),
    st.sampled_from((Planning(), Planning(cpu_overcommit=2.0, domains="all"))),
)
def test_it_equals_the_plain_simulation(seed: int, count: int, planning: Planning) -> None:
    events = trace(seed, count)
    ours = replay(HOSTS, events, planning, CALIBRATION)
    assert list(ours.outcomes) == Plain(HOSTS, events, planning, CALIBRATION).run()


def test_what_waits_is_counted_and_begins_when_something_ends() -> None:
    full = workload(0, 3500, memory_max_mib=3500)
    hosts = [empty_host("h", 4096, 4000, CALIBRATION)]
    events = Trace((Arrival(0.0, 10.0, "a", full), Arrival(1.0, 5.0, "b", full)))
    run = replay(hosts, events, Planning(), CALIBRATION)
    first, second = run.outcomes
    assert (first.placed_s, first.ended_s) == (0.0, 10.0 + CALIBRATION.start_clone_s)
    assert second.placed_s == first.ended_s
    assert run.measured.wait_s.most == pytest.approx(9.5)
    assert max(moment.waiting for moment in run.measured.moments) == 1
    stays = replay(
        hosts, Trace((Arrival(0.0, FOREVER, "a", full), Arrival(1.0, 5.0, "b", full))), Planning(), CALIBRATION
    )
    assert (stays.waiting, stays.outcomes[1].host) == (1, None)


def test_a_lost_hosts_sandboxes_begin_anew_with_what_is_left_of_their_time() -> None:
    hosts = [empty_host(name, 4096, 4000, CALIBRATION) for name in ("a", "b")]
    events = Trace((Arrival(0.0, 100.0, "x", workload(0)),))
    run = replay(hosts, events, Planning(), CALIBRATION, losses=Losses(40.0, ("a",)))
    assert (run.evicted, run.outcomes[0].host, run.outcomes[0].placed_s) == (1, "b", 40.0)
    assert run.outcomes[0].ended_s == 40.0 + CALIBRATION.start_clone_s + 60.0
    assert run.measured.moments[-1].capacity_mib == 4096


def test_risks_follow_from_use() -> None:
    hosts = [empty_host("h", 4096, 8000, CALIBRATION)]

    def risk(use_mib: float | None, std_mib: float = 0.0) -> tuple[float, float]:
        one = workload(0, 512, memory_max_mib=2048, use_mib=use_mib, use_std_mib=std_mib)
        events = Trace(tuple(Arrival(0.0, 50.0, f"s{at}", one) for at in range(4)))
        measured = replay(hosts, events, Planning(quantile=0), CALIBRATION).measured
        return measured.park_risk_worst, measured.oom_risk_worst

    assert risk(None) == (0.0, 0.0)  # nobody uses more than is promised
    assert risk(870.0)[0] == 0.0
    assert risk(950.0)[0] == 1.0  # with what its layers and its guest take, four of them are too many
    some_park, some_oom = risk(800.0, 200.0)
    assert 0.0 < some_oom < some_park < 1.0


def test_the_hosts_are_shown_at_their_fullest_however_little_that_is() -> None:
    hosts = [empty_host(f"h{at}", 1 << 20, 64_000, CALIBRATION) for at in range(3)]
    events = Trace((Arrival(0.0, 50.0, "a", workload(0)), Arrival(5.0, 10.0, "b", workload(1))))
    measured = replay(hosts, events, Planning(), CALIBRATION).measured
    most_mib = max(moment.promised_mib for moment in measured.moments)
    assert measured.peak_s == 5.0
    assert sum(host.private_mib + host.shared_mib for host in measured.hosts_peak) == most_mib > 0
    assert [host.host for host in measured.hosts_peak] == ["h0", "h1", "h2"]


def test_quantiles_are_weighted_by_time() -> None:
    spread = weighted([1.0, 2.0, 3.0], [90.0, 6.0, 4.0])
    assert (spread.p50, spread.p95, spread.p99, spread.most) == (1.0, 2.0, 3.0, 3.0)
    assert spread.mean == pytest.approx(1.14)
    assert weighted([], []).most == 0.0


def test_the_smallest_number_of_hosts_is_the_smallest() -> None:
    hosts = [empty_host("h", 4096, 4000, CALIBRATION)]
    events = Trace(
        tuple(Arrival(float(at), 1000.0, f"s{at}", workload(0, 1000, memory_max_mib=1000)) for at in range(10))
    )
    found = smallest(hosts, events, Planning(), CALIBRATION, Target())
    assert found.hosts == 4  # three on each
    assert not met(replay(hosts_of(hosts, 3), events, Planning(), CALIBRATION), Target())
    lossy = Target(wait_s=0.0, lose=1)
    more = smallest(hosts, events, Planning(), CALIBRATION, lossy)
    assert more.hosts == 5
    assert met(run_with(hosts_of(hosts, 5), events, Planning(), CALIBRATION, 1)[0], lossy)


def test_our_own_format_is_read_as_it_is_written(tmp_path: Path) -> None:
    path, events = tmp_path / "t.csv", trace(3, 30)
    path.write_text("".join(written(events)))
    again = read(path, {})
    key = [(a.time_s, a.lifetime_s, a.name, a.workload.memory_max_mib, a.workload.image) for a in events.arrivals]
    assert key == [
        (a.time_s, a.lifetime_s, a.name, a.workload.memory_max_mib, a.workload.image) for a in again.arrivals
    ]
    assert compressed(again, 2).arrivals[-1].time_s == again.arrivals[-1].time_s / 2
    for text, complaint in (
        ("time_s,lifetime_s,memory_min_mib\nx,1,5\n", ":2: time_s = 'x'"),
        ("time_s,lifetime_s,memory_min_mib,wat\n", "unknown column 'wat'"),
        ("time_s,lifetime_s,class\n1,1,web\n", "class 'web' is not in the cluster file"),
        ("a,b\n1,2\n", "no trace that is known here"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            read(path, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.csv", {})


def test_public_traces_are_known_by_their_headers_and_tagged_by_seed(tmp_path: Path) -> None:
    pods = tmp_path / "pods.csv"
    pods.write_text(
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
        "p0,4000,2048,1,1000,,LS,Running,10,110,10\np1,1000,512,0,0,,BE,Running,5,6,5\n"
    )
    events = read(pods, {}, Assumed(seed=3, use_share=0.5))
    assert [a.name for a in events.arrivals] == ["p1", "p0"]
    assert [a.workload.image.name.partition("/")[2][:3] for a in events.arrivals] == ["cpu", "gpu"]
    assert (events.arrivals[1].lifetime_s, events.arrivals[1].workload.use_mib) == (100.0, 1024.0)
    assert read(pods, {}, Assumed(seed=3, use_share=0.5)) == events
    assert read(pods, {}, Assumed(image_scale=0)).arrivals[0].workload.image.layers == ()
    calls = tmp_path / "calls.csv"
    calls.write_text("app,func,end_timestamp,duration\na,f,60.5,60\nb,g,1,0.5\n")
    assert [(a.time_s, a.lifetime_s) for a in read(calls, {}).arrivals] == [(0.5, 60.0), (0.5, 0.5)]
    folder = tmp_path / "azure"
    folder.mkdir()
    key = "HashOwner,HashApp,HashFunction"
    (folder / "invocations.csv").write_text(f"{key},Trigger,1,2\no,a,f,queue,0,2\n")
    (folder / "durations.csv").write_text(f"{key},percentile_Average_50\no,a,f,500\n")
    (folder / "memory.csv").write_text(
        f"{key},SampleCount,AverageAllocatedMb,AverageAllocatedMb_pct1,AverageAllocatedMb_pct99,AverageAllocatedMb_pct100\n"
        "o,a,f,10,120,100,143,152\n"
    )
    (first, second) = read(folder, {}).arrivals
    assert (first.time_s, second.time_s, first.lifetime_s) == (60.0, 90.0, 0.5)
    assert (first.workload.memory_min_mib, first.workload.memory_max_mib, first.workload.use_mib) == (100, 152, 120.0)
    assert math.isclose(first.workload.use_std_mib, 43 / 4.65)
