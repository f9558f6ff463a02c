"""What a checkpoint's guest must be restored as: values, and the command line's shape that follows from them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from hostd.drivers.contract import StartPlan
from hostd.drivers.qemu.command import GuestShape, RamFile
from hostd.drivers.qemu.plan import HOTPLUG_PORTS, GuestKernel, unique_layers
from hostd.errors import CannotCheckpoint, CheckpointUnusable
from hostd.journal import Handle
from hostd.spec import MemoryShape

_TYPES = {"str": str, "int": int, "bool": bool}


@dataclass(frozen=True)
class GuestForm:
    """What a QEMU must look like, and be, to take a checkpoint's state."""

    accel: str
    vcpus: int
    base_mib: int
    device_mib: int  # the elastic device's size; elastic_mib of it may be used
    elastic_mib: int
    plugged: bool  # layers stand in hot-plug ports instead of slots
    qemu: str
    cpu: str
    max_vcpus: int = 0
    plugged_vcpus: int = 0  # were hot-plugged

    @classmethod
    def of(cls, handle: Handle, qemu: str, cpu: str, plugged_vcpus: int = 0) -> GuestForm:
        """A running guest's. CannotCheckpoint when its handle does not say enough."""
        if handle.elastic_mib and not handle.device_mib:
            raise CannotCheckpoint("it was started by a hostd that could not checkpoint: start it anew")
        return cls(
            handle.accel,
            handle.vcpus,
            handle.base_mib,
            handle.device_mib,
            handle.elastic_mib,
            handle.plugged,
            qemu,
            cpu,
            handle.max_vcpus,
            plugged_vcpus,
        )

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> GuestForm:
        """CheckpointUnusable when a value is missing, mistyped or unknown."""
        types = {field.name: _TYPES[str(field.type)] for field in fields(cls)}
        values = {"max_vcpus": 0, "plugged_vcpus": 0, **values}  # a form of before vCPUs could be plugged has none
        if values.keys() != types.keys() or any(type(values[name]) is not kind for name, kind in types.items()):
            raise CheckpointUnusable("a checkpoint's form is not of this version; make it anew")
        return cls(**values)  # type: ignore[arg-type]

    def encode(self) -> dict[str, object]:
        """Plain JSON."""
        return asdict(self)

    @property
    def memory(self) -> MemoryShape:
        """RAM and the elastic device as QEMU has them."""
        return MemoryShape(self.base_mib, self.device_mib)

    def require(self, accel: str, qemu: str, cpu: str) -> None:
        """CheckpointUnusable unless this host's QEMU and CPU are what the state was saved from."""
        made_by = {"accelerator": self.accel, "QEMU": self.qemu, "CPU": self.cpu}
        here = {"accelerator": accel, "QEMU": qemu, "CPU": cpu}
        for what, theirs in made_by.items():
            if theirs != here[what]:
                raise CheckpointUnusable(f"the checkpoint is of {what} {theirs!r}, this host has {here[what]!r}")


def restored_shape(
    form: GuestForm, plan: StartPlan, kernel: GuestKernel, ram: RamFile, elastic: RamFile | None
) -> GuestShape:
    """The QEMU that takes the checkpoint's state: the devices of the one that saved it, in the same places."""
    layers = unique_layers(plan.layers)
    shape = GuestShape(
        uid=plan.spec.uid,
        folder=plan.folder,
        kernel=kernel.vmlinuz,
        initrd=kernel.initrd,
        accel=form.accel,
        vcpus=form.vcpus,
        max_vcpus=form.max_vcpus,
        plugged_vcpus=form.plugged_vcpus,
        memory=form.memory,
        ram=ram,
        elastic=elastic,
        restored=True,
    )
    if form.plugged:
        return replace(shape, hotplug_ports=HOTPLUG_PORTS, plugged=layers)
    return replace(shape, layers=layers)
