"""A counting guest, checkpoints of it, and the guests restored from them; ends all it made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

from hostd.drivers.contract import Checkpointing, Driver, Engine, ProcessLink, StartPlan, TakenCheckpoint
from hostd.spec import Resources
from hostd.tasks import OwnedTasks
from tests.contract.driver_suite import collect, command
from tests.hostd.drivers.qemu.rig import QemuRig, left_of

DEADLINE_S = 60.0
SIZE = Resources(memory_min_mib=256, memory_max_mib=512, memory_mib=384, cpu_milli=1000)
COUNTER = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.4; done"
FILLED_MIB = 48
FILL = f"cat {'/flood ' * (FILLED_MIB + 5)} > /filled"  # one process: starting some takes longer than the copying


@dataclass
class Counting:
    """A running guest whose main process counts; what it printed is recorded as a sandbox's owner would."""

    plan: StartPlan
    driver: Driver
    engine: Engine
    main: ProcessLink
    offsets: dict[int, int]
    printed: bytes = b""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def pump(self) -> None:
        async for piece in self.main.output():
            if piece.stream == 1:
                self.printed += piece.data
            self.offsets[piece.stream] += len(piece.data)
            self.changed.set()

    def numbers(self) -> list[int]:
        """What was printed so far, whole lines."""
        return [int(line) for line in self.printed.split(b"\n")[:-1]]

    async def count(self, more: int = 3) -> list[int]:
        """Waits for `more` more numbers; all so far."""
        wanted = len(self.numbers()) + more
        async with asyncio.timeout(DEADLINE_S):
            while len(self.numbers()) < wanted:
                self.changed.clear()
                await self.changed.wait()
        return self.numbers()

    async def sh(self, script: str) -> str:
        """Standard output of a shell script that must succeed."""
        process = await self.engine.spawn(command(("sh", "-c", script)), main=False)
        out, err, ended = await collect(process)
        await process.release()
        assert ended.code == 0, (script, out, err)
        return out.decode().strip()

    async def checkpoint(self) -> TakenCheckpoint:
        return await checkpointing_of(self.driver).checkpoint(self.engine, lambda: dict(self.offsets))

    async def memory_is(self, most_mib: int, least_mib: int = 0) -> None:
        """Waits until the guest has followed a resize."""
        async with asyncio.timeout(DEADLINE_S):
            # The guest tells nobody when it has followed.
            while not least_mib <= (await self.engine.memory()).actual_mib <= most_mib:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def restored(plan: StartPlan) -> StartPlan:
    """The plan of a sandbox that goes on from a checkpoint."""
    return replace(plan, spec=replace(plan.spec, checkpoint="c-1"))


def checkpointing_of(driver: Driver) -> Checkpointing:
    assert driver.checkpointing is not None
    return driver.checkpointing


class Nursery:
    """Makes counting guests and ends them."""

    def __init__(self, rig: QemuRig, stack: AsyncExitStack, tasks: OwnedTasks) -> None:
        self.rig, self._stack, self._tasks, self._number = rig, stack, tasks, 0

    def plan(self, name: str) -> StartPlan:
        self._number += 1
        return self.rig.plan(f"{name}{self._number}", SIZE)

    async def start(self, driver: Driver) -> Counting:
        """From the beginning, counting, its elastic memory used."""
        plan = self.plan("source")
        engine = await driver.start(plan, lambda _: None)
        self._stack.push_async_callback(self._end, driver, plan, engine)
        await engine.resize(SIZE)
        guest = Counting(
            plan, driver, engine, await engine.spawn(command(("sh", "-c", COUNTER)), main=True), {1: 0, 2: 0}
        )
        self._tasks.spawn(guest.pump(), "pump")
        await guest.memory_is(SIZE.memory_max_mib, SIZE.memory_mib)
        await guest.sh(FILL)
        await guest.count()
        return guest

    async def fork(self, taken: TakenCheckpoint, driver: Driver | None = None) -> Counting:
        """One restored from a checkpoint."""
        plan, driver = restored(self.plan("fork")), driver or self.rig.driver
        checkpoints = checkpointing_of(driver)
        engine = await checkpoints.restore(plan, taken.memory, taken.form, taken.offsets, lambda _: None)
        self._stack.push_async_callback(self._end, driver, plan, engine)
        main = engine.resume()
        assert main is not None
        guest = Counting(plan, driver, engine, main, dict(taken.offsets))
        self._tasks.spawn(guest.pump(), "pump")
        return guest

    def closing(self, taken: TakenCheckpoint) -> TakenCheckpoint:
        """Closed with the nursery."""
        self._stack.callback(taken.memory.close)
        return taken

    async def _end(self, driver: Driver, plan: StartPlan, engine: Engine) -> None:
        await engine.detach()
        await driver.destroy(plan.spec.uid, plan.folder, engine.handle)
        assert left_of(plan.spec.uid, plan.folder, plan.vm_uid) == []


@asynccontextmanager
async def nursery(rig: QemuRig) -> AsyncIterator[Nursery]:
    """Nothing of its guests is left afterwards."""
    async with AsyncExitStack() as stack, OwnedTasks() as tasks:
        yield Nursery(rig, stack, tasks)


@dataclass
class Scene:
    """A source, its checkpoint, and three forks."""

    nursery: Nursery
    source: Counting
    taken: TakenCheckpoint
    forks: list[Counting]


@asynccontextmanager
async def scene(rig: QemuRig) -> AsyncIterator[Scene]:
    """Of a guest that was booted cold and has an exec session."""
    async with nursery(rig) as made:
        source = await made.start(rig.driver)
        await source.engine.spawn(command(("sleep", "4242")), main=False)
        await source.sh("echo before > /mark")
        taken = made.closing(await source.checkpoint())
        forks = [await made.fork(taken) for _ in range(3)]
        yield Scene(made, source, taken, forks)


def damaged(taken: TakenCheckpoint, **form: object) -> TakenCheckpoint:
    """The same with other words in its form."""
    return replace(taken, form={**taken.form, **form})
