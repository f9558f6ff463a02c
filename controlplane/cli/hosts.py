"""`sandloom hosts`: the machines that sandboxes run on."""

from __future__ import annotations

from controlplane.api.v1 import hosts_pb2, sandboxes_pb2
from controlplane.cli import sizes
from controlplane.cli.command import Command, Shell, add_output
from controlplane.cli.devup import list_hosts
from controlplane.cli.output import Column, plain

Host = hosts_pb2.Host
STATE_COLOURS = {
    hosts_pb2.READY: "green",
    hosts_pb2.LOST: "red",
    hosts_pb2.CORDONED: "yellow",
    hosts_pb2.DRAINING: "yellow",
    hosts_pb2.DRAINED: "yellow",
}


def state_text(host: Host) -> str:
    """`ready`, `cordoned`, `draining`, `drained`, `lost`."""
    return hosts_pb2.HostState.Name(host.state).lower().removeprefix("host_state_")


def _mib(size_mib: int) -> str:
    return sizes.format_bytes(size_mib << 20)


def columns(now_s: float) -> tuple[Column[Host], ...]:
    """The columns of `hosts`."""
    return (
        Column("NAME", lambda row: row.name),
        Column("STATE", state_text, colour=lambda row: STATE_COLOURS.get(row.state, "")),
        Column("ACCEL", lambda row: row.accel),
        Column("SANDBOXES", lambda row: str(row.sandboxes), right=True),
        Column("MEMORY", lambda row: _mib(row.capacity.memory_mib), right=True),
        Column("AVAILABLE", lambda row: _mib(row.capacity.memory_available_mib), right=True),
        Column("RESERVED", lambda row: _mib(row.capacity.memory_reserved_mib), right=True),
        Column("CPUS", lambda row: sizes.format_cpus(row.capacity.cpu_milli), right=True),
        Column("SEEN", lambda row: sizes.format_age(now_s - row.last_seen.ToNanoseconds() / 1e9), right=True),
        Column("DISK FREE", lambda row: _mib(row.capacity.disk_free_mib), wide=True, right=True),
        Column("CLASSES", lambda row: ",".join(map(_class, row.classes)), wide=True),
        Column("KERNEL", lambda row: row.kernel_version, wide=True),
        Column("GUEST KERNEL", lambda row: row.guest_kernel_version, wide=True),
        Column("QEMU", lambda row: row.qemu_version, wide=True),
        Column("ELASTIC MEMORY", lambda row: row.elastic_memory, wide=True),
        Column("CGROUPS", lambda row: row.cgroup_version, wide=True),
        Column("ADDRESS", lambda row: row.runtime_address, wide=True),
        Column("FEATURES", lambda row: ",".join(row.kernel_features), wide=True),
        Column("NOTE", lambda row: row.isolation_note, wide=True),
    )


def _class(number: sandboxes_pb2.SandboxClass.ValueType) -> str:
    return sandboxes_pb2.SandboxClass.Name(number).lower().replace("_", "-")


def act(options: None, shell: Shell) -> int:
    rows = shell.over(list_hosts)
    shell.printer.listing(rows, columns(shell.now_s()), name=lambda row: row.name, data=plain)
    if not rows and shell.printer.form in ("table", "wide"):
        shell.say("no host has reported itself yet; `sandloom dev status` shows whether one runs here")
    return 0


COMMAND = Command(
    words=("hosts",),
    summary="list hosts and what they have",
    configure=add_output,
    parse=lambda ns: None,
    act=act,
    examples=("sandloom hosts", "sandloom hosts -o wide"),
)
LS = Command(
    words=("hosts", "ls"),
    summary="the same",
    configure=add_output,
    parse=lambda ns: None,
    act=act,
    examples=("sandloom hosts ls",),
)
