"""A blob on its way into the store: an open file that watches the disk and is gone when nobody publishes it.

Owns `staging/<random>/blob` from `Staging.create` until `remove`, or until the store renames the folder away.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from sharedcache.durable import full_disk_named
from sharedcache.errors import OutOfSpace
from sharedcache.layout import BLOB_MODE, BLOB_NAME

_CHECK_EVERY_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 16  # what is larger goes straight through


class _GuardedFile(io.FileIO):
    """A raw file that asks `require_space(bytes)` before every 8 MiB, and names a full disk as what it is."""

    def __init__(self, path: Path, require_space: Callable[[int], None]) -> None:
        super().__init__(path, "x+b")
        self._require_space = require_space
        self._credit_bytes = 0

    def write(self, data: object, /) -> int:
        size_bytes = memoryview(cast(bytes, data)).nbytes
        if size_bytes > self._credit_bytes:
            self._require_space(max(size_bytes, _CHECK_EVERY_BYTES))
            self._credit_bytes = max(size_bytes, _CHECK_EVERY_BYTES)
        self._credit_bytes -= size_bytes
        with full_disk_named(self.name):
            return super().write(cast(bytes, data)) or 0


class Staging:
    """One blob being written. `file` can be read, written and sought until it is sealed."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self.folder = folder
        self.file = file

    @classmethod
    def create(cls, parent: Path, require_space: Callable[[int], None]) -> Staging:
        """A new folder in `parent` with an empty blob. OutOfSpace."""
        folder = parent / secrets.token_hex(8)
        try:
            with full_disk_named(folder):
                # The folder becomes the object's own: VM uids traverse it, nobody but root lists it.
                folder.mkdir(mode=0o700)
                folder.chmod(0o711)
                raw = _GuardedFile(folder / BLOB_NAME, require_space)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(folder, cast(BinaryIO, io.BufferedRandom(raw, _BUFFER_BYTES)))

    @property
    def blob(self) -> Path:
        """The file itself."""
        return self.folder / BLOB_NAME

    def seal(self, gid: int) -> int:
        """Ends writing: owner, mode and bytes are on disk, the file is closed. Returns its size in bytes."""
        with full_disk_named(self.blob):
            self.file.flush()
        fd = self.file.fileno()
        # The group before the mode: chown clears bits, and no moment may show the blob to a wrong group.
        os.fchmod(fd, 0)
        os.fchown(fd, 0, gid)
        os.fchmod(fd, BLOB_MODE)
        with full_disk_named(self.blob):
            os.fsync(fd)
        size_bytes = os.fstat(fd).st_size
        self.file.close()
        return size_bytes

    def remove(self) -> None:
        """Drops what was not published; nothing happens after a publish."""
        try:
            self.file.close()
        except (OSError, OutOfSpace):
            pass  # its bytes are thrown away, so a failed flush is of no interest
        shutil.rmtree(self.folder, ignore_errors=True)
