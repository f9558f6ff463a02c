"""The table of a sandbox's life."""

from __future__ import annotations

from itertools import product

import pytest

from hostd.errors import HostdError
from hostd.lifecycle import ENDED, TRANSITIONS, Phase, move


def test_every_phase_has_its_row_and_every_move_keeps_to_it() -> None:
    assert set(TRANSITIONS) == set(Phase)
    for now, to in product(Phase, Phase):
        if to in TRANSITIONS[now]:
            assert move(now, to) is to
        else:
            with pytest.raises(HostdError, match=f"from {now.value} to {to.value}"):
                move(now, to)


def test_every_phase_can_be_left_for_good_and_no_end_is_left_for_life() -> None:
    def reachable(start: Phase) -> set[Phase]:
        found, frontier = set[Phase](), {start}
        while frontier:
            frontier = {to for phase in frontier for to in TRANSITIONS[phase]} - found
            found |= frontier
        return found

    for phase in Phase:
        assert phase is Phase.GONE or Phase.GONE in reachable(phase)
    for phase in ENDED:
        assert reachable(phase) <= {Phase.GONE}


def test_running_is_only_reached_by_starting_or_unparking() -> None:
    assert [now for now in Phase if Phase.RUNNING in TRANSITIONS[now]] == [Phase.STARTING, Phase.PARKED]
