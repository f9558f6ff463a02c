"""What a benchmark started ends with it, however that ends: by an error, ^C, SIGTERM, or (at the next one) SIGKILL.

A guest's cgroup and directory are named bench-<pid of the benchmark>-…; the folder of all of them sl-bench-<pid>-….
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostd.cgroups import Hierarchy
from hostd.process import reap

FOLDERS = Path("/var/tmp")
PREFIX, FOLDER_PREFIX = "bench-", "sl-bench-"
SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_OWNER = re.compile(r"(?:sl-)?bench-(\d+)-")


class Ended(BaseException):
    """The benchmark was told to end by `signo`."""

    def __init__(self, signo: int) -> None:
        super().__init__(signal.Signals(signo).name)
        self.signo = signo


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the block as ^C does, so that whatever it has open is closed; then Ended is raised.

    The first one counts; more of them do not disturb the unwinding."""
    told: list[int] = []

    def unwind(signo: int, frame: types.FrameType | None) -> None:
        if not told:
            told.append(signo)
            signal.raise_signal(signal.SIGINT)  # asyncio.run cancels its task by it

    before = {signo: signal.signal(signo, unwind) for signo in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        raise Ended(told[0] if told else signal.SIGINT) from None
    finally:
        for signo, handler in before.items():
            signal.signal(signo, handler)


def of_process(names: list[str], pid: int) -> list[str]:
    """Those that process `pid` made. Pure."""
    return [name for name in names if (found := _OWNER.match(name)) and int(found.group(1)) == pid]


def of_the_dead(names: list[str], alive: Callable[[int], bool]) -> list[str]:
    """Those whose maker is gone. Pure."""
    return [name for name in names if (found := _OWNER.match(name)) and not alive(int(found.group(1)))]


def end_guests(cgroups: Hierarchy, names: list[str]) -> None:
    """Kills what is in these cgroups and removes them. Blocks."""
    for name in names:
        for pid in cgroups.remove(name):
            reap(pid)


def sweep(cgroups: Hierarchy, folders: Path = FOLDERS) -> list[str]:
    """Ends what benchmarks left that are gone; the names. Blocks."""
    guests = of_the_dead(cgroups.names(PREFIX), _alive)
    end_guests(cgroups, guests)
    left = of_the_dead([path.name for path in folders.glob(f"{FOLDER_PREFIX}*")], _alive)
    for name in left:
        shutil.rmtree(folders / name)
    return [*guests, *left]


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def own(cgroups: Hierarchy) -> list[str]:
    """This process's guests that are still there."""
    return of_process(cgroups.names(PREFIX), os.getpid())
