"""Where an engine's cgroup and directory are: under its sandbox's uid, or under the pool member's that it was. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hostd.journal import Handle


@dataclass(frozen=True)
class Seat:
    """The cgroup's name and the directory. They were given when the VMM was started and never change."""

    name: str
    folder: Path


def seat_of(uid: str, folder: Path, handle: Handle | None) -> Seat:
    """The seat of sandbox `uid`, whose own directory would be `folder`."""
    if handle is None or not handle.member:
        return Seat(uid, folder)
    return Seat(handle.member, folder.parent / handle.member)
