"""What a sandbox needs of what is around it: its image, and the host that owns it. hostd/sandboxes.py has both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hostd.checkpoint import CheckpointAbout
from hostd.checkpoints import Checkpoints
from hostd.drivers.contract import Driver, LayerFile
from hostd.journal import Journal
from hostd.memory.brokering import Broker
from hostd.pools import Taken
from hostd.spec import Command, SandboxSpec

if TYPE_CHECKING:
    from hostd.sandbox import Sandbox


class Image(Protocol):
    """What a sandbox needs of its image."""

    @property
    def layers(self) -> tuple[LayerFile, ...]: ...
    def command(self, spec: SandboxSpec) -> Command: ...


class Host(Protocol):
    """What a sandbox needs of its host; hostd/sandboxes.py is it."""

    journal: Journal
    driver: Driver
    run_dir: Path
    broker: Broker
    now_s: Callable[[], float]
    now_ns: Callable[[], int]

    async def take_image(self, spec: SandboxSpec) -> Image: ...
    @property
    def checkpoints(self) -> Checkpoints: ...
    async def take_layers(self, spec: SandboxSpec, about: CheckpointAbout) -> tuple[LayerFile, ...]: ...
    async def release_image(self, uid: str) -> None: ...
    async def admitted(self, spec: SandboxSpec, holds_mib: int = 0) -> None: ...
    def claim_vm_uid(self) -> int: ...
    def take_member(self, spec: SandboxSpec) -> Taken | None: ...
    async def end_member(self, taken: Taken) -> None: ...
    def start_slot(self) -> asyncio.Semaphore: ...
    def changed(self, sandbox: Sandbox, *, removed: bool = False) -> None: ...
    def event(self, sandbox: Sandbox, reason: str, message: str) -> None: ...
