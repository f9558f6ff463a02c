"""A checkpoint's memory: sparse, sealed, whole again from its blob, and refused when that is not whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.drivers.qemu import checkpointblob
from hostd.drivers.qemu.checkpointblob import CheckpointMemory, DraftMemory, copy_data, punch_zeros, zero_runs
from hostd.drivers.qemu.templateblob import is_sealed
from hostd.errors import CheckpointUnusable

PAGE = 4096
RAM_BYTES, ELASTIC_BYTES = 64 * PAGE, 128 * PAGE
STATE, ABOUT = b"device state", b'{"name": "c"}'


def fill(draft: DraftMemory) -> None:
    os.pwrite(draft.ram_fd, b"a" * PAGE, 3 * PAGE)
    os.pwrite(draft.ram_fd, b"b" * PAGE, 63 * PAGE)
    if draft.elastic_fd >= 0:
        os.pwrite(draft.elastic_fd, b"c" * 2 * PAGE, 100 * PAGE)


@pytest.fixture(params=[ELASTIC_BYTES, 0], ids=["elastic", "base only"])
def memory(request: pytest.FixtureRequest) -> Iterator[CheckpointMemory]:
    with DraftMemory(RAM_BYTES, request.param) as draft:
        fill(draft)
        sealed = draft.seal(STATE)
    yield sealed
    sealed.close()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0) if descriptor >= 0 else b""


def written(memory: CheckpointMemory, path: Path) -> Path:
    with path.open("wb") as file:
        checkpointblob.write_blob(memory, ABOUT, file)
    return path


def test_a_blob_gives_the_same_memory_back_with_its_holes(memory: CheckpointMemory, tmp_path: Path) -> None:
    path = written(memory, tmp_path / "blob")
    assert path.stat().st_blocks * 512 < RAM_BYTES
    assert checkpointblob.read_about(path) == ABOUT
    again = checkpointblob.load(path)
    try:
        assert (again.ram_bytes, again.elastic_bytes) == (memory.ram_bytes, memory.elastic_bytes)
        for mine, theirs in ((memory.ram_fd, again.ram_fd), (memory.elastic_fd, again.elastic_fd)):
            assert content(mine) == content(theirs)
        assert content(again.state_fd) == STATE
        assert again.held_bytes() == memory.held_bytes()
    finally:
        again.close()


def test_all_of_it_is_sealed(memory: CheckpointMemory) -> None:
    for descriptor in (memory.ram_fd, memory.elastic_fd, memory.state_fd):
        if descriptor >= 0:
            assert is_sealed(descriptor)
            with pytest.raises(PermissionError):
                os.pwrite(descriptor, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 0)


def test_each_guest_reads_the_state_from_its_start(memory: CheckpointMemory) -> None:
    for _ in range(2):
        with memory.state_reader() as descriptor:
            assert os.read(descriptor, 100) == STATE


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-1],
        lambda data: data[1:],
        lambda data: b"",
        lambda data: data[:-40] + b"SLCKPT02" + data[-32:],
        lambda data: data[:-32] + b"\xff" * 8 + data[-24:],
        lambda data: data + b"\0",
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(memory: CheckpointMemory, tmp_path: Path, harm: object) -> None:
    path = written(memory, tmp_path / "blob")
    path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    for read in (checkpointblob.read_about, checkpointblob.load):
        with pytest.raises(CheckpointUnusable, match="blob: is no checkpoint"):
            read(path)


def test_a_draft_that_is_given_up_leaves_nothing_open() -> None:
    before = open_files()
    with DraftMemory(RAM_BYTES, ELASTIC_BYTES):
        assert open_files() == before + 2
    assert open_files() == before


def test_a_copy_has_the_data_and_the_holes(memory: CheckpointMemory) -> None:
    with DraftMemory(RAM_BYTES, 0) as draft:
        copy_data(memory.ram_fd, draft.ram_fd, RAM_BYTES)
        assert content(draft.ram_fd) == content(memory.ram_fd)
        assert os.fstat(draft.ram_fd).st_blocks == os.fstat(memory.ram_fd).st_blocks


def test_pages_of_zeros_become_holes() -> None:
    with DraftMemory(RAM_BYTES, 0) as draft:
        fill(draft)
        expected, held = content(draft.ram_fd), os.fstat(draft.ram_fd).st_blocks
        os.pwrite(draft.ram_fd, bytes(40 * PAGE), 10 * PAGE)
        assert os.fstat(draft.ram_fd).st_blocks > held
        punch_zeros(draft.ram_fd, RAM_BYTES)
        assert os.fstat(draft.ram_fd).st_blocks == held
        assert content(draft.ram_fd) == expected


@given(st.lists(st.booleans(), max_size=20))
def test_runs_of_zeros_are_found_exactly(zeros: list[bool]) -> None:
    data = b"".join(bytes(PAGE) if zero else b"\0" * (PAGE - 1) + b"x" for zero in zeros)
    runs = list(zero_runs(data))
    covered = {at // PAGE for start, end in runs for at in range(start, end, PAGE)}
    assert covered == {index for index, zero in enumerate(zeros) if zero}
    assert all(first_end < second_start for (_, first_end), (second_start, _) in pairwise(runs))
