"""The broker's decisions: tables of what it does, and properties that hold whatever it is shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.memory.broker import (
    Decision,
    Rules,
    SandboxMemory,
    apportion,
    decide,
    grant_for,
    headroom_mib,
    need_mib,
    room_mib,
    taken_mib,
)
from hostd.memory.pressure import HostMemory
from hostd.resize import Cause

RULES = Rules(reserve_mib=200, overhead_mib=64)
ROOMY = HostMemory(8192, 8000)


def box(uid: str = "a", **changes: Any) -> SandboxMemory:
    """A quiet sandbox: 128 of 256 MiB used, guaranteed 128, up to 1024."""
    quiet = SandboxMemory(uid, uid, 128, 1024, 256, 256, 256, 128, 160)
    return replace(quiet, **changes)


def target(decision: Decision, uid: str = "a") -> int | None:
    found = [move.memory_mib for move in decision.moves if move.uid == uid]
    assert len(found) < 2
    return found[0] if found else None


def test_a_quiet_sandbox_is_left_alone() -> None:
    decision = decide(ROOMY, [box()], RULES)
    assert (decision.moves, decision.closed, decision.park, decision.evict) == ((), "", None, None)


@pytest.mark.parametrize(
    "signs",
    [
        {"stalled_percent": 20.0}, {"refaults_per_s": 900.0}, {"wants_mib": 64}, {"used_mib": 250},
    ],
)  # fmt: skip
def test_what_shows_that_it_needs_more_gets_more_at_once_and_is_told_why(signs: dict[str, Any]) -> None:
    (move,) = decide(ROOMY, [box(**signs)], RULES).moves
    assert move.reason == "MemoryGrown" and 256 < move.memory_mib <= 1024
    assert "of 256 MiB" in move.why and f"256 -> {move.memory_mib} MiB" in move.why


def test_nobody_gets_more_than_its_ceiling() -> None:
    decision = decide(ROOMY, [box(allocated_mib=1000, actual_mib=1000, used_mib=995, wants_mib=500)], RULES)
    assert target(decision) == 1024


def test_what_is_idle_goes_back_after_a_while_down_to_what_is_desired() -> None:
    idle = box(allocated_mib=800, actual_mib=800)
    assert decide(ROOMY, [replace(idle, idle_s=1.0)], RULES).moves == ()
    (move,) = decide(ROOMY, [replace(idle, idle_s=5.0)], RULES).moves
    assert (move.reason, move.memory_mib, move.cause) == ("MemoryTakenBack", 256, Cause.NONE)
    assert "idle for 5 s" in move.why and "800 -> 256 MiB" in move.why


def test_what_is_desired_and_idle_goes_back_when_others_need_it() -> None:
    host = HostMemory(1000, 400)
    idle = box("idle", desired_mib=600, allocated_mib=600, actual_mib=600)
    needy = box("needy", used_mib=240, wants_mib=200)
    moves = {move.uid: move for move in decide(host, [idle, needy], RULES).moves}
    assert (moves["idle"].reason, moves["idle"].cause) == ("MemoryTakenBack", Cause.SQUEEZED)
    assert need_mib(idle, RULES) <= moves["idle"].memory_mib < 600
    assert moves["needy"].memory_mib > 256


def test_the_lowest_priority_is_squeezed_first_and_never_into_what_it_uses() -> None:
    host = HostMemory(1100, 300)
    boxes = [
        box("low", priority=-1, allocated_mib=400, actual_mib=400, used_mib=300),
        box("high", priority=1, used_mib=240, wants_mib=600, stalled_percent=50.0),
    ]
    moves = {move.uid: move for move in decide(host, boxes, RULES).moves}
    assert moves["low"].reason == "MemorySqueezed" and moves["low"].memory_mib >= 300
    assert "priority -1" in moves["low"].why
    assert moves["high"].reason == "MemoryGrown"


def test_equals_share_by_weight() -> None:
    boxes = [box("a", wants_mib=2000, weight=300), box("b", wants_mib=2000, weight=100)]
    shares = apportion(400, boxes, RULES)
    assert shares["a"] - 128 == pytest.approx(300, abs=4) and shares["b"] - 128 == pytest.approx(100, abs=4)


def test_an_uncooperative_guest_counts_with_its_maximum_and_lends_nothing() -> None:
    idle = box(desired_mib=800, allocated_mib=800, actual_mib=800)
    trusted = room_mib(ROOMY, [idle], RULES, 0)
    marked = replace(idle, cooperative=False)
    assert (taken_mib(idle), taken_mib(marked)) == (160 - 128, 800 - 128)
    unused = 8192 - 200 - 128 - 64 - (160 - 128)
    assert trusted == unused + 32 + unused  # what is unused is promised twice, with 50 % of overcommit
    assert trusted - room_mib(ROOMY, [marked], RULES, 0) == 2 * (1024 - 800) + (800 - 160)
    assert decide(ROOMY, [replace(marked, idle_s=60)], RULES).moves == ()


def test_a_bomb_gets_what_is_free_and_no_guarantee_of_others() -> None:
    host = HostMemory(2048, 1500)
    others = [box(f"n{n}", min_mib=256, allocated_mib=256, used_mib=60, resident_mib=80) for n in range(4)]
    bomb = box("bomb", max_mib=4096, used_mib=250, resident_mib=256, wants_mib=4000)
    given_mib = target(decide(host, [bomb, *others], RULES), "bomb")
    guaranteed = sum(one.min_mib - one.resident_mib for one in others)
    assert given_mib is not None and given_mib - 256 <= 1500 - 100 - guaranteed


def test_a_short_host_admits_nothing_then_parks_then_evicts_the_lowest() -> None:
    short = HostMemory(2048, 40)
    boxes = [box("low", priority=-1, unparkable="a session"), box("mid"), box("high", priority=5)]
    first = decide(short, boxes, RULES, short_s=1)
    assert "40 of 2048 MiB available" in first.closed and first.park is None and first.evict is None
    later = decide(short, boxes, RULES, short_s=11)
    assert later.park is not None and later.park.uid == "mid" and "short for 11 s" in later.park.why
    stuck = [replace(one, unparkable="its class has no checkpoints") for one in boxes]
    assert decide(short, stuck, RULES, short_s=20).evict is None
    last = decide(short, stuck, RULES, short_s=31)
    assert last.park is None and last.evict is not None and last.evict.uid == "low"
    assert "none can be parked (its class has no checkpoints)" in last.evict.why
    assert decide(replace(short, available_mib=1000), boxes, RULES, short_s=99).park is None


def test_a_request_to_grow_gets_what_is_free_and_says_what_is_missing() -> None:
    asked = box(desired_mib=1000)
    move = grant_for(HostMemory(8192, 8000), [asked], RULES, "a")
    assert move is not None and (move.memory_mib, move.cause) == (1000, Cause.NONE)
    move = grant_for(HostMemory(1000, 600), [asked, box("b")], RULES, "a")
    assert move is not None and 256 < move.memory_mib < 1000 and move.cause is Cause.HOST_ROOM
    assert "more is not free" in move.why


def test_a_request_to_shrink_is_granted_at_once() -> None:
    move = grant_for(ROOMY, [box(desired_mib=200, allocated_mib=800, actual_mib=800)], RULES, "a")
    assert move is not None and move.memory_mib == 200


@st.composite
def boxes_(draw: st.DrawFn) -> list[SandboxMemory]:
    boxes = []
    for number in range(draw(st.integers(1, 6))):
        low = draw(st.integers(32, 512))
        high = draw(st.integers(low, 4096))
        allocated = draw(st.integers(low, high))
        actual = draw(st.integers(32, high))
        boxes.append(
            SandboxMemory(
                f"s{number}", f"s{number}", low, high, draw(st.integers(low, high)), allocated, actual,
                draw(st.integers(0, actual)), draw(st.integers(0, 4096)), draw(st.integers(-2, 2)),
                draw(st.integers(1, 1000)), draw(st.floats(0, 100)), draw(st.floats(0, 5000)),
                draw(st.integers(0, 1000)), draw(st.floats(0, 100)), draw(st.booleans()),
                draw(st.sampled_from(["", "a session"])),
            )
        )  # fmt: skip
    return boxes


hosts = st.integers(256, 16_384).flatmap(
    lambda total: st.builds(HostMemory, st.just(total), st.integers(0, total), st.floats(0, 100), st.floats(0, 100))
)


@given(hosts, boxes_(), st.floats(0, 100))
def test_whatever_it_sees_bounds_hold(host: HostMemory, boxes: list[SandboxMemory], short_s: float) -> None:
    decision = decide(host, boxes, RULES, short_s=short_s)
    by_uid = {one.uid: one for one in boxes}
    assert len({move.uid for move in decision.moves}) == len(decision.moves)
    for move in decision.moves:
        one = by_uid[move.uid]
        assert one.min_mib <= move.memory_mib <= one.max_mib
        assert move.why
        if move.memory_mib < one.allocated_mib:
            assert one.cooperative and move.reason in ("MemoryTakenBack", "MemorySqueezed")
            assert move.memory_mib >= min(one.used_mib, one.max_mib) - 1
        else:
            assert move.reason == "MemoryGrown"
    grown = sum(max(0, move.memory_mib - by_uid[move.uid].allocated_mib) for move in decision.moves)
    untouched = sum(max(0, min(one.min_mib, one.allocated_mib) - one.resident_mib) for one in boxes)
    assert grown <= host.available_mib + untouched
    assert decision.park is None or decision.evict is None


@given(st.integers(-1000, 10_000), boxes_())
def test_shares_hold_every_guarantee_and_spend_no_more_than_there_is(room: int, boxes: list[SandboxMemory]) -> None:
    shares = apportion(room, boxes, RULES)
    for one in boxes:
        assert one.min_mib <= shares[one.uid] <= one.max_mib
    assert sum(shares[one.uid] - one.min_mib for one in boxes) <= max(0, room)


@given(st.integers(0, 6_000), boxes_())
def test_a_lower_priority_gets_nothing_that_a_higher_one_needs(room: int, boxes: list[SandboxMemory]) -> None:
    shares = apportion(room, boxes, RULES)
    for high in boxes:
        short = shares[high.uid] + 2 < need_mib(high, RULES)
        for low in boxes:
            if short and low.priority < high.priority:
                assert shares[low.uid] == low.min_mib


def test_what_may_be_promised_does_not_depend_on_what_is_allocated_already() -> None:
    """Else each decision would change the next one: a step a round, down and up again."""
    host, needy = HostMemory(1200, 600), box("needy", used_mib=400, allocated_mib=480, actual_mib=480)
    sizes = [box("idle", desired_mib=1000, allocated_mib=size, actual_mib=size) for size in (256, 600, 1000)]
    assert len({room_mib(host, [needy, one], RULES, 0) for one in sizes}) == 1
    for one in sizes[1:]:
        (move,) = decide(host, [needy, one], RULES).moves
        settled = replace(one, allocated_mib=move.memory_mib, actual_mib=move.memory_mib)
        assert decide(host, [needy, settled], RULES).moves == ()


def test_who_has_enough_grows_by_steps_that_are_worth_it() -> None:
    """A guest that others' memory trickles back to does not grow by a block a round, with an event each."""
    host = HostMemory(1400, 1000)
    asked = box(desired_mib=1000, allocated_mib=700, actual_mib=700)
    room = room_mib(host, [asked], RULES, 0)
    others = room - (700 - asked.min_mib) - 4  # held elsewhere, so that 4 MiB more are to be had
    assert decide(host, [asked], RULES, held_mib=others // 2).moves == ()
    (move,) = decide(host, [asked], RULES, held_mib=others // 2 - 40).moves
    assert move.memory_mib >= 700 + headroom_mib(asked, RULES)
    (move,) = decide(host, [replace(asked, desired_mib=704)], RULES).moves  # what completes it is no trickle
    assert move.memory_mib == 704


def test_a_squeeze_says_who_comes_first_and_what_is_left_to_share() -> None:
    boxes = [
        box("low", priority=-1, weight=50, allocated_mib=400, actual_mib=400, used_mib=300),
        box("high", priority=1, used_mib=240, wants_mib=600),
    ]
    moves = {move.uid: move for move in decide(HostMemory(1100, 500), boxes, RULES).moves}
    assert "priority -1, weight 50 (500 of 1100 MiB available" in moves["low"].why
    assert "above all guarantees" in moves["low"].why


@given(boxes_())
def test_a_settled_world_stays_as_it_is(boxes: list[SandboxMemory]) -> None:
    """Hysteresis: what has just been given what it needs is not moved again."""
    calm = []
    for one in boxes:
        used = max(0, min(one.used_mib, one.max_mib - 3 * headroom_mib(one, RULES)))
        quiet = replace(
            one,
            used_mib=used,
            resident_mib=used,
            stalled_percent=0.0,
            refaults_per_s=0.0,
            wants_mib=0,
            cooperative=True,
        )
        size = max(quiet.min_mib, quiet.desired_mib, min(quiet.max_mib, used + 2 * headroom_mib(quiet, RULES)))
        calm.append(replace(quiet, allocated_mib=size, actual_mib=size))
    host = HostMemory(1 << 20, 1 << 19)
    assert decide(host, calm, RULES).moves == ()
