"""The policy of refilling, as a pure function."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hostd.refill import BACKOFF_LAST_S, PoolNow, RoomNow, backoff_s, decide

ROOM = RoomNow(room_mib=10_000, starting=0, cpus=2)


def pool(uid: str = "a", wanted: int = 2, ready: int = 0, making: int = 0, need_mib: int = 320) -> PoolNow:
    return PoolNow(uid, wanted, ready, making, need_mib)


def test_an_idle_host_makes_one_a_cpu() -> None:
    assert decide([pool(wanted=5)], ROOM, 0.0).starts == ("a", "a")
    assert decide([pool(wanted=5, making=1)], ROOM, 0.0).starts == ("a",)
    assert decide([pool(wanted=1)], ROOM, 0.0).starts == ("a",)


def test_starting_sandboxes_come_first() -> None:
    assert decide([pool()], replace(ROOM, starting=1), 0.0).starts == ("a",)
    waiting = decide([pool()], replace(ROOM, starting=2), 0.0)
    assert waiting.starts == () and waiting.short == {}


def test_the_emptiest_pool_is_served_first() -> None:
    made = decide([pool("a", wanted=4, ready=3), pool("b", wanted=4, ready=1)], replace(ROOM, cpus=1), 0.0)
    assert made.starts == ("b",)


def test_what_is_too_many_is_ended() -> None:
    assert decide([pool(wanted=1, ready=2, making=1)], ROOM, 0.0).ends == {"a": 2}


def test_short_of_memory_has_its_numbers() -> None:
    short = decide([pool()], replace(ROOM, room_mib=100), 0.0)
    assert short.starts == ()
    assert short.short == {"a": "320 MiB needed for one more, 100 MiB may be promised here"}


def test_under_pressure_members_are_given_back_one_a_look() -> None:
    pressed = decide([pool("a", ready=1), pool("b", ready=2)], replace(ROOM, pressed=True), 0.0)
    assert pressed.ends == {"b": 1} and pressed.starts == ()


def test_failures_wait_longer_each_time() -> None:
    failing = replace(pool(), failures=3, failed_at_s=100.0, why="no template")
    assert decide([failing], ROOM, 107.9).starts == ()
    assert decide([failing], ROOM, 107.9).look_again_s < 0.2
    assert decide([failing], ROOM, 108.1).starts == ("a", "a")
    assert [backoff_s(count) for count in (0, 1, 2, 3, 50)] == [0.0, 2.0, 4.0, 8.0, BACKOFF_LAST_S]


POOLS = st.lists(
    st.builds(
        PoolNow, st.sampled_from("abcdef"), st.integers(0, 9), st.integers(0, 9), st.integers(0, 4),
        st.integers(1, 4000), st.integers(0, 5), st.floats(0, 100),
    ),
    unique_by=lambda pool: pool.uid,
)  # fmt: skip
ROOMS = st.builds(
    RoomNow, st.integers(-2000, 20_000), st.integers(0, 6), st.integers(1, 8), st.sampled_from(["", "disk"]),
    st.booleans(),
)  # fmt: skip


@given(POOLS, ROOMS, st.floats(0, 200))
def test_no_decision_breaks_a_bound(pools: list[PoolNow], room: RoomNow, now_s: float) -> None:
    made = decide(pools, room, now_s)
    by_uid = {pool.uid: pool for pool in pools}
    for uid, one in by_uid.items():
        assert made.starts.count(uid) <= max(0, one.missing)
        assert 0 <= made.ends.get(uid, 0) <= one.ready + one.making
        assert not (uid in made.starts and uid in made.ends)
        if one.failures and now_s < one.failed_at_s + backoff_s(one.failures):
            assert uid not in made.starts
    assert sum(by_uid[uid].need_mib for uid in made.starts) <= max(0, room.room_mib)
    assert len(made.starts) <= max(0, room.cpus - room.starting - sum(pool.making for pool in pools))
    assert not made.starts or not (room.short or room.pressed)
    assert made.look_again_s > 0


@given(POOLS, ROOMS, st.floats(0, 200), st.randoms())
def test_the_order_of_pools_does_not_matter(pools: list[PoolNow], room: RoomNow, now_s: float, random: object) -> None:
    shuffled = list(pools)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide(pools, room, now_s) == decide(shuffled, room, now_s)
