"""The log: bounded, exact after a restart, and whole for whoever follows it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.logs import HEADER, LogEntry, OutputLog, entries, last_lines

BOUND_BYTES = 64 << 10


def bytes_of(kept: list[LogEntry], stream: int = 1) -> bytes:
    return b"".join(entry.data for entry in kept if entry.stream == stream)


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


async def follow(log: OutputLog, **how: int) -> bytes:
    return b"".join([entry.data async for entry in log.follow(**how)])  # type: ignore[arg-type]


async def test_what_is_appended_is_kept_in_order_with_offsets(tmp_path: Path) -> None:
    log = OutputLog(tmp_path)
    log.append(1, 1, b"one ")
    log.append(2, 2, b"err")
    log.append(3, 1, b"two")
    assert log.kept() == [LogEntry(1, 1, 0, b"one "), LogEntry(2, 2, 0, b"err"), LogEntry(3, 1, 4, b"two")]
    assert log.offsets == {1: 7, 2: 3}


async def test_a_log_may_begin_in_the_middle_and_a_restart_knows(tmp_path: Path) -> None:
    log = OutputLog(tmp_path)
    log.begin_at(1, {1: 100, 2: 7})
    assert log.kept() == []
    log.append(2, 1, b"on")
    log.close()
    again = OutputLog(tmp_path)
    assert again.offsets == {1: 102, 2: 7}
    assert again.kept() == [LogEntry(2, 1, 100, b"on")]
    again.close()


async def test_it_stays_within_its_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    log = OutputLog(tmp_path, BOUND_BYTES)
    for number in range(2000):
        log.append(number, 1, b"%0100d" % number)
        used = used_bytes(tmp_path)
        assert used <= BOUND_BYTES + 2 * (100 + HEADER.size)
    kept = log.kept()
    assert bytes_of(kept).endswith(b"%0100d" % 1999)
    assert len(bytes_of(kept)) >= BOUND_BYTES // 2 * 100 // (100 + HEADER.size) - 100
    assert [entry.offset for entry in kept] == [100 * entry.time_ns for entry in kept]  # none missing in between


async def test_offsets_survive_a_restart_though_a_streams_records_are_gone(tmp_path: Path) -> None:
    log = OutputLog(tmp_path, BOUND_BYTES)
    log.append(1, 2, b"the only words on stderr")
    for number in range(2000):
        log.append(number, 1, b"x" * 100)
    log.close()
    assert bytes_of(log.kept(), 2) == b""  # turned over long ago
    again = OutputLog(tmp_path, BOUND_BYTES)
    assert again.offsets == {1: 200_000, 2: 24}
    assert all(entry.data for entry in again.kept())


@pytest.mark.parametrize("cut", [1, HEADER.size - 1, HEADER.size, HEADER.size + 2])
async def test_a_torn_record_is_cut_off(tmp_path: Path, cut: int) -> None:
    log = OutputLog(tmp_path)
    log.append(1, 1, b"whole")
    size = (tmp_path / "log").stat().st_size
    log.append(2, 1, b"torn")
    log.close()
    os.truncate(tmp_path / "log", size + cut)
    again = OutputLog(tmp_path)
    assert again.offsets == {1: 5, 2: 0}
    again.append(3, 1, b"!")
    assert bytes_of(again.kept()) == b"whole!"


async def test_a_full_disk_leaves_no_torn_record_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = OutputLog(tmp_path)
    log.append(1, 1, b"before ")
    file = log._file

    class Full:
        """Takes 7 bytes, as a disk that fills up does."""

        def tell(self) -> int:
            return file.tell()

        def write(self, record: bytes) -> int:
            return file.write(record[:7])

        def truncate(self, size: int) -> int:
            return file.truncate(size)

    monkeypatch.setattr(log, "_file", Full())
    with pytest.raises(OSError, match="7 of"):
        log.append(2, 1, b"lost")
    monkeypatch.setattr(log, "_file", file)
    log.append(3, 1, b"after")
    assert bytes_of(log.kept()) == b"before after"
    assert log.offsets[1] == 12


async def test_a_follower_gets_what_was_and_what_comes_until_the_end(tmp_path: Path) -> None:
    log = OutputLog(tmp_path)
    log.append(1, 1, b"was ")
    following = asyncio.create_task(follow(log))
    from_now = asyncio.create_task(follow(log, from_start=False))
    await asyncio.sleep(0)
    for piece in (b"comes ", b"and ", b"ends"):
        log.append(2, 1, piece)
        await asyncio.sleep(0)
    log.close()
    assert await following == b"was comes and ends"
    assert await from_now == b"comes and ends"
    assert await follow(log) == b"was comes and ends"  # after the end, too


async def test_a_follower_loses_nothing_when_the_log_is_turned_over(tmp_path: Path) -> None:
    log = OutputLog(tmp_path, BOUND_BYTES)
    written = b""
    following = asyncio.create_task(follow(log))
    for number in range(3000):
        line = b"%099d\n" % number
        log.append(number, 1, line)
        written += line
        if number % 100 == 0:
            await asyncio.sleep(0)
    log.close()
    assert await following == written


async def test_a_follower_that_is_too_slow_loses_whole_records_only(tmp_path: Path) -> None:
    log = OutputLog(tmp_path, BOUND_BYTES)
    log.append(0, 1, b"%099d\n" % 0)
    follower = log.follow()
    seen = [await anext(follower)]
    for number in range(1, 3000):
        log.append(number, 1, b"%099d\n" % number)
    log.close()
    seen += [entry async for entry in follower]
    numbers = [int(entry.data) for entry in seen]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 2999
    assert numbers[-1] - numbers[-200] == 199


async def test_following_the_tail_neither_repeats_nor_skips(tmp_path: Path) -> None:
    log = OutputLog(tmp_path)
    log.append(1, 1, b"1\n2\n3\n")
    following = asyncio.create_task(follow(log, tail_lines=2))
    await asyncio.sleep(0)
    log.append(2, 1, b"4\n")
    log.close()
    assert await following == b"2\n3\n4\n"


async def test_a_log_that_was_removed_ends_its_followers(tmp_path: Path) -> None:
    log = OutputLog(tmp_path)
    log.append(1, 1, b"x")
    log.close()
    remove_all(tmp_path)
    assert await follow(log) == b""
    assert log.kept() == []


@given(st.lists(st.binary(max_size=20), max_size=10), st.integers(1, 8))
def test_the_last_lines_are_the_last_lines(pieces: list[bytes], lines: int) -> None:
    kept, offset = [], 0
    for number, piece in enumerate(pieces):
        kept.append(LogEntry(number, 1, offset, piece))
        offset += len(piece)
    whole = b"".join(pieces)
    got = last_lines(kept, lines)
    text = b"".join(entry.data for entry in got)
    assert whole.endswith(text)
    ends = text.count(b"\n") + (not text.endswith(b"\n") and bool(text))
    everything = whole.count(b"\n") + (not whole.endswith(b"\n") and bool(whole))
    if kept and kept[-1].data:
        assert ends == min(lines, everything)
    assert [entry.offset for entry in got] == sorted(entry.offset for entry in got)
    assert last_lines(kept, 0) == kept


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_whole_records_or_not_at_all(data: bytes) -> None:
    for end, entry in entries(data):
        assert end <= len(data)
        assert entry.stream in (1, 2)
