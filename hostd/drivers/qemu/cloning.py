"""From a plan to a running guest by way of a template: makes templates, and clones guests from them.

A clone's start: QEMU with the template's sealed RAM mapped privately → its device state → (generic template: the
image's layers by hot-plug) → run → the agent answers. Everything that must differ between clones (entropy, machine id,
clock, hostname) comes with CONFIGURE, before any process of the tenant's exists.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from guestagent.messages import Prepare
from hostd.agentlink import AgentLink
from hostd.cgroups import Limits
from hostd.drivers.contract import StartPlan
from hostd.drivers.qemu import snapshot, templateblob
from hostd.drivers.qemu.command import GuestShape, RamFile, hot_plugs
from hostd.drivers.qemu.plan import (
    LAYER_DEADLINE_MS,
    VM_OVERHEAD_MIB,
    VM_PIDS,
    GuestKernel,
    clone_memory,
    key_of,
    lacking_template,
    limits_for,
    template_shape,
    unique_layers,
)
from hostd.drivers.qemu.template import Candidates, Choice, GuestIdentity, Origin, choose
from hostd.drivers.qemu.templateblob import FrozenGuest, TemplateMemory
from hostd.drivers.qemu.templates import Templates
from hostd.drivers.qemu.vmm import Launch, Vmm, Vmms
from hostd.images import domain_of
from hostd.journal import Handle
from hostd.removal import remove_folder
from hostd.tasks import to_its_end

TEMPLATE_VM_UID = 199_999
"""Below the uids of sandboxes: at most one guest that is no sandbox runs at a time."""

CLONES_A_CPU = 2
"""So many clones at once come up on each CPU; the others wait their turn. Coming up is all computing (QEMU's start,
TCG's translations): more at once only makes all of them late, while by turns the first of a herd are there at once."""


@dataclass(frozen=True)
class Fitting:
    """The templates that one plan's guest could come from, with their shapes."""

    candidates: Candidates
    image: GuestShape | None
    generic: GuestShape | None


@dataclass(frozen=True)
class Started:
    """A clone whose agent answered, and the seconds that each phase took."""

    handle: Handle
    vmm: Vmm
    link: AgentLink
    phases: tuple[tuple[str, float], ...]


class Cloner:
    """Stateless but for the book of templates that it is given."""

    def __init__(
        self,
        templates: Templates,
        kernel: GuestKernel,
        identity: GuestIdentity,
        accel: str,
        vmms: Vmms,
        run_dir: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.templates, self._kernel, self._identity, self._accel = templates, kernel, identity, accel
        self._vmms, self._run_dir, self._clock = vmms, run_dir, clock
        self._turns = asyncio.Semaphore(CLONES_A_CPU * len(os.sched_getaffinity(0)))

    def fitting(self, plan: StartPlan) -> Fitting:
        """Which templates would do for `plan`."""
        domain = str(domain_of(plan.spec.tenant))
        shapes = [
            template_shape(plan, self._kernel, self._accel, with_image=with_image) for with_image in (True, False)
        ]
        image_key, generic_key = (key_of(shape, self._identity, domain) if shape else "" for shape in shapes)
        return Fitting(Candidates(image_key, generic_key, lacking_template(plan)), *shapes)

    def choose(self, plan: StartPlan) -> tuple[Fitting, Choice]:
        """What `plan` is started from now. Has templates made that it would rather be started from."""
        fitting = self.fitting(plan)
        hot = self.templates.note_start(plan.spec.image_digest)
        if not plan.spec.cold:
            if fitting.generic is not None:
                self._want(plan, fitting.candidates.generic_key, fitting.generic, "generic")
            if fitting.image is not None and (hot or fitting.generic is None):
                self._want(plan, fitting.candidates.image_key, fitting.image, f"image {plan.spec.image_digest[:19]}")
        return fitting, choose(fitting.candidates, self.templates.ready(), cold=plan.spec.cold)

    async def wait(self, plan: StartPlan, fitting: Fitting, choice: Choice) -> Choice:
        """What `plan` is started from once the template that it awaits is there, or could not be made."""
        await self.templates.until_made(choice.awaits)
        return choose(fitting.candidates, self.templates.ready(), cold=plan.spec.cold)

    def want_image(self, plan: StartPlan, fitting: Fitting) -> None:
        """Has the image's template made, however seldom it is started: a pool wants it."""
        if fitting.image is not None:
            self._want(plan, fitting.candidates.image_key, fitting.image, f"image {plan.spec.image_digest[:19]}")

    def _want(self, plan: StartPlan, key: str, shape: GuestShape, name: str) -> None:
        memory = f"{shape.memory.ceiling_mib} MiB at most"
        self.templates.want(
            key,
            domain_of(plan.spec.tenant),
            f"{name}, {memory}, {shape.vcpus} vCPU",
            lambda: self._freeze(key, shape),
            lambda made: self._verify(key, shape, made),
        )

    # Making.

    def _prefix(self) -> str:
        """Begins the names of this hostd's guests that are no sandboxes; the machine may have several hostds."""
        return f"template-{hashlib.sha256(str(self._run_dir).encode()).hexdigest()[:8]}-"

    def sweep(self) -> None:
        """Ends what a former hostd left when it died while making a template. Blocks; before anything is made."""
        for uid in self._vmms.cgroups.names(self._prefix()):
            self._vmms.cgroups.remove(uid)
        for folder in self._run_dir.glob(f"{self._prefix()}*"):
            remove_folder(folder)

    def _launch_for(self, key: str, shape: GuestShape) -> Launch:
        uid = f"{self._prefix()}{key[:16]}"
        named = replace(shape, uid=uid, folder=self._run_dir / uid)
        limits = Limits((shape.memory.base_mib + VM_OVERHEAD_MIB) << 20, 1000 * shape.vcpus, VM_PIDS)
        gids = tuple({self._kernel.gid, *(layer.gid for layer in shape.layers)})
        return Launch(named, TEMPLATE_VM_UID, gids, limits)

    async def _freeze(self, key: str, shape: GuestShape) -> FrozenGuest:
        """Boots the template, waits for its agent and freezes it."""
        ram_bytes = shape.memory.base_mib << 20
        ram_fd = templateblob.new_ram(ram_bytes)
        try:
            launch = self._launch_for(key, shape)
            boots = replace(launch.shape, ram=RamFile(ram_fd, private=False))
            state = await self._boot_and_save(replace(launch, shape=boots, inherit=(ram_fd,)))
        except BaseException:
            FrozenGuest(ram_fd, ram_bytes, b"").__exit__()
            raise
        return FrozenGuest(ram_fd, ram_bytes, state)

    async def _boot_and_save(self, launch: Launch) -> bytes:
        shape = launch.shape
        await self._vmms.destroy(shape.uid, shape.folder, None)  # a former hostd may have died while making it
        async with AsyncExitStack() as stack:
            handle = await self._fork(launch, stack)
            vmm = await self._vmms.reach(shape, handle, stack)
            link = await self._vmms.reach_agent(shape, vmm, stack)
            if shape.layers:
                layers = tuple(layer.volume_uuid for layer in shape.layers)
                await link.prepare(Prepare(layers, LAYER_DEADLINE_MS))
            await link.close()  # the guest sees its host hang up, and is at a frame's boundary
            return await snapshot.save_state(vmm.control)

    async def _fork(self, launch: Launch, stack: AsyncExitStack) -> Handle:
        """Starts QEMU; `stack` destroys it."""
        forked = asyncio.ensure_future(asyncio.to_thread(self._vmms.fork, launch))
        stack.push_async_callback(lambda: to_its_end(self._vmms.undo(launch.shape, forked)))
        return await asyncio.shield(forked)

    async def _verify(self, key: str, shape: GuestShape, memory: TemplateMemory) -> None:
        async with AsyncExitStack() as stack:
            state_fd = stack.enter_context(memory.state_reader())
            restored = _restored(self._launch_for(key, shape), memory, state_fd)
            handle = await self._fork(restored, stack)
            vmm = await self._vmms.reach(restored.shape, handle, stack)
            await snapshot.load_state(vmm.control, state_fd, gone=vmm.process.gone)
            await vmm.control.execute("cont")
            await self._vmms.reach_agent(restored.shape, vmm, stack, at_boundary=True)

    # Cloning.

    async def clone(
        self, plan: StartPlan, shape: GuestShape, choice: Choice, made: Callable[[Handle], None], stack: AsyncExitStack
    ) -> Started:
        """A clone for `plan` whose agent answered; what is open is closed by `stack`. On any error nothing of the
        clone is left. TemplateUnusable, StartFailed."""
        begin_s = self._clock()
        async with self._turns:
            return await self._clone(begin_s, plan, shape, choice, made, stack)

    async def _clone(
        self,
        begin_s: float,
        plan: StartPlan,
        shape: GuestShape,
        choice: Choice,
        made: Callable[[Handle], None],
        stack: AsyncExitStack,
    ) -> Started:
        memory = await self.templates.take(choice.key)
        with memory, memory.state_reader() as state_fd:
            launch = _restored(self._launch(plan, shape), memory, state_fd)
            forked = asyncio.ensure_future(asyncio.to_thread(self._vmms.fork, launch))
            try:
                raw = await asyncio.shield(forked)
                usable = clone_memory(shape.memory, plan.spec.resources)
                handle = replace(raw, elastic_mib=usable.elastic_mib, template=choice.key)
                made(handle)
                vmm = await self._vmms.reach(launch.shape, handle, stack)
                vmm_s = self._clock()
                await snapshot.load_state(vmm.control, state_fd, gone=vmm.process.gone)
                link, restored_s = await self._wake(plan, launch.shape, choice.origin, vmm, stack)
            except BaseException:
                self.templates.give(choice.key)
                await to_its_end(self._vmms.undo(launch.shape, forked))
                raise
        times = (("vmm", vmm_s - begin_s), ("restore", restored_s - vmm_s), ("answer", self._clock() - restored_s))
        return Started(handle, vmm, link, times)

    async def _wake(
        self, plan: StartPlan, shape: GuestShape, origin: Origin, vmm: Vmm, stack: AsyncExitStack
    ) -> tuple[AgentLink, float]:
        """Plugs what is missing and lets the guest run: its agent's link, and when it was let run."""
        if origin is Origin.GENERIC:
            for plug in hot_plugs(unique_layers(plan.layers)):
                await vmm.control.execute("object-add", **plug.backend)
                await vmm.control.execute("device_add", **plug.device)
        await vmm.control.execute("cont")
        running_s = self._clock()
        return await self._vmms.reach_agent(shape, vmm, stack, at_boundary=True), running_s

    def _launch(self, plan: StartPlan, shape: GuestShape) -> Launch:
        named = replace(shape, uid=plan.spec.uid, folder=plan.folder)
        gids = tuple({self._kernel.gid, *(layer.gid for layer in plan.layers)})
        return Launch(named, plan.vm_uid, gids, limits_for(plan.spec.resources))


def _restored(launch: Launch, memory: TemplateMemory, state_fd: int) -> Launch:
    shape = replace(launch.shape, ram=RamFile(memory.ram_fd, private=True), restored=True)
    return replace(launch, shape=shape, inherit=(memory.ram_fd, state_fd))
