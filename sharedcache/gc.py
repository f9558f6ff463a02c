"""What may be thrown away: a pure choice. `Store.collect` carries it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """An object as garbage collection sees it. `last_used_s` is its publication or latest use."""

    key: str
    size_bytes: int
    last_used_s: float


def choose_victims(
    objects: Iterable[Candidate],
    pins: Mapping[str, frozenset[str]],
    now_s: float,
    grace_s: float,
    need_bytes: int | None = None,
) -> tuple[str, ...]:
    """The keys to remove, longest unused first.

    Never one that any owner in `pins` holds, and never one used less than `grace_s` ago (a use in the future
    is a clock that went back: such an object is young too). With `need_bytes`, as few as free that much;
    without, all. Equal times are ordered by key, so that the choice is a function of its arguments.
    """
    held = frozenset().union(*pins.values())
    old = [item for item in objects if item.key not in held and now_s - item.last_used_s >= grace_s]
    old.sort(key=lambda item: (item.last_used_s, item.key))
    if need_bytes is None:
        return tuple(item.key for item in old)
    victims: list[str] = []
    freed_bytes = 0
    for item in old:
        if freed_bytes >= need_bytes:
            break
        victims.append(item.key)
        freed_bytes += item.size_bytes
    return tuple(victims)
