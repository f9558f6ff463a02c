"""The balloon's host half alone: one recorded list of a guest's frames, punched coalesced and page by page.

The list (balloon_frames.json, which says how it was recorded) is replayed on two memory files: 4 KiB-backed, a plain
memfd, and huge-backed, on a tmpfs of its own mounted huge=always. Each round fills the file's frames, and then times
from the bytes that the agent would send to the last fallocate. The peer is the same code told to go page by page:
one fallocate for each 4 KiB frame, as virtio-balloon does on the host. We must leave nothing allocated; the peer may
leave a hundredth, since the kernel now and then cannot split a huge page that is punched in parts.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from native import _balloon
from tests.bench.report import CannotMeasure, Report, Runs, interleaved, ratio, run, timed_ms

ROUNDS = 9
PAGE_BYTES = 4096
MIB = 1 << 20
SMALL, HUGE = "coalesced on 4 KiB pages", "coalesced on huge pages"
BARS = ((SMALL, 3.3), (HUGE, 80.0))
PEER = "page by page, one fallocate a 4 KiB frame"
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Recording:
    """What a guest's agent sent once. `wire` is the list of runs in the form of native._balloon."""

    memory: _balloon.MemoryMap
    unit_bytes: int
    wire: bytes
    punched_bytes: int

    @classmethod
    def load(cls) -> Recording:
        """The one beside this file."""
        body = json.loads((Path(__file__).parent / "balloon_frames.json").read_text(encoding="utf-8"))
        numbers = [number for one in body["runs"] for number in one]
        memory = _balloon.MemoryMap([(body["region_gpa"], body["region_bytes"], 0, 0)])
        wire = struct.pack(f"<{len(numbers)}Q", *numbers)
        return cls(memory, body["unit_bytes"], wire, sum(numbers[1::2]) * body["unit_bytes"])


def replay(recorded: Recording, fd: int, page_by_page: bool) -> float:
    """Fills the recorded frames of `fd` and gives them back; the milliseconds of giving back."""
    fill = recorded.memory.coalesce(recorded.wire, recorded.unit_bytes)
    _balloon.populate(fill, [fd])
    if os.fstat(fd).st_blocks * 512 != recorded.punched_bytes:
        raise RuntimeError(f"filled {os.fstat(fd).st_blocks * 512} bytes, not {recorded.punched_bytes}")

    def give_back() -> None:
        plan = recorded.memory.coalesce(recorded.wire, recorded.unit_bytes)
        if page_by_page:
            _balloon.punch(plan, [fd], piece_bytes=PAGE_BYTES)
        else:
            _balloon.punch(plan, [fd])

    taken_ms = timed_ms(give_back)
    left_bytes = os.fstat(fd).st_blocks * 512
    if left_bytes > (recorded.punched_bytes // 100 if page_by_page else 0):
        raise RuntimeError(f"{left_bytes} of {recorded.punched_bytes} bytes are still allocated")
    _balloon.punch(fill, [fd])
    return taken_ms


def compare(report: Report, recorded: Recording, fd: int, measure: str, bar: float) -> None:
    """The rows and the bar of one memory file."""
    work: dict[str, Callable[[], float]] = {
        "peer": partial(replay, recorded, fd, True),
        "ours": partial(replay, recorded, fd, False),
    }
    interleaved(work, rounds=1)  # the first time pays for what is not there yet
    times = interleaved(work, ROUNDS)
    report.row(f"{measure}: page by page", times["peer"])
    report.row(measure, times["ours"])
    speeds = tuple(recorded.punched_bytes / (1 << 30) / (ms / 1000) for ms in times["ours"].values)
    report.row(f"{measure}: speed", Runs(speeds, "GiB/s"))
    report.bar(measure, ratio(times["peer"], times["ours"]), at_least=bar, peer=PEER)


def huge_shared_bytes() -> int:
    """How much shared memory stands in huge pages, on the whole machine."""
    return meminfo_bytes("ShmemHugePages")


def meminfo_bytes(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise CannotMeasure(f"/proc/meminfo has no {name}")


def check_backing(recorded: Recording, fd: int, huge: bool) -> None:
    """CannotMeasure unless the file's memory is huge, or not, as it should be."""
    plan = recorded.memory.coalesce(recorded.wire, recorded.unit_bytes)
    before_bytes = huge_shared_bytes()
    _balloon.populate(plan, [fd])
    share = (huge_shared_bytes() - before_bytes) / recorded.punched_bytes
    _balloon.punch(plan, [fd])
    if huge and share < 0.9:
        raise CannotMeasure(f"only {share:.0%} of the tmpfs's memory came in huge pages")
    if not huge and share > 0.1:
        raise CannotMeasure(f"{share:.0%} of a memfd's memory came in huge pages: shmem_enabled is not on its default")


@contextmanager
def memfd(size_bytes: int) -> Iterator[int]:
    fd = os.memfd_create("bench-balloon", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def file_on_huge_tmpfs(size_bytes: int) -> Iterator[int]:
    """A file on a tmpfs mounted huge=always, gone when the block ends. CannotMeasure when it cannot be mounted."""
    with tempfile.TemporaryDirectory(prefix="bench-balloon-") as folder:
        options = f"huge=always,size={size_bytes}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "bench-balloon", folder], capture_output=True, text=True, timeout=30
        )
        if mounted.returncode:
            raise CannotMeasure(f"cannot mount a tmpfs with huge=always (as root?): {mounted.stderr.strip()}")
        try:
            fd = os.open(f"{folder}/memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size_bytes)
                yield fd
            finally:
                os.close(fd)
        finally:
            subprocess.run(["umount", folder], check=True, timeout=30)


def body(report: Report) -> None:
    recorded = Recording.load()
    available_bytes = meminfo_bytes("MemAvailable")
    if available_bytes < recorded.punched_bytes + SPARE_BYTES:
        raise CannotMeasure(f"{available_bytes // MIB} MiB of memory are available, which is too few to fill the list")
    runs = len(recorded.wire) // 16
    report.note(f"{recorded.punched_bytes // MIB} MiB in {runs} runs, recorded in a guest; times include coalescing.")
    size_bytes = recorded.memory.total_bytes
    for (measure, bar), opened, huge in zip(BARS, (memfd, file_on_huge_tmpfs), (False, True), strict=True):
        try:
            with opened(size_bytes) as fd:
                check_backing(recorded, fd, huge)
                compare(report, recorded, fd, measure, bar)
        except CannotMeasure as lack:
            report.unmeasured(measure, str(lack), at_least=bar, peer=PEER)


if __name__ == "__main__":
    raise SystemExit(run("balloon-host", body, promised=BARS))
