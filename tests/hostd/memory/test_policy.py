"""What moves memory next: hostd/memory/policy.py, by tables and by walking to the target."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hostd.memory.policy import CALM_S, CLEARED_MOST_MIB, ElasticNow, Step, cause_of, lies, next_step, target_of
from hostd.memory.values import Mechanism, ShortfallCause

BALLOON, PLUG, SWAP = Mechanism.BALLOON, Mechanism.VIRTIO_MEM, Mechanism.SWAP
NOW = ElasticNow(
    base_mib=144, usable_mib=880, plugged_mib=600, ballooned_mib=100, available_mib=400, punchable=True, held_mib=300
)  # 644 MiB


@pytest.mark.parametrize(
    ("now", "target_mib", "failed", "step"),
    [
        (NOW, 644, (), None),
        (NOW, 645, (), None),  # below a block: nothing
        (NOW, 700, (), Step(BALLOON, 44)),  # what the balloon holds comes first
        (NOW, 844, (), Step(BALLOON, 0)),
        (replace(NOW, ballooned_mib=0), 844, (), Step(PLUG, 700)),
        (NOW, 844, (BALLOON,), Step(PLUG, 800)),
        (replace(NOW, ballooned_mib=0), 1024, (PLUG,), None),
        (NOW, 444, (), Step(BALLOON, 300)),
        (NOW, 144, (), Step(BALLOON, 600)),
        (NOW, 444, (BALLOON,), Step(PLUG, 400)),
        (replace(NOW, punchable=False), 444, (), Step(PLUG, 400)),  # a fork
        (NOW, 444, (BALLOON, PLUG), None),
        (replace(NOW, swappable_mib=50), 444, (BALLOON, PLUG), Step(SWAP, 50)),
        (replace(NOW, swappable_mib=50), 444, (BALLOON, PLUG, SWAP), None),
        (replace(NOW, pressed_s_ago=1.0), 444, (), None),  # it told of pressure a moment ago
        (replace(NOW, pressed_s_ago=1.0), 700, (), Step(BALLOON, 44)),
        (replace(NOW, pressed_s_ago=CALM_S), 444, (), Step(BALLOON, 300)),
        (replace(NOW, clears=True), 444, (), Step(PLUG, 400)),  # it holds more than a clearing kernel's should
        (replace(NOW, clears=True, ballooned_mib=0), 444, (), Step(BALLOON, CLEARED_MOST_MIB)),
        (replace(NOW, clears=True, ballooned_mib=CLEARED_MOST_MIB), 444, (), Step(PLUG, 364)),
    ],
)
def test_one_step(now: ElasticNow, target_mib: int, failed: tuple[Mechanism, ...], step: Step | None) -> None:
    assert next_step(now, target_mib, failed) == step


def test_targets_hold_the_guarantee_and_the_ceiling() -> None:
    assert target_of(500, 256, NOW) == 500
    assert target_of(100, 256, NOW) == 256
    assert target_of(100, 100, NOW) == 144  # base memory never goes
    assert target_of(9999, 256, NOW) == 144 + 880
    assert target_of(501, 256, NOW) == 500  # whole blocks


def moved(now: ElasticNow, step: Step, most_mib: int) -> ElasticNow:
    """A guest that follows a step by at most `most_mib`."""
    if step.mechanism is BALLOON:
        by = max(-most_mib, min(most_mib, step.mib - now.ballooned_mib))
        return replace(now, ballooned_mib=now.ballooned_mib + by)
    by = max(-most_mib, min(most_mib, step.mib - now.plugged_mib))
    return replace(now, plugged_mib=now.plugged_mib + by)


def test_every_guest_that_follows_gets_there() -> None:
    """Whatever it starts from, whatever the target: never past it, never out of what there is, always to the end."""
    chosen = random.Random(4)
    for _ in range(2000):
        plugged = chosen.randrange(0, 882, 2)
        now = replace(
            NOW,
            plugged_mib=plugged,
            ballooned_mib=chosen.randrange(0, plugged + 2, 2),
            punchable=chosen.random() < 0.7,
            clears=chosen.random() < 0.5,
        )
        target, most = target_of(chosen.randrange(1, 1100), 144, now), chosen.choice((2, 64, 1000))
        side = now.actual_mib > target
        for _ in range(2000):
            step = next_step(now, target)
            if step is None:
                break
            now = moved(now, step, most)
            assert 0 <= now.ballooned_mib <= now.plugged_mib <= now.usable_mib
            assert now.actual_mib == target or (now.actual_mib > target) == side
        assert now.actual_mib == target


@pytest.mark.parametrize(
    ("now", "target_mib", "over", "silent", "cause"),
    [
        (NOW, 644, True, False, None),
        (NOW, 444, False, False, ShortfallCause.FOLLOWING),
        (replace(NOW, available_mib=210), 444, True, False, ShortfallCause.IN_USE),
        (NOW, 600, True, False, ShortfallCause.UNCOOPERATIVE),  # it keeps 356 MiB more for itself
        (NOW, 444, True, True, ShortfallCause.UNCOOPERATIVE),
        (NOW, 800, True, False, ShortfallCause.UNCOOPERATIVE),
        (
            replace(NOW, held_mib=590),
            644,
            True,
            False,
            ShortfallCause.UNCOOPERATIVE,
        ),  # ballooned, yet used
    ],
)
def test_why_it_falls_short(
    now: ElasticNow, target_mib: int, over: bool, silent: bool, cause: ShortfallCause | None
) -> None:
    assert cause_of(now, target_mib, over=over, silent=silent) is cause


def test_a_fork_is_not_measured_by_its_file() -> None:
    assert not lies(replace(NOW, held_mib=None)) and not lies(replace(NOW, held_mib=600, punchable=False))
    assert not lies(replace(NOW, held_mib=516)) and lies(replace(NOW, held_mib=517))
