"""The engines that the Store contract's suite runs on. Another engine is one more entry in ENGINES."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from controlplane.store.contract import Store
from controlplane.store.sqlite import open_sqlite


@dataclass(frozen=True)
class Engine:
    """Opens a store over what is kept in a folder; opening it again finds what was there."""

    open: Callable[[], AbstractAsyncContextManager[Store]]


def sqlite_engine(folder: Path) -> Engine:
    return Engine(lambda: open_sqlite(folder / "store.db"))


ENGINES: dict[str, Callable[[Path], Engine]] = {"sqlite": sqlite_engine}
