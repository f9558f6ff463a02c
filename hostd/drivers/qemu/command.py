"""QEMU's command line, as a pure function of what the guest shall be.

The machine is q35 without what no guest of ours uses. Facts behind the options (measured on QEMU 7.2):
- microvm would boot faster but has no memory devices, so no virtio-pmem and no virtio-mem.
- `mem-merge=off`: QEMU offers its guests' memory to KSM unless told otherwise, which whoever turns KSM on after hostd
  looked would merge across sharing domains.
- `swiotlb=noforce` saves 64 MB a guest when maxmem is above 4 GiB.
- `tb-size=32` bounds TCG's translations, which take what they need (QEMU's own choice is an eighth of RAM). A
  warm guest has 19 MB of them when it is claimed: at 16 its claim flushed them, and cost twice as much.
- layers are `share=on,readonly=on`: without readonly a guest's raw write changes the host's file (or, with
  share=off, its own copy); with it the write is dropped.
- the guest's console goes to a ring buffer of 64 KiB in QEMU, so that no guest can fill the host's disk with it.
- `memhp_default_state=online_movable`: what was plugged can only be unplugged again while it holds movable pages.
- `no_timer_check`: at boot Linux waits ms for timer interrupts, and panics ("IO-APIC + timer doesn't work!") where
  QEMU got no CPU meanwhile: one boot of 24 on a machine with a load of 9 a CPU. It knows by itself on KVM only.
- pmem devices sit eight to a slot (multifunction), so that images of more than 100 layers fit.
- vCPUs can be hot-plugged up to maxcpus; each possible one costs the guest some 200 KB of base RAM.
- elastic memory is a file of hostd's own (hostd/memory/elasticfile.py). `align=2M`: without it a guest's faults on a
  file of huge pages stay 4 KiB.
- `init_on_alloc=0` is the operator's choice: Debian's kernel clears each page that it gives out, the balloon's too.
- a clone needs neither kernel nor initrd: what it boots from is in its template's memory. Leaving them out saves the
  14 MB that QEMU keeps of them in its heap.
- a clone's base RAM is a private mapping (share=off) of the template's sealed memfd, opened by /proc/self/fd/N, which
  QEMU inherits. No device that discards base RAM may ever be given to it: it would punch the shared file.
- a restored guest's elastic memory is a private mapping of its checkpoint's sealed memfd likewise. virtio-mem does
  discard; sandloom-nopunch (src/nopunch.c) turns its punching into nothing, and what remains (MADV_DONTNEED) drops
  the guest's own pages only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guestagent.messages import MAX_LAYERS as AGENT_MAX_LAYERS
from hostd.drivers.contract import LayerFile
from hostd.errors import InvalidSpec
from hostd.spec import BLOCK_MIB, MemoryShape

HOTPLUG_SLOT = 1
HOTPLUG_ROOM_MIB = 16 << 10
"""Guest-physical address space for layers to come; it costs neither host nor guest memory."""

FIRST_LAYER_SLOT = 4
LAST_LAYER_SLOT = 30  # 31 is q35's own ICH9
FUNCTIONS = 8
MAX_LAYERS = min(AGENT_MAX_LAYERS, (LAST_LAYER_SLOT - FIRST_LAYER_SLOT + 1) * FUNCTIONS)
CONSOLE_BYTES = 65536
SERVICES_SOCKET = "services.sock"
KERNEL_COMMAND_LINE = (
    "console=ttyS0 panic=-1 quiet swiotlb=noforce psi=1 memhp_default_state=online_movable no_timer_check"
)


@dataclass(frozen=True)
class RamFile:
    """Base or elastic RAM in an inherited file: shared where the guest's writes go into it, private for what clones and
    forks share."""

    descriptor: int
    private: bool
    huge: bool = False  # the file is of huge pages: only an aligned mapping of it is


@dataclass(frozen=True)
class GuestShape:
    """Everything that decides a guest's command line."""

    uid: str
    folder: Path
    kernel: Path
    initrd: Path
    accel: str  # kvm or tcg
    vcpus: int
    memory: MemoryShape
    layers: tuple[LayerFile, ...] = ()
    layers_as: str = "pmem"  # or "blk": virtio-blk, the peer that benchmarks measure us against
    ram: RamFile | None = None  # None: a memfd of its own
    elastic: RamFile | None = None  # of a restored guest: its checkpoint's
    hotplug_ports: int = 0  # each takes FUNCTIONS layers while the guest runs
    plugged: tuple[LayerFile, ...] = ()  # of a restored guest: layers that stand in those ports already
    restored: bool = False  # waits for a device state instead of booting
    init_on_alloc: bool = True  # the guest kernel clears each page that it gives out
    max_vcpus: int = 0  # room for vCPUs to be hot-plugged; 0: none
    plugged_vcpus: int = 0  # of a restored guest: so many were hot-plugged

    @property
    def qmp_path(self) -> Path:
        """QEMU's control socket."""
        return self.folder / "qmp.sock"

    @property
    def agent_path(self) -> Path:
        """The host's end of the agent's port."""
        return self.folder / "agent.sock"

    @property
    def services_path(self) -> Path:
        """The host's end of the services port."""
        return self.folder / SERVICES_SOCKET


def qemu_argv(shape: GuestShape, binary: str = "qemu-system-x86_64") -> list[str]:
    """The whole command line. InvalidSpec when there are more layers than slots."""
    if len(shape.layers) > MAX_LAYERS:
        raise InvalidSpec(f"the image has {len(shape.layers)} layers; a guest takes {MAX_LAYERS}: squash some")
    start = ["-incoming", "defer"] if shape.restored else _kernel(shape)
    ports = _hotplug_ports(shape.hotplug_ports)
    plugged = _plugged(shape.plugged)
    devices = [*_control(shape), *ports, *_layers(shape), *plugged, *_vcpus(shape)]
    return [binary, *_machine(shape), *_memory(shape), *devices, *start]


def _machine(shape: GuestShape) -> list[str]:
    accel = "kvm" if shape.accel == "kvm" else "tcg,tb-size=32"
    return [
        "-name", f"sandloom-{shape.uid},debug-threads=on",
        "-M", "q35,sata=off,usb=off,smbus=off,vmport=off,hpet=off,mem-merge=off,memory-backend=ram0",
        "-accel", accel,
        "-cpu", "host" if shape.accel == "kvm" else "max",
        "-smp", f"{shape.vcpus},maxcpus={max(shape.vcpus, shape.max_vcpus)}",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]  # fmt: skip


def _memory(shape: GuestShape) -> list[str]:
    base, elastic = shape.memory.base_mib, shape.memory.region_mib
    # Device memory starts above RAM and each device is aligned in it; QEMU wants maxmem to hold them all.
    layers_mib = sum((layer.size_bytes >> 20) + 2 for layer in shape.layers)
    max_mib = base + elastic + layers_mib + (HOTPLUG_ROOM_MIB if shape.hotplug_ports else 0) + 1024
    argv = [
        "-m", f"{base}M,slots=4,maxmem={max_mib}M",
        "-object", _base_ram(shape),
    ]  # fmt: skip
    if elastic:
        argv += [
            "-object", _elastic_ram(shape, elastic),
            "-device", f"virtio-mem-pci,id=vmem0,memdev=vm0,requested-size=0,block-size={BLOCK_MIB}M,addr=3",
        ]  # fmt: skip
    return argv


def _base_ram(shape: GuestShape) -> str:
    if shape.ram is None:
        return f"memory-backend-memfd,id=ram0,size={shape.memory.base_mib}M,share=on"
    path, share = f"/proc/self/fd/{shape.ram.descriptor}", "off" if shape.ram.private else "on"
    return f"memory-backend-file,id=ram0,size={shape.memory.base_mib}M,mem-path={path},share={share}"


def _elastic_ram(shape: GuestShape, size_mib: int) -> str:
    if shape.elastic is None:
        return f"memory-backend-memfd,id=vm0,size={size_mib}M,share=on,reserve=off"
    path, share = f"/proc/self/fd/{shape.elastic.descriptor}", "off" if shape.elastic.private else "on"
    align = f",align={BLOCK_MIB}M" if shape.elastic.huge else ""
    return f"memory-backend-file,id=vm0,size={size_mib}M,mem-path={path},share={share},reserve=off{align}"


def _hotplug_ports(count: int) -> list[str]:
    argv: list[str] = []
    for index in range(count):
        address = f"addr={HOTPLUG_SLOT:#x}.{index}" + (",multifunction=on" if index == 0 else "")
        argv += ["-device", f"pcie-root-port,id=hotplug{index},chassis={index + 1},slot={index + 1},{address}"]
    return argv


@dataclass(frozen=True)
class HotPlug:
    """One layer's arguments to QMP's object-add and device_add."""

    backend: dict[str, object]
    device: dict[str, object]


def hot_plugs(layers: tuple[LayerFile, ...]) -> list[HotPlug]:
    """What plugs `layers` into a running guest, in the order to do it.

    Function 0 of a port comes last: it makes the guest look at the whole port at once (QEMU's docs/pcie.txt)."""
    plugs: list[HotPlug] = []
    for index, layer in enumerate(layers):
        port, function = divmod(index, FUNCTIONS)
        backend: dict[str, object] = {
            "qom-type": "memory-backend-file", "id": f"layer{index}", "mem-path": str(layer.path),
            "size": layer.size_bytes, "share": True, "readonly": True,
        }  # fmt: skip
        device: dict[str, object] = {
            "driver": "virtio-pmem-pci", "id": f"pmem{index}", "memdev": f"layer{index}",
            "bus": f"hotplug{port}", "addr": f"0.{function:x}", "multifunction": True,
        }  # fmt: skip
        plugs.append(HotPlug(backend, device))
    ports = [plugs[start : start + FUNCTIONS] for start in range(0, len(plugs), FUNCTIONS)]
    return [plug for port_plugs in ports for plug in reversed(port_plugs)]


def _vcpus(shape: GuestShape) -> list[str]:
    """vCPUs that were hot-plugged into a restored guest's source, with the ids and places that they have there."""
    driver = "host-x86_64-cpu" if shape.accel == "kvm" else "max-x86_64-cpu"
    argv: list[str] = []
    for core in range(shape.vcpus, shape.vcpus + shape.plugged_vcpus):
        argv += ["-device", f"{driver},id=vcpu{core},socket-id=0,core-id={core},thread-id=0"]
    return argv


def _plugged(layers: tuple[LayerFile, ...]) -> list[str]:
    """What hot_plugs() plugs, as options: a restored guest has it from the start, in the same order, so that the same
    device gets the same address."""
    argv: list[str] = []
    for plug in hot_plugs(layers):
        argv += ["-object", _option("qom-type", plug.backend), "-device", _option("driver", plug.device)]
    return argv


def _option(first: str, values: dict[str, object]) -> str:
    rest = {key: value for key, value in values.items() if key != first}
    return ",".join([str(values[first]), *(f"{key}={_word(value)}" for key, value in rest.items())])


def _word(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value).replace(",", ",,")


def _control(shape: GuestShape) -> list[str]:
    return [
        "-chardev", f"socket,id=qmp0,path={_quoted(shape.qmp_path)},server=on,wait=off",
        "-mon", "chardev=qmp0,mode=control",
        "-chardev", f"ringbuf,id=console0,size={CONSOLE_BYTES}",
        "-serial", "chardev:console0",
        "-device", "virtio-serial-pci,id=serial0,max_ports=3,addr=2",
        "-chardev", f"socket,id=agent0,path={_quoted(shape.agent_path)},server=on,wait=off",
        "-device", "virtserialport,bus=serial0.0,nr=1,chardev=agent0,name=sandloom.agent",
        "-chardev", f"socket,id=services0,path={_quoted(shape.services_path)},server=on,wait=off",
        "-device", "virtserialport,bus=serial0.0,nr=2,chardev=services0,name=sandloom.services",
    ]  # fmt: skip


def _layers(shape: GuestShape) -> list[str]:
    argv: list[str] = []
    for index, layer in enumerate(shape.layers):
        slot, function = FIRST_LAYER_SLOT + index // FUNCTIONS, index % FUNCTIONS
        address = f"addr={slot:#x}.{function}" + (",multifunction=on" if function == 0 else "")
        if shape.layers_as == "pmem":
            argv += [
                "-object",
                f"memory-backend-file,id=layer{index},mem-path={_quoted(layer.path)},size={layer.size_bytes},"
                "share=on,readonly=on",
                "-device", f"virtio-pmem-pci,id=pmem{index},memdev=layer{index},{address}",
            ]  # fmt: skip
        else:
            argv += [
                "-drive", f"if=none,id=layer{index},file={_quoted(layer.path)},format=raw,readonly=on",
                "-device", f"virtio-blk-pci,drive=layer{index},{address}",
            ]  # fmt: skip
    return argv


def _quoted(path: Path) -> str:
    """A path inside one of QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


def _kernel(shape: GuestShape) -> list[str]:
    words = KERNEL_COMMAND_LINE + ("" if shape.init_on_alloc else " init_on_alloc=0")
    return ["-kernel", str(shape.kernel), "-initrd", str(shape.initrd), "-append", words]


def launcher_argv(
    argv: list[str], *, uid: int, gids: list[int], cgroup_procs: list[Path], through: tuple[str, ...] = ()
) -> list[str]:
    """`argv` wrapped so that the process joins its cgroups while root, then loses root for good.

    One pid through all of it (each step execs the next): sh joins, `through` does what it does as root still,
    setpriv(1) drops."""
    join = "".join('echo $$ > "$%d"; ' % (n + 1) for n in range(len(cgroup_procs)))  # noqa: UP031
    groups = ",".join(map(str, gids))
    return [
        "/bin/sh", "-ec", f"{join}shift {len(cgroup_procs)}; ulimit -c 0; exec \"$@\"", "sandloom-vmm",
        *map(str, cgroup_procs),
        *through,
        "setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={groups}" if gids else "--clear-groups",
        "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--",
        *argv,
    ]  # fmt: skip
