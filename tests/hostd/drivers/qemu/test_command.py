"""QEMU's command line, word by word: what a guest may touch is decided here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hostd.drivers.contract import LayerFile
from hostd.drivers.qemu.command import MAX_LAYERS, GuestShape, RamFile, launcher_argv, qemu_argv
from hostd.errors import InvalidSpec
from hostd.spec import MemoryShape

SHAPE = GuestShape(
    "u-1", Path("/run/s/u-1"), Path("/k"), Path("/i"), "tcg", 2, MemoryShape(148, 876),
    (LayerFile(Path("/store/a/blob"), 4 << 20, b"a" * 16, 900),),
)  # fmt: skip


def test_the_whole_line() -> None:
    assert qemu_argv(SHAPE) == [
        "qemu-system-x86_64",
        "-name", "sandloom-u-1,debug-threads=on",
        "-M", "q35,sata=off,usb=off,smbus=off,vmport=off,hpet=off,mem-merge=off,memory-backend=ram0",
        "-accel", "tcg,tb-size=32",
        "-cpu", "max",
        "-smp", "2,maxcpus=2",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-m", "148M,slots=4,maxmem=2074M",
        "-object", "memory-backend-memfd,id=ram0,size=148M,share=on",
        "-object", "memory-backend-memfd,id=vm0,size=896M,share=on,reserve=off",
        "-device", "virtio-mem-pci,id=vmem0,memdev=vm0,requested-size=0,block-size=2M,addr=3",
        "-chardev", "socket,id=qmp0,path=/run/s/u-1/qmp.sock,server=on,wait=off",
        "-mon", "chardev=qmp0,mode=control",
        "-chardev", "ringbuf,id=console0,size=65536",
        "-serial", "chardev:console0",
        "-device", "virtio-serial-pci,id=serial0,max_ports=3,addr=2",
        "-chardev", "socket,id=agent0,path=/run/s/u-1/agent.sock,server=on,wait=off",
        "-device", "virtserialport,bus=serial0.0,nr=1,chardev=agent0,name=sandloom.agent",
        "-chardev", "socket,id=services0,path=/run/s/u-1/services.sock,server=on,wait=off",
        "-device", "virtserialport,bus=serial0.0,nr=2,chardev=services0,name=sandloom.services",
        "-object", "memory-backend-file,id=layer0,mem-path=/store/a/blob,size=4194304,share=on,readonly=on",
        "-device", "virtio-pmem-pci,id=pmem0,memdev=layer0,addr=0x4.0,multifunction=on",
        "-kernel", "/k", "-initrd", "/i",
        "-append",
        "console=ttyS0 panic=-1 quiet swiotlb=noforce psi=1 memhp_default_state=online_movable no_timer_check",
    ]  # fmt: skip


def test_every_layer_is_read_only_and_has_an_address_of_its_own() -> None:
    layers = tuple(LayerFile(Path(f"/l{n}"), 2 << 20, bytes([n]) * 16, 900) for n in range(MAX_LAYERS))
    argv = qemu_argv(replace(SHAPE, layers=layers))
    backends = [word for word in argv if word.startswith("memory-backend-file,id=layer")]
    assert len(backends) == MAX_LAYERS
    assert all(word.endswith("share=on,readonly=on") for word in backends)
    addresses = [word.split("addr=")[1].split(",")[0] for word in argv if word.startswith("virtio-pmem-pci")]
    assert len(set(addresses)) == MAX_LAYERS
    with pytest.raises(InvalidSpec, match="squash"):
        qemu_argv(replace(SHAPE, layers=(*layers, replace(layers[0], volume_uuid=b"x" * 16))))


def test_the_benchmarks_peer_has_its_layers_as_read_only_disks() -> None:
    argv = qemu_argv(replace(SHAPE, layers_as="blk"))
    assert "if=none,id=layer0,file=/store/a/blob,format=raw,readonly=on" in argv
    assert not any("pmem" in word for word in argv)


def test_a_comma_in_a_path_adds_no_option() -> None:
    layer = replace(SHAPE.layers[0], path=Path("/a,readonly=off/blob"))
    argv = qemu_argv(replace(SHAPE, layers=(layer,), folder=Path("/r,server=off")))
    assert any("mem-path=/a,,readonly=off/blob,size=" in word for word in argv)
    assert "socket,id=qmp0,path=/r,,server=off/qmp.sock,server=on,wait=off" in argv


def test_kvm_has_the_hosts_cpu_and_no_elastic_memory_is_no_device() -> None:
    argv = qemu_argv(replace(SHAPE, accel="kvm", memory=MemoryShape(256, 0)))
    assert argv[argv.index("-accel") + 1] == "kvm"
    assert argv[argv.index("-cpu") + 1] == "host"
    assert not any("virtio-mem" in word for word in argv)


def test_the_launcher_joins_cgroups_as_root_and_drops_everything() -> None:
    argv = launcher_argv(["q", "-x"], uid=7, gids=[8, 9], cgroup_procs=[Path("/c/m/procs"), Path("/c/p/procs")])
    assert argv == [
        "/bin/sh", "-ec",
        'echo $$ > "$1"; echo $$ > "$2"; shift 2; ulimit -c 0; exec "$@"',
        "sandloom-vmm", "/c/m/procs", "/c/p/procs",
        "setpriv", "--reuid=7", "--regid=7", "--groups=8,9",
        "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--",
        "q", "-x",
    ]  # fmt: skip
    assert "--clear-groups" in launcher_argv(["q"], uid=7, gids=[], cgroup_procs=[])
    through = launcher_argv(["q"], uid=7, gids=[], cgroup_procs=[], through=("/nopunch",))
    assert through.index("/nopunch") == through.index("setpriv") - 1  # while root: a VM's uid may not reach the file


def test_elastic_memory_is_a_file_of_hostds_own_mapped_where_it_can_be_huge() -> None:
    for huge, align in ((True, ",align=2M"), (False, "")):
        argv = qemu_argv(replace(SHAPE, elastic=RamFile(9, private=False, huge=huge)))
        options = f"memory-backend-file,id=vm0,size={SHAPE.memory.region_mib}M,mem-path=/proc/self/fd/9"
        assert f"{options},share=on,reserve=off{align}" in argv


def test_room_for_vcpus_and_those_that_a_copy_has_already() -> None:
    argv = qemu_argv(replace(SHAPE, vcpus=1, max_vcpus=4, plugged_vcpus=2, accel="tcg"))
    assert "1,maxcpus=4" in argv
    vcpus = [word for word in argv if "x86_64-cpu" in word]
    assert vcpus == [f"max-x86_64-cpu,id=vcpu{core},socket-id=0,core-id={core},thread-id=0" for core in (1, 2)]


def test_the_operator_chooses_whether_a_guest_clears_its_pages() -> None:
    assert "init_on_alloc" not in " ".join(qemu_argv(SHAPE))
    argv = qemu_argv(replace(SHAPE, init_on_alloc=False))
    assert argv[argv.index("-append") + 1].endswith(" init_on_alloc=0")
