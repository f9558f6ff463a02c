"""Which driver this host runs, made ready: what the configuration asks for, and what the host can do.

Beside guests it runs whichever OCI classes work here; why one does not is in the log and in the error of who asks.
The guest-kernel driver needs cgroups, a guest kernel in the store and an accelerator's verdict, all of which may take
seconds the first time; the fake driver needs nothing.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from hostd import guestkernel
from hostd.cgroups import Hierarchy
from hostd.config import Config
from hostd.drivers.byclass import ByClass
from hostd.drivers.contract import Driver
from hostd.drivers.fake import FakeDriver
from hostd.drivers.oci import probe
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.oci.network import Links
from hostd.drivers.onecopy import OneCopy
from hostd.drivers.qemu.accel import TCG_NOTE, cpu_identity, decide, qemu_version
from hostd.drivers.qemu.cloning import Cloner
from hostd.drivers.qemu.command import MAX_LAYERS, GuestShape
from hostd.drivers.qemu.driver import QemuDriver
from hostd.drivers.qemu.plan import GuestKernel
from hostd.drivers.qemu.template import GuestIdentity
from hostd.drivers.qemu.templates import Tell, Templates
from hostd.drivers.qemu.vmm import Vmms
from hostd.memory import elasticfile
from hostd.spec import MIN_BASE_RAM_MIB, MemoryShape, SandboxClass
from sharedcache.store import Store

log = logging.getLogger("sandloom.hostd.drivers")


@dataclass(frozen=True)
class Chosen:
    """A driver and what the host tells of it."""

    driver: Driver
    accel: str
    why: str
    isolation_note: str = ""
    guest_kernel_version: str = ""
    qemu_version: str = ""
    cgroup_version: str = ""
    elastic_memory: str = ""  # what it stands on
    classes: tuple[SandboxClass, ...] = (SandboxClass.GUEST_KERNEL,)
    cgroups: Hierarchy | None = None
    pmem_slots: int = 0  # layers that one guest can have; 0: no bound


FAKE_NOTE = "the fake driver runs nothing: sandboxes exist in memory only"


async def choose(config: Config, store: Store, tell: Tell, stack: AsyncExitStack) -> Chosen:
    """The configured driver; what it owns is closed by `stack`. `tell` takes what it has for the event log.

    ConfigError, KernelMissing and AgentMissing say what the host lacks."""
    if config.driver == "fake":
        return Chosen(FakeDriver(), "fake", "configured", isolation_note=FAKE_NOTE)
    return await _qemu(config, store, tell, stack)


async def _qemu(config: Config, store: Store, tell: Tell, stack: AsyncExitStack) -> Chosen:
    cgroups = Hierarchy.probe(name=config.cgroup)
    await asyncio.to_thread(cgroups.prepare)
    stack.callback(cgroups.retire)
    await asyncio.to_thread(cgroups.limit_total, config.memory_budget_mib << 20)
    kernel = await asyncio.to_thread(guestkernel.prepare, store, config.state_dir, config.cache_dir)
    layers = Layers(config.mounts_dir)
    verdict, (oci_drivers, missing) = await asyncio.gather(
        decide(config.accel, _probe_shape(kernel), kernel.version, config.cache_dir), _oci(config, layers, cgroups)
    )
    templates = await stack.enter_async_context(Templates(store, tell))
    version = await asyncio.to_thread(qemu_version)
    identity = GuestIdentity(kernel.digest, kernel.initrd_digest, version, cpu_identity(verdict.accel))
    kernel = replace(kernel, init_on_alloc=config.init_on_alloc == "on")
    backing = await asyncio.to_thread(elasticfile.probe)
    if config.elastic_pages == "small":
        backing = elasticfile.Backing(False, "configured")
    log.info("elastic memory is on %s", backing)
    vmms = Vmms(cgroups, config.boot_deadline_s, huge=backing.huge)
    cloner = Cloner(templates, kernel, identity, verdict.accel, vmms, config.run_dir)
    await asyncio.to_thread(cloner.sweep)
    qemu = QemuDriver(
        kernel, verdict.accel, cgroups, boot_deadline_s=config.boot_deadline_s, cloner=cloner, huge=backing.huge
    )
    one_copy = await stack.enter_async_context(OneCopy(layers)) if oci_drivers else None
    driver = ByClass({SandboxClass.GUEST_KERNEL: qemu, **oci_drivers}, missing, one_copy)
    return Chosen(
        driver,
        classes=tuple(driver.drivers),
        accel=verdict.accel,
        why=verdict.why,
        isolation_note=TCG_NOTE if verdict.accel == "tcg" else "",
        guest_kernel_version=kernel.version,
        qemu_version=version,
        cgroup_version=f"v{cgroups.version}",
        elastic_memory=str(backing),
        cgroups=cgroups,
        pmem_slots=MAX_LAYERS,
    )


async def _oci(
    config: Config, layers: Layers, cgroups: Hierarchy
) -> tuple[dict[SandboxClass, Driver], dict[SandboxClass, str]]:
    """Drivers of the OCI classes that work here, and why the others do not. Their mounts are below the state directory:
    the run directory holds sandboxes only."""
    drivers: dict[SandboxClass, Driver] = {}
    missing: dict[SandboxClass, str] = {}
    links = Links(config.network_cidr, config.network_nat)
    for one, name in ((SandboxClass.USER_KERNEL, "runsc"), (SandboxClass.HOST_KERNEL, "crun")):
        runtime, why = await probe.decide(name, cgroups, config.cache_dir)
        log.info("class %s: %s", one.value, why)
        if runtime is None:
            missing[one] = why
        else:
            drivers[one] = OciDriver(runtime, layers, cgroups, links=links)
    return drivers, missing


def _probe_shape(kernel: GuestKernel) -> GuestShape:
    memory = MemoryShape(MIN_BASE_RAM_MIB, 0)
    return GuestShape("probe", Path("/nonexistent"), kernel.vmlinuz, kernel.initrd, "kvm", 1, memory)
