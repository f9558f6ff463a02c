"""Guests and OCI sandboxes of one image hold its pages once: guests are given the host's mount of it, file by file.

A guest maps a layer's blob (virtio-pmem), OCI sandboxes read the host's mount of the same blob, and the two have page
caches of their own. So as soon as a layer is used both ways, its mount's files are put over their parts of the blob's
mapping in each QEMU that has it (qemu/src/onecopy.c), whoever came first; what the blob's own page cache held of them
is then nobody's, and let go of. Until then, for as long as that takes, there may be two copies, never three.

Level-triggered: looks at which blobs QEMUs map and at what is mounted, at each start and end of a sandbox and when
hostd begins. A guest that cannot be given the files keeps the blob. A mount that guests map stays until the last of
them ended. Owns the task that does this.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary

from hostd.drivers.contract import Engine
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.qemu.engine import QemuEngine
from hostd.errors import HostdError
from hostd.tasks import OwnedTasks

log = logging.getLogger("sandloom.hostd.onecopy")

BUSY_TRIES, BUSY_RETRY_S = 10, 0.5
"""The kernel lets go of an ended process's files a moment after it is seen to end."""

_SHARED_FILE = re.compile(r"^\S+ r--s 00000000 \S+ \d+ +(/.*)$", re.M)


def mapped_blobs(maps: str) -> list[Path]:
    """Files that a process maps shared and read-only from their start, by its /proc/PID/maps. Pure."""
    return [Path(found) for found in dict.fromkeys(_SHARED_FILE.findall(maps))]


def _blobs_of(pid: int, mounts: Path) -> list[Path]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return []
    return [path for path in mapped_blobs(maps) if mounts not in path.parents]


def _let_go(blob: Path) -> None:
    descriptor = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class OneCopy:
    """One hostd's. Use as an async context manager."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._tasks = OwnedTasks()
        self._waiting: WeakKeyDictionary[QemuEngine, list[Path] | None] = WeakKeyDictionary()
        """Which blobs each guest maps still; None: not looked at yet."""
        self._due, self._idle = False, asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> OneCopy:
        self.look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.aclose()

    def started(self, engine: Engine) -> None:
        """A sandbox runs."""
        if isinstance(engine, QemuEngine):
            self._waiting[engine] = None
        self.look()

    def look(self) -> None:
        """Something changed. Returns at once."""
        self._due = True
        if self._idle.is_set():
            self._idle.clear()
            self._tasks.spawn(self._follow(), name="one copy of each layer")

    async def settled(self) -> None:
        """Returns when all that was told has been acted on."""
        await self._idle.wait()

    async def _follow(self) -> None:
        try:
            while self._due:
                self._due = False
                points = await asyncio.to_thread(self.layers.points)
                for engine in list(self._waiting) if points else []:
                    await self._give(engine, points)
                await self._release()
        finally:
            self._idle.set()

    async def _give(self, engine: QemuEngine, points: frozenset[Path]) -> None:
        """Everything that is mounted of what this guest maps."""
        blobs = self._waiting.get(engine)
        if blobs is None:
            blobs = await asyncio.to_thread(_blobs_of, engine.handle.pid, self.layers.root)
        left: list[Path] = []
        for blob in blobs:
            try:
                if not await asyncio.to_thread(self._mounted, blob, points):
                    left.append(blob)
                    continue
                await engine.take_pieces(await asyncio.to_thread(self.layers.tables, blob))
                await asyncio.to_thread(_let_go, blob)
            except (HostdError, OSError) as error:
                log.info("the guest of pid %d keeps a copy of %s of its own: %s", engine.handle.pid, blob, error)
        self._waiting[engine] = left

    def _mounted(self, blob: Path, points: frozenset[Path]) -> bool:
        return self.layers.point_of(blob, blob.stat().st_gid) in points

    async def _release(self) -> None:
        """Mounts that only guests used, which have ended."""
        for _ in range(BUSY_TRIES):
            try:
                busy = await asyncio.to_thread(self.layers.release)
            except HostdError as error:
                log.warning("%s", error)
                return
            if not busy or self._due or self._waiting:
                return
            await asyncio.sleep(BUSY_RETRY_S)
