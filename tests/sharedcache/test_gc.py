from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sharedcache.gc import Candidate, choose_victims

OLD = Candidate("a", 100, 10.0)
OLDER = Candidate("b", 50, 5.0)
YOUNG = Candidate("c", 1000, 95.0)


def test_takes_only_what_is_old_and_unpinned_longest_unused_first() -> None:
    assert choose_victims([OLD, OLDER, YOUNG], {}, 100.0, 20.0) == ("b", "a")
    assert choose_victims([OLD, OLDER, YOUNG], {"sandbox/1": frozenset("b")}, 100.0, 20.0) == ("a",)


def test_takes_no_more_than_it_needs() -> None:
    assert choose_victims([OLD, OLDER], {}, 100.0, 20.0, need_bytes=50) == ("b",)
    assert choose_victims([OLD, OLDER], {}, 100.0, 20.0, need_bytes=51) == ("b", "a")
    assert choose_victims([OLD, OLDER], {}, 100.0, 20.0, need_bytes=0) == ()


def test_an_object_from_the_future_is_young() -> None:
    assert choose_victims([Candidate("a", 1, 200.0)], {}, 100.0, 20.0) == ()


def test_equal_times_are_ordered_by_key() -> None:
    items = [Candidate(key, 1, 1.0) for key in "cab"]
    assert choose_victims(items, {}, 100.0, 1.0) == ("a", "b", "c")


candidates = st.lists(
    st.builds(Candidate, st.text("abcdef", min_size=1, max_size=2), st.integers(0, 100), st.floats(0, 1000)),
    unique_by=lambda item: item.key,
)
pins = st.dictionaries(st.text(max_size=3), st.frozensets(st.text("abcdef", min_size=1, max_size=2)))


@given(candidates, pins, st.floats(0, 1000), st.floats(0, 500), st.none() | st.integers(0, 1000))
def test_never_a_pinned_or_young_one(
    items: list[Candidate], held: dict[str, frozenset[str]], now_s: float, grace_s: float, need: int | None
) -> None:
    by_key = {item.key: item for item in items}
    victims = choose_victims(items, held, now_s, grace_s, need)
    assert len(set(victims)) == len(victims)
    for key in victims:
        assert all(key not in keys for keys in held.values())
        assert now_s - by_key[key].last_used_s >= grace_s
    if need is not None and victims:
        assert sum(by_key[key].size_bytes for key in victims[:-1]) < need
    if need is None:
        assert all(
            item.key in victims or now_s - item.last_used_s < grace_s or any(item.key in k for k in held.values())
            for item in items
        )
