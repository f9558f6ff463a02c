"""The engines that the Store contract's suite runs on. Another engine is one more entry in ENGINES."""

from __future__ import annotations

import atexit
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from controlplane.store.contract import Store
from controlplane.store.etcd import open_etcd
from controlplane.store.etcdlink import EtcdAccess
from controlplane.store.sqlite import open_sqlite
from tests.etcdserver import cluster


@dataclass(frozen=True)
class Engine:
    """Opens a store over what is kept in a folder; opening it again finds what was there.

    `shares_revisions`: commits of one moment may have one revision. `clean` is called when a test is over."""

    open: Callable[[], AbstractAsyncContextManager[Store]]
    shares_revisions: bool = False
    clean: Callable[[], Awaitable[None]] | None = None


def sqlite_engine(folder: Path) -> Engine:
    return Engine(lambda: open_sqlite(folder / "store.db"))


@cache
def shared_etcd() -> str:
    """One etcd for all tests of this process that do it no harm: its endpoint."""
    stack = ExitStack()
    folder = Path(tempfile.mkdtemp(prefix="sandloom-etcd-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    (member,) = stack.enter_context(cluster(folder))
    atexit.register(stack.close)
    return member.client


async def end_leases(access: EtcdAccess) -> None:
    """Revokes what a test left behind: a lease that runs out later would make a revision in another test."""
    async with open_etcd(access) as store:
        link = store._link
        listed = await link.call("Lease", "LeaseLeases", link.proto.LeaseLeasesRequest(), safe=True)
        for status in listed.leases:
            await store.revoke_lease(status.ID)


def etcd_access() -> EtcdAccess:
    """The shared etcd, under a prefix that nobody else has."""
    return EtcdAccess((shared_etcd(),), prefix=f"{secrets.token_hex(6)}/", deadline_s=30.0)


def etcd_engine(_: Path) -> Engine:
    access = etcd_access()
    return Engine(lambda: open_etcd(access), shares_revisions=True, clean=lambda: end_leases(access))


ENGINES: dict[str, Callable[[Path], Engine]] = {"etcd": etcd_engine, "sqlite": sqlite_engine}
