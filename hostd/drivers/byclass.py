"""One driver out of several: each sandbox's class says whose it is.

What a class lacks is refused by name, with the classes of this host that have it. An engine that runs is found again
by what its handle says it runs on; what has no handle is cleaned up by every driver, those that mount first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hostd.drivers.contract import Checkpointing, Driver, Engine, StartPlan, TakenCheckpoint, WarmGuest, Warming
from hostd.errors import CheckpointUnusable, HostdError, InvalidSpec
from hostd.journal import Handle
from hostd.spec import SandboxClass

CLEAN_UP_ORDER = (SandboxClass.HOST_KERNEL, SandboxClass.USER_KERNEL, SandboxClass.GUEST_KERNEL)
"""A root filesystem is unmounted before anybody removes the folder that it is in."""

WITH_LINKS = (SandboxClass.USER_KERNEL, SandboxClass.HOST_KERNEL)
"""Classes whose sandboxes can have a link to their host."""


def class_of(accel: str) -> SandboxClass:
    """Whose engine it is that runs on `accel` (Handle.accel)."""
    kind = accel.partition("/")[0]
    return {"crun": SandboxClass.HOST_KERNEL, "runsc": SandboxClass.USER_KERNEL}.get(kind, SandboxClass.GUEST_KERNEL)


def lacking(feature: str, asked: SandboxClass, have: tuple[SandboxClass, ...]) -> InvalidSpec:
    """The error for a feature that a class has not, naming those that have it."""
    others = ", ".join(one.value for one in have) or "none on this host"
    return InvalidSpec(f"class {asked.value} has no {feature}; classes that have it: {others}", reason="ClassLacks")


class Following(Protocol):
    """Who follows what starts and ends (hostd/drivers/onecopy.py). Both return at once."""

    def started(self, engine: Engine) -> None:
        """An engine runs."""
        ...

    def look(self) -> None:
        """One has ended."""
        ...


class _Nobody:
    """Follows nothing."""

    def started(self, engine: Engine) -> None:
        """See Following.started."""

    def look(self) -> None:
        """See Following.look."""


def _told(one_copy: Following, engine: Engine) -> Engine:
    one_copy.started(engine)
    return engine


class ByClass:
    """Implements hostd.drivers.contract.Driver. `missing` says why this host has no driver for a class; `one_copy` is
    told of all that starts and ends."""

    def __init__(
        self,
        drivers: Mapping[SandboxClass, Driver],
        missing: Mapping[SandboxClass, str],
        one_copy: Following | None = None,
    ) -> None:
        self.drivers, self._missing = dict(drivers), dict(missing)
        self._one_copy = one_copy or _Nobody()
        warm = {one: driver.warming for one, driver in self.drivers.items() if driver.warming is not None}
        self.warming: Warming | None = _Warming(warm, self._one_copy) if warm else None
        able = {one: driver.checkpointing for one, driver in self.drivers.items() if driver.checkpointing is not None}
        self.checkpointing: Checkpointing | None = _Checkpointing(able, self._one_copy) if able else None

    def of(self, asked: SandboxClass) -> Driver:
        """The driver of a class. InvalidSpec says why there is none, and which classes this host runs."""
        if asked not in self.drivers:
            here = ", ".join(one.value for one in self.drivers)
            raise InvalidSpec(
                f"this host runs no {asked.value} sandboxes: {self._missing.get(asked, 'no driver')}; it runs: {here}",
                reason="ClassMissing",
            )
        return self.drivers[asked]

    async def start(self, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Driver.start."""
        if plan.spec.network.veth and plan.spec.sandbox_class not in WITH_LINKS:
            raise lacking("veth", plan.spec.sandbox_class, tuple(one for one in WITH_LINKS if one in self.drivers))
        return _told(self._one_copy, await self.of(plan.spec.sandbox_class).start(plan, made))

    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None:
        """See Driver.adopt."""
        engine = await self.of(class_of(handle.accel)).adopt(plan, handle, offsets)
        return None if engine is None else _told(self._one_copy, engine)

    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None:
        """See Driver.destroy. HostdError also when what it ran on is no longer on this host."""
        if handle is not None:
            owner = class_of(handle.accel)
            if owner not in self.drivers:
                raise HostdError(f"sandbox {uid} runs on {handle.accel}, which is gone: install it and restart hostd")
            await self.drivers[owner].destroy(uid, folder, handle)
            self._one_copy.look()
            return
        for one in CLEAN_UP_ORDER:
            if one in self.drivers:
                await self.drivers[one].destroy(uid, folder, None)


class _Warming:
    """Implements hostd.drivers.contract.Warming by the classes that have it."""

    def __init__(self, able: Mapping[SandboxClass, Warming], one_copy: Following) -> None:
        self._able, self._one_copy = dict(able), one_copy

    def _of(self, asked: SandboxClass) -> Warming:
        if asked not in self._able:
            raise lacking("warm pools", asked, tuple(self._able))
        return self._able[asked]

    async def prewarm(self, plan: StartPlan, made: Callable[[Handle], None]) -> WarmGuest:
        """See Warming.prewarm."""
        return await self._of(plan.spec.sandbox_class).prewarm(plan, made)

    async def claim(self, guest: WarmGuest, plan: StartPlan, made: Callable[[Handle], None]) -> Engine:
        """See Warming.claim."""
        return _told(self._one_copy, await self._of(class_of(guest.handle.accel)).claim(guest, plan, made))


class _Checkpointing:
    """Implements hostd.drivers.contract.Checkpointing by the classes that have it."""

    def __init__(self, able: Mapping[SandboxClass, Checkpointing], one_copy: Following) -> None:
        self._able, self._one_copy = dict(able), one_copy

    @property
    def classes(self) -> tuple[SandboxClass, ...]:
        """See Checkpointing.classes."""
        return tuple(self._able)

    def _of(self, asked: SandboxClass) -> Checkpointing:
        if asked not in self._able:
            raise lacking("checkpoints", asked, tuple(self._able))
        return self._able[asked]

    async def checkpoint(
        self, engine: Engine, offsets: Callable[[], dict[int, int]], *, go_on: bool = True
    ) -> TakenCheckpoint:
        """See Checkpointing.checkpoint."""
        return await self._of(class_of(engine.handle.accel)).checkpoint(engine, offsets, go_on=go_on)

    async def go_on(self, engine: Engine) -> None:
        """See Checkpointing.go_on."""
        await self._of(class_of(engine.handle.accel)).go_on(engine)

    def recognises(self, path: Path) -> bool:
        """See Checkpointing.recognises."""
        return any(one.recognises(path) for one in self._able.values())

    def _whose(self, path: Path) -> Checkpointing:
        """By the file's form. CheckpointUnusable."""
        for one in self._able.values():
            if one.recognises(path):
                return one
        raise CheckpointUnusable(f"{path}: is a checkpoint of no class that this host can restore; make it anew")

    def read_about(self, path: Path) -> bytes:
        """See Checkpointing.read_about."""
        return self._whose(path).read_about(path)

    def load(self, path: Path) -> Any:
        """See Checkpointing.load."""
        return self._whose(path).load(path)

    def load_of(self, path: Path, pid: int) -> Any:
        """See Checkpointing.load_of."""
        return self._whose(path).load_of(path, pid)

    async def restore(
        self,
        plan: StartPlan,
        memory: Any,
        form: Mapping[str, object],
        offsets: Mapping[int, int],
        made: Callable[[Handle], None],
    ) -> Engine:
        """See Checkpointing.restore."""
        engine = await self._of(plan.spec.sandbox_class).restore(plan, memory, form, offsets, made)
        return _told(self._one_copy, engine)
