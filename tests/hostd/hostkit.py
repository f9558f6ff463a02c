"""What hostd's tests share: specs, a store with a tiny image, and a host of fake sandboxes that can be restarted."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hostd.config import Config
from hostd.drivers.contract import Driver
from hostd.drivers.fake import FakeDriver
from hostd.images import domain_of
from hostd.sandbox import Sandbox
from hostd.sandboxes import Happened, Report, Sandboxes
from hostd.spec import DesiredState, ProcessSpec, Resources, SandboxSpec
from sharedcache.images import ImageConfig, ImageRecord, StoredLayer, image_digest
from sharedcache.layer import LayerMeta
from sharedcache.objects import ObjectKind
from sharedcache.store import Store

DEADLINE_S = 10.0
SLEEP = ImageConfig(cmd=("sleep",))
MODEST = Resources(memory_min_mib=256, memory_max_mib=1024, memory_mib=256, cpu_milli=1000)


def config_of(folder: Path, **changes: Any) -> Config:
    """A configuration below `folder`; nothing of it is there yet."""
    values: dict[str, Any] = {
        "host": "host-1", "state_dir": folder / "state", "run_dir": folder / "run", "listen": "127.0.0.1:0",
        "controlplane": "127.0.0.1:1", "tls_ca": folder / "ca.crt", "tls_cert": folder / "host.crt",
        "tls_key": folder / "host.key", "driver": "fake", "memory_reserve_mib": 0, "disk_reserve_mib": 0,
        "cache_dir": folder / "cache",
    }  # fmt: skip
    return Config(**{**values, **changes})


def put_image(store: Store, config: ImageConfig = SLEEP, tenant: str = "acme") -> str:
    """An image of one tiny layer (no file system: the fake driver does not look); its digest."""
    blob = os.urandom(4096)
    meta = LayerMeta("sha256:" + "1" * 64, b"u" * 16, len(blob), 1, 1, 0, 0, 0, 1)
    layer = store.publish_bytes(blob, domain=domain_of(tenant), kind=ObjectKind.LAYER, meta=meta)
    digest = image_digest((layer.digest,), config)
    store.put_image(ImageRecord(digest, domain_of(tenant), (StoredLayer.of(layer),), config, "rootfs", 0.0))
    return digest


@contextlib.contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """A store of its own. Skips without root, which the store needs."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the store gives blobs to groups of its own")
    with Store.open(folder / "store", min_free_bytes=0) as store:
        yield store


@dataclass
class Host:
    """A running Sandboxes on a fake driver, and all that it told."""

    config: Config
    store: Store
    driver: Driver
    image: str
    sandboxes: Sandboxes = field(init=False)
    reports: list[Report] = field(default_factory=list)
    events: list[Happened] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def up(self) -> None:
        """Starts it, as a hostd that starts does; returns once the journal's sandboxes are taken over."""
        self.sandboxes = Sandboxes(
            self.config, self.store, self.driver, report=self.reports.append, happened=self.events.append
        )
        self._task = asyncio.create_task(self.sandboxes.run())
        ready = asyncio.create_task(self.sandboxes.ready.wait())
        await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            await self._task

    async def down(self) -> None:
        """Stops it, as SIGTERM does: sandboxes run on."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        self._task = None

    async def restart(self) -> None:
        await self.down()
        await self.up()

    @property
    def fake(self) -> FakeDriver:
        assert isinstance(self.driver, FakeDriver)
        return self.driver

    def spec(self, uid: str = "one", *argv: str, **changes: Any) -> SandboxSpec:
        process = changes.pop("process", ProcessSpec(argv=argv))
        spec = SandboxSpec(uid, uid, "acme", self.image, uid, MODEST, process, epoch=1, stop_grace_s=5.0)
        return replace(spec, **changes)

    def assign(self, uid: str = "one", *argv: str, **changes: Any) -> Sandbox:
        self.sandboxes.assign(self.spec(uid, *argv, **changes))
        return self.sandboxes.find(uid)

    def want(self, sandbox: Sandbox, desired: DesiredState, **changes: Any) -> None:
        self.sandboxes.assign(replace(sandbox.spec, desired=desired, **changes))

    def reasons(self, uid: str = "one") -> list[str]:
        return [event.reason for event in self.events if event.subject == uid]


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Returns once `condition` holds, looked at each turn of the loop."""
    give_up_s = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < give_up_s, "it did not come to be"
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def running_host(folder: Path, driver: Driver | None = None, **changes: Any) -> AsyncIterator[Host]:
    """A host that is up; afterwards every task it had is over."""
    with open_store(folder) as store:
        host = Host(config_of(folder, **changes), store, driver or FakeDriver(), put_image(store))
        await host.up()
        try:
            yield host
        finally:
            await host.down()
