"""The balloon benchmark's recording is what it says it is, and a replay gives back all of it."""

from __future__ import annotations

import struct
from dataclasses import replace

from tests.bench.bench_balloon_host import MIB, Recording, memfd, replay


def test_the_recording_is_a_real_list() -> None:
    recorded = Recording.load()
    plan = recorded.memory.coalesce(recorded.wire, recorded.unit_bytes)
    assert plan.first_refused is None and plan.duplicate_bytes == 0
    assert plan.total_bytes == recorded.punched_bytes == 800 * MIB
    assert 1 < len(plan) == len(recorded.wire) // 16


def test_both_ways_give_back_what_was_filled() -> None:
    first, count = struct.unpack("<2Q", Recording.load().wire[:16])
    small = replace(Recording.load(), wire=struct.pack("<2Q", first, count), punched_bytes=count * 2 * MIB)
    with memfd(small.memory.total_bytes) as fd:
        assert replay(small, fd, page_by_page=True) > replay(small, fd, page_by_page=False) > 0
