"""Where a run of the tests keeps its folders: in one with a short name, since sockets below it may be 107 bytes long.

    /tmp/sl-XXXXXX/[popen-gwN/]TEST0/...      removed when the run ends, unless something is still mounted below

Tests run two at a time (pytest-xdist); what they share on this machine they make under tests/once.py's lock.

gRPC's fork handlers are off: no test uses gRPC in a forked child, and they write to the stderr of commands under test.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

FOLDER = pytest.StashKey[Path]()
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses the folder, once for all processes of a run."""
    if config.option.basetemp is None and not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
        folder.chmod(0o711)  # guests' uids pass through
        config.stash[FOLDER] = folder
        config.option.basetemp = str(folder / "t")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the folder that this run chose."""
    folder = config.stash.get(FOLDER, None)
    if folder is not None and str(folder) not in Path("/proc/self/mounts").read_text(encoding="utf-8"):
        shutil.rmtree(folder, ignore_errors=True)
