"""The fake driver's checkpoints: the main process's command, and where its streams stood. A copy runs it anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from hostd.drivers.contract import Engine, StartPlan, TakenCheckpoint
from hostd.drivers.fakemachine import MAIN, Machine
from hostd.errors import CheckpointUnusable, HostdError
from hostd.journal import Handle
from hostd.spec import Command, SandboxClass

FORM = {"accel": "fake"}


class Faulty(Protocol):
    """The faults of the fake driver that matter here."""

    checkpoint: HostdError | None
    restore: HostdError | None


class Machines(Protocol):
    """What is needed of the fake driver."""

    machines: dict[str, Machine]

    @property
    def faults(self) -> Faulty: ...
    async def boot(self, plan: StartPlan, made: Callable[[Handle], None], *, checkpoint: str = "") -> Machine: ...
    def attach(self, machine: Machine, start_phases: tuple[tuple[str, float], ...]) -> Engine: ...
    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None: ...


@dataclass
class FakeMemory:
    """Implements hostd.drivers.contract.CheckpointMemory. Closing it twice is a bug of its owner."""

    command: Command
    open_now: set[int] = field(default_factory=set)

    def held_bytes(self) -> int:
        """See the contract."""
        return 1 << 20

    def write(self, about: bytes, out: BinaryIO) -> None:
        """See the contract."""
        out.write(json.dumps({"command": self.command.__dict__, "about": about.decode()}).encode())
        out.flush()

    def close(self) -> None:
        """See the contract."""
        self.open_now.remove(id(self))


class FakeCheckpointing:
    """Implements hostd.drivers.contract.Checkpointing. `open_now` tells of memory that nobody has closed."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self.open_now: set[int] = set()

    classes = (SandboxClass.GUEST_KERNEL,)

    def recognises(self, path: Path) -> bool:
        """See Checkpointing.recognises."""
        return path.exists()

    def _memory(self, command: Command) -> FakeMemory:
        memory = FakeMemory(command, self.open_now)
        self.open_now.add(id(memory))
        return memory

    async def go_on(self, engine: Engine) -> None:
        """See Checkpointing.go_on. Its programs never stand still."""

    async def checkpoint(
        self, engine: Engine, offsets: Callable[[], dict[int, int]], *, go_on: bool = True
    ) -> TakenCheckpoint:
        """See Checkpointing.checkpoint."""
        if self._machines.faults.checkpoint is not None:
            raise self._machines.faults.checkpoint
        machine = next(each for each in self._machines.machines.values() if each.handle == engine.handle)
        command = machine.processes[MAIN].terminal.command
        return TakenCheckpoint(self._memory(command), dict(FORM), offsets(), 0.01)

    def read_about(self, path: Path) -> bytes:
        """See Checkpointing.read_about."""
        about: str = self._read(path)["about"]
        return about.encode()

    def load(self, path: Path) -> FakeMemory:
        """See Checkpointing.load."""
        values = self._read(path)["command"]
        argv, env = tuple(values.pop("argv")), tuple((key, value) for key, value in values.pop("env"))
        return self._memory(Command(argv=argv, env=env, **values))

    def load_of(self, path: Path, pid: int) -> FakeMemory:
        """See Checkpointing.load_of."""
        return self.load(path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointUnusable(f"{path}: is no checkpoint of the fake driver") from error
        return values

    async def restore(
        self,
        plan: StartPlan,
        memory: FakeMemory,
        form: Mapping[str, object],
        offsets: Mapping[int, int],
        made: Callable[[Handle], None],
    ) -> Engine:
        """See Checkpointing.restore."""
        if self._machines.faults.restore is not None:
            raise self._machines.faults.restore
        machine = await self._machines.boot(plan, made, checkpoint=plan.spec.checkpoint)
        engine = self._machines.attach(machine, (("vmm", 0.0), ("restore", 0.0), ("renew", 0.0)))
        try:
            await engine.spawn(memory.command, main=True)
        except BaseException:
            await self._machines.destroy(plan.spec.uid, plan.folder, machine.handle)
            raise
        machine.processes[MAIN].terminal.begin_at(offsets)
        engine.origin = f"restored from checkpoint {plan.spec.checkpoint}"
        return engine
