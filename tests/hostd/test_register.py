"""A host and a control plane over real gRPC: away and back, watch gaps, stale epochs, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from controlplane.api.channel import connect
from controlplane.api.identity import Role
from controlplane.api.status import HOST_REMOVED, Condition, Failure
from controlplane.api.v1 import hosts_pb2, sandboxes_pb2
from hostd import register
from hostd.drivers.fake import FakeDriver
from hostd.journal import Record
from hostd.register import EVENTS_KEPT, Outbox, Registration
from hostd.sandboxes import Happened, Report
from tests.hostd.fakecontrolplane import FakeControlPlane, assignment, certificates
from tests.hostd.hostkit import Host, config_of, open_store, put_image, until
from tests.hostd.test_spec import SPEC


@dataclass
class Pair:
    """A host that is registered with a control plane."""

    host: Host
    plane: FakeControlPlane
    registration: Registration
    outbox: Outbox


@pytest_asyncio.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr(register, "BACKOFF_S", (0.01, 0.02))
    certs = certificates(tmp_path)
    plane = FakeControlPlane(certs.of(Role.CONTROLPLANE, "cp-1"))
    await plane.up()
    outbox = Outbox()
    with open_store(tmp_path) as store:
        host = Host(config_of(tmp_path), store, FakeDriver(), put_image(store))
        host.reports, host.events = Told(outbox.report), Told(outbox.happened)  # type: ignore[assignment]
        await host.up()
        async with connect(plane.address, certs.of(Role.HOST, "host-1")) as channel:
            registration = Registration(channel, "host-1", host.sandboxes, outbox, describe)
            running = asyncio.create_task(registration.run())
            await until(lambda: plane.watches == 1)
            yield Pair(host, plane, registration, outbox)
            assert not running.done(), running
            running.cancel()
            await asyncio.wait({running})
        await host.down()
    await plane.down()


class Told(list[object]):
    """A list that also passes on what is put into it."""

    def __init__(self, pass_on: object) -> None:
        super().__init__()
        self._pass_on = pass_on

    def append(self, item: object) -> None:
        super().append(item)
        self._pass_on(item)  # type: ignore[operator]


async def describe() -> hosts_pb2.Host:
    return hosts_pb2.Host(name="host-1", runtime_address="127.0.0.1:9")


async def test_a_host_says_who_it_is_and_again_when_poked(pair: Pair) -> None:
    await until(lambda: len(pair.plane.hosts) == 1)
    assert pair.plane.hosts[0].runtime_address == "127.0.0.1:9"
    pair.registration.poke()
    await until(lambda: len(pair.plane.hosts) == 2)


@pytest.mark.parametrize("turns", range(4))
async def test_it_ends_when_asked_even_if_it_is_poked_just_then(pair: Pair, turns: int) -> None:
    pair.registration.poke()
    another = asyncio.create_task(pair.registration.run())
    await until(lambda: pair.plane.watches == 2)
    pair.registration.poke()
    for _ in range(turns):
        await asyncio.sleep(0)
    another.cancel()
    done, _ = await asyncio.wait({another}, timeout=5)
    assert done and another.cancelled()


async def test_an_assignment_is_run_and_reported_with_its_events(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image, "say", "out", "err", "7"))
    await until(lambda: pair.plane.phase("one") == "EXITED")
    report = pair.plane.last("one")
    assert report is not None
    assert (report.host, report.epoch, report.status.exit_code, report.status.has_exit_code) == ("host-1", 1, 7, True)
    assert [phase.name for phase in report.status.start_phases] == ["vmm", "kernel", "agent", "workload"]
    await until(lambda: [event.reason for event in pair.plane.events] == ["Started", "Completed"])
    assert {(event.host, event.subject, event.kind) for event in pair.plane.events} == {("host-1", "one", "sandbox")}
    pair.plane.put(assignment("one", pair.host.image, desired_state=sandboxes_pb2.DESIRED_REMOVED))
    await until(lambda: (report := pair.plane.last("one")) is not None and report.removed)


async def test_a_control_plane_that_is_away_stops_nothing_and_hears_it_later(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image, "cat"))
    await until(lambda: pair.plane.phase("one") == "RUNNING")
    sandbox = pair.host.sandboxes.find("one")
    await pair.plane.down()
    pair.plane.reports.clear()
    await sandbox.running().main.write(b"still here")
    await until(lambda: bool(sandbox.log.kept()))
    await sandbox.running().main.close_stdin()
    await until(lambda: sandbox.record.exit_code == 0)
    await pair.plane.up()
    await until(lambda: pair.plane.phase("one") == "EXITED", 20)
    await until(lambda: "Completed" in [event.reason for event in pair.plane.events], 20)
    await until(lambda: pair.plane.watches == 2, 20)


async def test_what_disappeared_during_a_watch_gap_is_removed(pair: Pair) -> None:
    for uid in ("stays", "goes"):
        pair.plane.put(assignment(uid, pair.host.image, "sleep"))
    await until(lambda: {pair.plane.phase(uid) for uid in ("stays", "goes")} == {"RUNNING"})
    pair.plane.cut_watches()
    del pair.plane.sandboxes["goes"]  # nobody watches: no DELETE is told
    pair.plane.sandboxes["comes"] = assignment("comes", pair.host.image, "sleep")
    await until(lambda: pair.plane.phase("comes") == "RUNNING")
    await until(lambda: not pair.host.sandboxes.knows("goes"))
    assert pair.plane.phase("stays") == "RUNNING"


async def test_what_another_host_may_run_by_now_ends_before_anything_begins(pair: Pair) -> None:
    """After a gap the list says what moved away and what came: first the one ends, then the other begins."""
    pair.plane.put(assignment("old", pair.host.image))
    pair.plane.put(assignment("again", pair.host.image))
    await until(lambda: [pair.plane.phase(uid) for uid in ("old", "again")] == ["RUNNING", "RUNNING"])
    told: list[tuple[str, int, str]] = []
    tell = pair.outbox.report

    def note(report: Report) -> None:
        told.append((report.record.spec.uid, report.record.spec.epoch, report.record.phase.value))
        tell(report)

    pair.host.sandboxes._report = note
    del pair.plane.sandboxes["old"]
    pair.plane.sandboxes["again"] = assignment("again", pair.host.image, epoch=9)
    pair.plane.sandboxes["new"] = assignment("new", pair.host.image)
    pair.plane.cut_watches()
    await until(lambda: ("again", 9, "running") in told and ("new", 1, "running") in told)
    first = min(told.index(("again", 9, "starting")), told.index(("new", 1, "starting")))
    assert told.index(("old", 1, "exited")) < first and told.index(("again", 1, "exited")) < first


async def test_a_host_that_was_removed_ends_what_it_has(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image))
    await until(lambda: pair.plane.phase("one") == "RUNNING")
    pair.plane.refuse_hosts = Failure(Condition.DENIED, HOST_REMOVED, "host host-1 was removed")
    pair.registration.poke()
    await until(lambda: not pair.host.sandboxes.knows("one"))


async def test_a_deleted_assignment_is_let_go_of(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image, "sleep"))
    await until(lambda: pair.plane.phase("one") == "RUNNING")
    pair.plane.delete("one")
    await until(lambda: not pair.host.sandboxes.knows("one"))
    assert pair.host.fake.machines == {}


@pytest.mark.parametrize(
    "failure",
    [
        Failure(Condition.PRECONDITION, "StaleEpoch", "epoch 1 is not 2"),
        Failure(Condition.NOT_FOUND, "NotFound", "no such sandbox"),
    ],
    ids=["stale", "unknown"],
)
async def test_a_host_that_was_fenced_lets_go(pair: Pair, failure: Failure) -> None:
    other = assignment("other", pair.host.image, "sleep")
    pair.plane.refuse = lambda report: failure if report.uid == "one" else None
    pair.plane.put(assignment("one", pair.host.image, "sleep"))
    pair.plane.put(other)
    await until(lambda: pair.host.fake.starts == 2)
    await until(lambda: not pair.host.sandboxes.knows("one"))
    await until(lambda: pair.plane.phase("other") == "RUNNING")
    assert list(pair.host.fake.machines) == ["other"]


async def test_a_report_that_is_refused_for_another_reason_ends_nothing(pair: Pair) -> None:
    failure = Failure(Condition.PRECONDITION, "NotRemovable", "desired state is not REMOVED")
    pair.plane.refuse = lambda report: failure if report.uid == "one" else None
    pair.plane.put(assignment("one", pair.host.image, "sleep"))
    await until(lambda: pair.host.sandboxes.find("one").live is not None if pair.host.sandboxes.knows("one") else False)
    pair.plane.put(assignment("two", pair.host.image, "sleep"))
    await until(lambda: pair.plane.phase("two") == "RUNNING")
    assert pair.host.sandboxes.find("one").live is not None


async def test_an_event_that_is_never_taken_holds_up_nothing(pair: Pair) -> None:
    pair.plane.refuse_events = Failure(Condition.INVALID, "BadEvent", "no")
    pair.plane.put(assignment("one", pair.host.image, "true"))
    await until(lambda: pair.plane.phase("one") == "EXITED")
    await until(lambda: not pair.outbox.events)


async def test_an_assignment_that_cannot_be_read_fails_there_with_the_reason(pair: Pair) -> None:
    bad = assignment("one", pair.host.image, "true")
    bad.spec.resources.memory_min_mib = 5000
    pair.plane.put(bad)
    await until(lambda: pair.plane.phase("one") == "FAILED")
    report = pair.plane.last("one")
    assert report is not None
    assert (report.status.reason, report.epoch) == ("InvalidSpec", 1)
    assert "5000" in report.status.message
    assert not pair.host.sandboxes.knows("one")


async def test_a_change_that_cannot_be_read_leaves_what_runs(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image, "sleep"))
    await until(lambda: pair.plane.phase("one") == "RUNNING")
    bad = assignment("one", pair.host.image, "sleep")
    bad.spec.resources.memory_mib = 9999
    pair.plane.put(bad)
    await until(lambda: "InvalidSpec" in [event.reason for event in pair.plane.events])
    assert pair.host.sandboxes.find("one").live is not None


async def test_a_removal_of_what_was_never_here_is_confirmed(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image, desired_state=sandboxes_pb2.DESIRED_REMOVED))
    await until(lambda: (report := pair.plane.last("one")) is not None and report.removed)
    assert pair.host.fake.starts == 0


async def test_a_resize_is_told_to_its_end(pair: Pair) -> None:
    pair.plane.put(assignment("one", pair.host.image, "sleep"))
    await until(lambda: pair.plane.phase("one") == "RUNNING")
    bigger = assignment("one", pair.host.image, "sleep")
    bigger.spec.resources.memory_mib = 768
    pair.plane.put(bigger)
    await until(
        lambda: (report := pair.plane.last("one")) is not None and report.status.resize.actual_memory_mib == 768
    )
    report = pair.plane.last("one")
    assert report is not None
    assert report.status.resize.state == sandboxes_pb2.RESIZE_DONE


# The outbox.


def test_the_newest_report_counts_and_a_removal_is_never_replaced(host_spec: Record) -> None:
    outbox = Outbox()
    outbox.report(Report(host_spec, None))
    newer = Report(host_spec, None, removed=True)
    outbox.report(newer)
    outbox.report(Report(host_spec, None))
    assert list(outbox.reports.values()) == [newer]


def test_events_are_bounded_and_the_oldest_go() -> None:
    outbox = Outbox()
    for number in range(EVENTS_KEPT + 5):
        outbox.happened(Happened("one", "R", str(number), 0.0))
    assert len(outbox.events) == EVENTS_KEPT
    assert outbox.events[0].message == "5"


@pytest.fixture
def host_spec() -> Record:
    return Record(SPEC)
