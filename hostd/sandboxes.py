"""All sandboxes of this host: takes assignments, owns one task each, takes over after a restart, reports.

    control plane's list and watch ──assign/unassign/listed──► Sandboxes ──Report──► reporter (hostd/register.py)

Level-triggered: what is assigned is the whole truth; a sandbox that the control plane no longer knows is removed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hostd import images
from hostd.admission import GUEST_OVERHEAD_MIB, HostNow, admit, reserved_mib, with_max
from hostd.arrivals import Arrivals
from hostd.cgroups import Hierarchy
from hostd.checkpoint import CheckpointAbout
from hostd.checkpoints import Checkpoints
from hostd.command import resolve
from hostd.config import Config
from hostd.drivers.contract import Driver, LayerFile
from hostd.drivers.seat import seat_of
from hostd.errors import HostdError, ImageMissing, SandboxGone
from hostd.journal import Journal, Record
from hostd.lifecycle import ENDED, Phase
from hostd.memory.brokering import Broker
from hostd.memory.pressure import HostSense
from hostd.pools import Pools, Taken
from hostd.removal import remove_folder
from hostd.resize import ResizeProgress, retry_s
from hostd.sandbox import Sandbox
from hostd.spec import Command, DesiredState, Resources, SandboxSpec
from hostd.warmpool import MEMBER_PREFIX
from sharedcache.images import ImageConfig
from sharedcache.store import Store

log = logging.getLogger("sandloom.hostd.sandboxes")

FIRST_VM_UID = 200_000
LAST_VM_UID = 265_535
STARTS_PER_CPU = 2
HOLDS_MEMORY = frozenset({Phase.STARTING, Phase.RUNNING, Phase.STOPPING})
IMPORT_PREFIX = ".import-"
"""Spooled uploads, below the state directory; what a crash left of them goes at the next start."""


@dataclass(frozen=True)
class Report:
    """What the control plane is told of a sandbox."""

    record: Record
    resize: ResizeProgress | None
    removed: bool = False


@dataclass(frozen=True)
class Happened:
    """An entry for the event log."""

    subject: str
    reason: str
    message: str
    time_s: float
    kind: str = "sandbox"


@dataclass(frozen=True)
class ImageInUse:
    """An image as a sandbox uses it."""

    layers: tuple[LayerFile, ...]
    config: ImageConfig

    def command(self, spec: SandboxSpec) -> Command:
        """The main process."""
        config = self.config
        return resolve(
            spec.process,
            entrypoint=config.entrypoint,
            cmd=config.cmd,
            env=config.env,
            workdir=config.workdir,
            user=config.user,
            hostname=spec.hostname,
        )


class Sandboxes:
    """Implements hostd.sandbox.Host. Use run() as the owner of all sandboxes' tasks."""

    def __init__(
        self,
        config: Config,
        store: Store,
        driver: Driver,
        *,
        report: Callable[[Report], None],
        happened: Callable[[Happened], None],
        now_s: Callable[[], float] = time.time,
        now_ns: Callable[[], int] = time.time_ns,
        cgroups: Hierarchy | None = None,
    ) -> None:
        self.config, self.store, self.driver = config, store, driver
        self.run_dir: Path = config.run_dir
        self.journal = Journal(config.state_dir)
        self.now_s, self.now_ns = now_s, now_ns
        self._report, self._happened = report, happened
        self._slots = asyncio.Semaphore(STARTS_PER_CPU * (os.cpu_count() or 1))
        self._sandboxes: dict[str, Sandbox] = {}
        self._successors: dict[str, SandboxSpec] = {}
        self._claimed: set[int] = set()
        self._arrivals = Arrivals()
        self._group: asyncio.TaskGroup | None = None
        self.ready = asyncio.Event()
        self.fetch: Callable[[str, str, Callable[[str, str], None]], Awaitable[None]] | None = None
        self.pools = Pools(self)
        self._cgroups = cgroups
        self.broker = Broker(
            self,
            config.memory_rules(GUEST_OVERHEAD_MIB),
            HostSense(cgroups, config.memory_budget_mib),
            sense_s=config.memory_sense_s,
            active=config.memory_broker == "on",
        )
        self.checkpoints: Checkpoints = Checkpoints(store, lambda: self.driver.checkpointing, now_s, self._awaited)

    async def run(self) -> None:
        """Takes over what the journal names (then `ready` is set), then owns every sandbox's task until cancelled."""
        records = await self._recover()
        async with asyncio.TaskGroup() as group:
            self._group = group
            for record in records:
                self._begin(record)
            group.create_task(self.pools.run(), name="pools")
            group.create_task(self.broker.run(), name="broker")
            group.create_task(self.checkpoints.run(), name="checkpoints")
            self.ready.set()
            await asyncio.Event().wait()

    async def _recover(self) -> list[Record]:
        records = await asyncio.to_thread(lambda: list(self.journal.records()))
        known = {record.spec.uid for record in records}
        known |= {record.handle.member for record in records if record.handle and record.handle.member}
        self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        for folder in sorted(self.run_dir.iterdir()):  # its record was moved away, or a crash came before it
            if folder.is_dir() and folder.name not in known:
                log.warning("%s belongs to no record: what runs there is ended", folder)
                await self.driver.destroy(folder.name, folder, None)
        await asyncio.to_thread(self._release_members)
        await self.checkpoints.recover()
        for folder in self.config.state_dir.glob(f"{IMPORT_PREFIX}*"):
            await asyncio.to_thread(remove_folder, folder)
        return records

    def _awaited(self) -> set[str]:
        """Checkpoints that sandboxes are about to go on from."""
        beginning = (Phase.ASSIGNED, Phase.STARTING)
        awaited = {each.spec.checkpoint for each in self.all() if each.record.phase in beginning}
        return awaited | {each.record.parked for each in self.all()}

    def _release_members(self) -> None:
        """Unpins the images of pool members: those of a former hostd have ended, and claimed ones are sandboxes."""
        for owner in self.store.pins():
            if owner.startswith(images.pin_owner(MEMBER_PREFIX)):
                self.store.unpin(owner)

    def _begin(self, record: Record) -> None:
        assert self._group is not None, "run() comes first"
        sandbox = Sandbox(record, self)
        self._sandboxes[record.spec.uid] = sandbox
        if record.vm_uid is not None:
            self._claimed.add(record.vm_uid)
        self._group.create_task(self._own(sandbox), name=f"sandbox {record.spec.name}")

    async def _own(self, sandbox: Sandbox) -> None:
        """Runs it to its end. Its own defect takes no other sandbox's task with it, and leaves nothing half done."""
        attempts = 0
        while True:
            try:
                return await sandbox.run()
            except Exception as error:
                attempts += 1
                log.exception("sandbox %s: its task ended early, attempt %d", sandbox.spec.name, attempts)
                sandbox.broken(error)
                await asyncio.sleep(retry_s(attempts))

    # What the control plane says.

    def assign(self, spec: SandboxSpec) -> None:
        """The sandbox is (still) assigned here, like this. Only once `ready` is set."""
        known = self._sandboxes.get(spec.uid)
        if known is not None and spec.epoch > known.spec.epoch and known.has_begun:
            self._successors[spec.uid] = spec  # it begins anew once nothing of the older epoch is left
            known.want(replace(known.spec, desired=DesiredState.REMOVED))
            return
        if known is not None:
            known.want(spec)
            self.changed(known)
            return
        if spec.desired is DesiredState.REMOVED:
            self._report(Report(Record(spec), None, removed=True))
            return
        record = Record(spec)
        self.journal.write(record)
        self._begin(record)

    def unassign(self, uid: str, epoch: int | None = None) -> None:
        """The control plane knows it no more (up to `epoch`): let go of everything it has. Unknown is fine."""
        successor = self._successors.get(uid)
        if successor is not None and (epoch is None or successor.epoch <= epoch):
            del self._successors[uid]
        known = self._sandboxes.get(uid)
        if known is not None and (epoch is None or known.spec.epoch <= epoch):
            known.want(replace(known.spec, desired=DesiredState.REMOVED))

    def listed(self, epochs: Mapping[str, int]) -> set[str]:
        """The list of assignments is complete: what is not on it, or on it under a later epoch, is ended. The uids of
        what has to end."""
        stale = {uid for uid, s in self._sandboxes.items() if s.has_begun and s.spec.epoch < epochs.get(uid, 1 << 63)}
        for uid in set(self._sandboxes) - set(epochs):
            self.unassign(uid)
        for uid in stale & set(epochs):
            self.unassign(uid, epochs[uid] - 1)
        return stale

    async def until_ended(self, uids: set[str]) -> None:
        """Returns when nothing of the present epochs of these runs any more. Bound it with a timeout."""
        for uid in uids:
            known = self._sandboxes.get(uid)
            if known is not None:
                await known.wait_for(lambda record: record.phase in ENDED)

    def knows(self, uid: str) -> bool:
        """Whether this host holds anything for it."""
        return uid in self._sandboxes

    # For service and ledger.

    def find(self, uid: str) -> Sandbox:
        """The sandbox. SandboxGone when there is none."""
        if uid not in self._sandboxes:
            raise SandboxGone(f"no sandbox {uid} on this host")
        return self._sandboxes[uid]

    def all(self) -> list[Sandbox]:
        """Every sandbox that this host holds anything for."""
        return list(self._sandboxes.values())

    def live_resources(self, *, but: str = "") -> list[Resources]:
        """What running and starting sandboxes are guaranteed."""
        holding = [s for s in self.all() if s.record.phase in HOLDS_MEMORY and s.spec.uid != but]
        return [s.spec.resources if s.cooperative else with_max(s.spec.resources) for s in holding]

    def held_resources(self, *, but: str = "") -> list[Resources]:
        """What is promised on this host: to sandboxes, and to the members of pools."""
        return [*self.live_resources(but=but), *self.pools.held()]

    def starting(self) -> int:
        """How many sandboxes are being started."""
        return sum(1 for s in self.all() if s.record.phase is Phase.STARTING)

    # What a sandbox and the pools ask of their host (hostd.sandbox.Host, hostd.pools.PoolHost).

    async def take_image(self, spec: SandboxSpec) -> ImageInUse:
        """Its layers, verified and pinned; fetched first from another host, where there is one that has them."""
        try:
            ready = await asyncio.to_thread(images.take, self.store, spec)
        except ImageMissing:
            if self.fetch is None:
                raise
            told = functools.partial(self._tell_of, spec.name)
            await self.fetch(spec.tenant, spec.image_digest, told)
            ready = await asyncio.to_thread(images.take, self.store, spec)
        return ImageInUse(ready.layers, ready.config)

    async def take_layers(self, spec: SandboxSpec, about: CheckpointAbout) -> tuple[LayerFile, ...]:
        """A checkpoint's, verified and pinned for a sandbox that is restored from it."""
        names = [(layer.digest, layer.volume_uuid) for layer in about.layers]
        return await asyncio.to_thread(images.take_layers, self.store, spec, names)

    async def release_image(self, uid: str) -> None:
        """Unpins them."""
        await asyncio.to_thread(images.release, self.store, uid)

    def admit(self, spec: SandboxSpec, holds_mib: int = 0) -> None:
        """ShortOfResources when it must not start now. `holds_mib` is what it holds from its first moment on."""
        admit(self.host_now(), self.held_resources(but=spec.uid), spec.resources, holds_mib=holds_mib)

    async def admitted(self, spec: SandboxSpec, holds_mib: int = 0) -> None:
        """Returns when it may start, the broker making room meanwhile. ShortOfResources, also after a while."""
        await self._arrivals.admitted(spec, holds_mib, self.broker, self.admit)

    def host_now(self) -> HostNow:
        """The host's memory and disk at this moment."""
        memory, disk = self.broker.host_memory(), shutil.disk_usage(self.config.state_dir)
        return HostNow(
            memory.total_mib,
            memory.available_mib,
            self.config.memory_reserve_mib,
            disk.free >> 20,
            self.config.disk_reserve_mib,
            self.broker.closed,
        )

    # What the broker asks, and what a sandbox asks of it.

    def governed(self) -> list[Sandbox]:
        """Those whose memory can be moved now."""
        return [sandbox for sandbox in self.all() if sandbox.engine is not None]

    def promised_elsewhere_mib(self) -> int:
        """Guarantees and overhead of what the broker does not move: pools' members, and what starts, parks or ends."""
        holding = [s for s in self.all() if s.record.phase in HOLDS_MEMORY and s.engine is None]
        return reserved_mib([*(s.spec.resources for s in holding), *self.pools.held()])

    def arriving_mib(self) -> int:
        """What those need that wait for room to start."""
        return self._arrivals.need_mib()

    def resident_mib(self, uid: str) -> int:
        """What the host has really given a sandbox, beside its overhead; 0 when that is not known."""
        known = self._sandboxes.get(uid)
        if self._cgroups is None or known is None:
            return 0
        seat = seat_of(uid, known.folder, known.record.handle).name
        return max(0, (self._cgroups.usage_bytes(seat) >> 20) - GUEST_OVERHEAD_MIB)

    def host_event(self, reason: str, message: str) -> None:
        """Puts something about the host itself into the event log."""
        log.info("%s: %s", reason, message)
        self._happened(Happened(self.config.host, reason, message, self.now_s(), kind="host"))

    def claim_vm_uid(self) -> int:
        """A uid of its own for a VM: the lowest that no sandbox here has."""
        for uid in range(FIRST_VM_UID, LAST_VM_UID + 1):
            if uid not in self._claimed:
                self._claimed.add(uid)
                return uid
        raise HostdError(f"all VM uids {FIRST_VM_UID}-{LAST_VM_UID} are taken: remove ended sandboxes")

    def release_vm_uid(self, vm_uid: int) -> None:
        """Nothing runs as it any more."""
        self._claimed.discard(vm_uid)

    def take_member(self, spec: SandboxSpec) -> Taken | None:
        """A warm guest for the sandbox, if a pool has one that fits."""
        return self.pools.take(spec)

    async def end_member(self, taken: Taken) -> None:
        """It is not needed after all."""
        await self.pools.end(taken)

    def start_slot(self) -> asyncio.Semaphore:
        """Starts are CPU-bound: more at once than this only makes all of them slower."""
        return self._slots

    def changed(self, sandbox: Sandbox, *, removed: bool = False) -> None:
        """Tells the control plane, and forgets a removed one."""
        if removed:
            self._sandboxes.pop(sandbox.spec.uid, None)
            if sandbox.record.vm_uid is not None:
                self._claimed.discard(sandbox.record.vm_uid)
            if self._succeed(sandbox.spec.uid):
                return
        self._report(Report(sandbox.record, sandbox.resize, removed))
        self.pools.poke()

    def _succeed(self, uid: str) -> bool:
        """Lets the same sandbox begin under a later epoch, if it is to; then nobody is told that the older one went."""
        spec = self._successors.pop(uid, None)
        if spec is None or spec.desired is DesiredState.REMOVED:
            return False
        record = Record(spec)
        self.journal.write(record)
        self._begin(record)
        self._report(Report(record, None))
        return True

    def _tell_of(self, name: str, reason: str, message: str) -> None:
        self._happened(Happened(name, reason, message, self.now_s()))

    def event(self, sandbox: Sandbox, reason: str, message: str) -> None:
        """Puts it into the event log."""
        self._happened(Happened(sandbox.spec.name, reason, message, self.now_s()))

    def pool_event(self, name: str, reason: str, message: str) -> None:
        """The same, of a pool."""
        self._happened(Happened(name, reason, message, self.now_s(), kind="pool"))
