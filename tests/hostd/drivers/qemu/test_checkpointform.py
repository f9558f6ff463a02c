"""What a checkpoint is restored as: from a handle, through JSON, to a command line with everything in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.drivers.contract import LayerFile, StartPlan
from hostd.drivers.qemu.checkpointform import GuestForm, restored_shape
from hostd.drivers.qemu.command import RamFile, hot_plugs, qemu_argv
from hostd.drivers.qemu.plan import GuestKernel
from hostd.errors import CannotCheckpoint, CheckpointUnusable
from hostd.journal import Handle
from tests.contract.driver_suite import spec_of

HANDLE = Handle(1, 2, 3, "tcg", 148, 876, 2, device_mib=900, plugged=True)
FORM = GuestForm("tcg", 2, 148, 900, 876, True, "QEMU 7.2", "tcg max")
KERNEL = GuestKernel("6.1", "sha256:k", "sha256:i", Path("/k"), Path("/i"), 900)
LAYERS = tuple(LayerFile(Path(f"/store/{n}/blob"), 2 << 20, bytes([n]) * 16, 900) for n in range(10))
PLAN = StartPlan(spec_of("f-1"), (*LAYERS, LAYERS[0]), 7, Path("/run/s/f-1"))


def test_a_form_goes_through_json() -> None:
    assert GuestForm.of(HANDLE, "QEMU 7.2", "tcg max") == FORM
    assert GuestForm.parse(FORM.encode()) == FORM
    assert FORM.memory.region_mib == 1024


def test_a_guest_of_an_older_hostd_is_refused() -> None:
    with pytest.raises(CannotCheckpoint, match="start it anew"):
        GuestForm.of(Handle(1, 2, 3, "tcg", 148, 876, 2), "q", "c")
    assert GuestForm.of(Handle(1, 2, 3, "tcg", 148, 0, 2), "q", "c").device_mib == 0


@pytest.mark.parametrize("change", [{"vcpus": "2"}, {"vcpus": True}, {"plugged": 1}, {"more": 1}])
def test_a_form_of_another_version_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointUnusable, match="not of this version"):
        GuestForm.parse({**FORM.encode(), **change})


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (("kvm", "QEMU 7.2", "tcg max"), "accelerator 'tcg', this host has 'kvm'"),
        (("tcg", "QEMU 9", "tcg max"), "QEMU 'QEMU 7.2', this host has 'QEMU 9'"),
        (("tcg", "QEMU 7.2", "other"), "CPU 'tcg max'"),
    ],
)
def test_another_host_is_refused_by_what_it_lacks(here: tuple[str, str, str], words: str) -> None:
    FORM.require("tcg", "QEMU 7.2", "tcg max")
    with pytest.raises(CheckpointUnusable, match=words):
        FORM.require(*here)


def argv_of(form: GuestForm) -> list[str]:
    elastic = RamFile(11, private=True) if form.device_mib else None
    return qemu_argv(restored_shape(form, PLAN, KERNEL, RamFile(10, private=True), elastic))


def test_memory_is_mapped_privately_and_nothing_boots() -> None:
    argv = argv_of(FORM)
    assert argv[argv.index("-m") + 1].startswith("148M,")
    assert "memory-backend-file,id=ram0,size=148M,mem-path=/proc/self/fd/10,share=off" in argv
    assert "memory-backend-file,id=vm0,size=1024M,mem-path=/proc/self/fd/11,share=off,reserve=off" in argv
    assert argv[-2:] == ["-incoming", "defer"] and "-kernel" not in argv


def test_plugged_layers_stand_where_hot_plug_put_them() -> None:
    argv = argv_of(FORM)
    devices = [word for word in argv if word.startswith("virtio-pmem-pci")]
    plugs = [plug.device for plug in hot_plugs(LAYERS)]
    assert len(devices) == len(plugs) == len(LAYERS)
    for word, plug in zip(devices, plugs, strict=True):
        assert f"id={plug['id']},memdev={plug['memdev']},bus={plug['bus']},addr={plug['addr']},multifunction=on" in word
    backends = [word for word in argv if word.startswith("memory-backend-file,id=layer")]
    assert all(word.endswith("share=on,readonly=on") for word in backends)
    assert sum(word.startswith("pcie-root-port") for word in argv) == 2


def test_layers_of_a_cold_boot_stand_in_slots() -> None:
    cold = GuestForm("tcg", 2, 148, 0, 0, False, "q", "c")
    argv = argv_of(cold)
    assert any("addr=0x4.0" in word for word in argv) and not any("hotplug" in word for word in argv)
    assert not any("virtio-mem" in word for word in argv)
