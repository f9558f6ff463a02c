"""The contract of a resize: its table, its three sizes, its limits. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd import journal
from hostd.errors import ControlLost, HostdError
from hostd.journal import Record
from hostd.memory.values import Resized, ShortfallCause
from hostd.resize import (
    LAST_RETRY_S,
    TRANSITIONS,
    Cause,
    Grant,
    ResizeProgress,
    ResizeState,
    begun,
    infeasible,
    judge,
    move,
    refused,
    retry_s,
)
from hostd.spec import BLOCK_MIB, MemoryShape, ProcessSpec, Resources, SandboxSpec

SHAPE = MemoryShape(128, 1 << 20)
WANTED = Resources(128, 1152, 640, 1000)


def came_to(actual_mib: int, cause: ShortfallCause | None = None, message: str = "") -> Resized:
    return Resized(actual_mib, 0, cause, (), 1, message)


def test_every_state_is_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(ResizeState)
    for state in ResizeState:
        assert state in {to for after in TRANSITIONS.values() for to in after}
        assert TRANSITIONS[state]


def test_only_another_request_leaves_infeasible() -> None:
    never = replace(begun(WANTED, None, 256, 0), state=ResizeState.INFEASIBLE)
    with pytest.raises(HostdError, match="from infeasible to done"):
        move(never, replace(never, state=ResizeState.DONE))
    other = begun(replace(WANTED, memory_mib=512), never, 256, 10)
    assert move(never, other).state is ResizeState.IN_PROGRESS
    assert other.deadline_s == 40


@given(st.integers(128, 1 << 20), st.integers(0, 1 << 20), st.integers(128, 1 << 20), st.floats(0, 100))
def test_a_judgement_names_three_sizes_and_is_done_only_when_desired_is_there(
    desired_mib: int, actual_mib: int, granted_mib: int, now_s: float
) -> None:
    start = begun(Resources(128, 1 << 21, desired_mib, 1000), None, granted_mib, 0)
    progress = judge(start, SHAPE, Grant(granted_mib, Cause.HOST_ROOM, "why"), came_to(actual_mib), now_s)
    assert (progress.desired_mib, progress.actual_mib, progress.desired_cpu_milli) == (desired_mib, actual_mib, 1000)
    assert abs(progress.allocated_mib - granted_mib) <= BLOCK_MIB
    if progress.state is ResizeState.DONE:
        assert actual_mib > desired_mib - 2 * BLOCK_MIB and progress.shortfall_mib == 0
    elif granted_mib < desired_mib - BLOCK_MIB:
        assert (progress.state, progress.cause, progress.message) == (ResizeState.DEFERRED, Cause.HOST_ROOM, "why")
        assert progress.shortfall_mib > 0
    else:
        late = progress.state is ResizeState.DEFERRED
        assert late or progress.state is ResizeState.IN_PROGRESS
        assert not late or now_s >= 30 or progress.cause is Cause.HOST_ROOM
    move(start, progress)


def test_a_deferred_resize_says_which_way_how_much_and_why() -> None:
    start = begun(WANTED, None, 640, 0)
    took = judge(start, SHAPE, Grant(640), came_to(384, ShortfallCause.HOST_FULL, "no hugepages"), 31)
    assert "took only part of it in 30 s: 256 MiB are missing (no hugepages)" in took.message
    assert (took.shortfall_mib, took.cause) == (256, Cause.HOST_ROOM)
    gave = judge(start, SHAPE, Grant(640), came_to(740, ShortfallCause.IN_USE), 31)
    assert "gave back only part of it in 30 s: 100 MiB" in gave.message
    assert (gave.shortfall_mib, gave.cause) == (100, Cause.GUEST)


def test_more_than_desired_is_done_too() -> None:
    progress = judge(begun(WANTED, None, 800, 0), SHAPE, Grant(800, message="it stalls"), came_to(700), 1)
    assert (progress.state, progress.message, progress.allocated_mib) == (ResizeState.DONE, "it stalls", 800)


def test_a_refusal_is_an_error_that_is_tried_again_with_growing_pauses() -> None:
    progress = begun(WANTED, None, 640, 0)
    pauses = []
    for _ in range(12):
        progress = move(progress, refused(progress, Grant(640), ControlLost("QMP is silent")))
        pauses.append(retry_s(progress.attempts))
    assert (progress.state, progress.cause, progress.attempts) == (ResizeState.ERROR, Cause.CONTROL, 12)
    assert pauses[:3] == [1, 2, 4] and pauses[-1] == LAST_RETRY_S and pauses == sorted(pauses)
    done = judge(progress, SHAPE, Grant(640), came_to(640), 99)
    assert (done.state, done.attempts) == (ResizeState.DONE, 0)


def test_a_known_request_keeps_its_deadline_over_a_restart() -> None:
    first = replace(begun(WANTED, None, 256, 100), state=ResizeState.DEFERRED, cause=Cause.HOST_ROOM)
    assert begun(WANTED, first, 300, 1000) == replace(first, allocated_mib=300)


@pytest.mark.parametrize(
    ("memory_mib", "cpu_milli", "limit", "why"),
    [
        (1024, 2000, Cause.NONE, ""),
        (1026, 2000, Cause.MAX, "ceiling of 1024"),
        (512, 2001, Cause.VCPUS, "2 vCPUs"),
        (901, 1000, Cause.HOST_CAPACITY, "900 MiB"),
    ],
)
def test_infeasible_is_what_can_never_be_and_says_by_which_limit(
    memory_mib: int, cpu_milli: int, limit: Cause, why: str
) -> None:
    most_mib = 900 if limit is Cause.HOST_CAPACITY else 4096
    found, text = infeasible(1024, 2, most_mib, Resources(128, 2048, memory_mib, cpu_milli))
    assert (found, why in text) == (limit, True)


def test_the_journal_keeps_it() -> None:
    spec = SandboxSpec("u", "u", "acme", "sha256:1", "u", WANTED, ProcessSpec(), 1, priority=-5, weight=7)
    resize = ResizeProgress(
        ResizeState.DEFERRED, 640, 256, 250, 500, "short", 1000, Cause.SQUEEZED, deadline_s=12.5, attempts=3
    )
    record = Record(spec, resize=resize, uncooperative=True, parked="abc")
    assert journal.decode(journal.encode(record), "test") == record
