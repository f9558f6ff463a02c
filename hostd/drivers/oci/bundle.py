"""An OCI bundle's config.json and an exec's process.json, as pure functions of what shall run.

The set of capabilities, masked paths and devices is docker's, less CAP_MKNOD: no workload makes device nodes. What the
fields mean is said by the OCI runtime specification 1.0.2 (config.md, config-linux.md); the seccomp allow-list beside
this file is the one that docker and podman share, less what only a privileged process needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hostd.drivers.oci.users import Identity
from hostd.services.notified import NotifiedCall
from hostd.spec import Command

CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip
MASKED_PATHS = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware", "/sys/fs/selinux",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
OPEN_FILES = 65536
SHM_BYTES = 64 << 20
TTY_GID = 5

CLONE_NEW_FLAGS = 0x7E020000
"""CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET of clone(2)."""

AF_VSOCK, AF_END = 40, 46
ENOSYS, EPERM = 38, 1
SECCOMP_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}


@dataclass(frozen=True)
class Notify:
    """Who answers which calls: the runtime takes each filter's listener to the socket `listener`."""

    listener: Path
    calls: tuple[NotifiedCall, ...]
    flags: tuple[str, ...] = ()  # of seccomp(2), as this host's runtime knows them


@dataclass(frozen=True)
class BundleShape:
    """What a container is, beside its command. `init` stands before the command; `machine` is uname's, for seccomp
    ("" leaves the filter out: the user-space kernel has its own)."""

    rootfs: Path
    hostname: str
    init: tuple[str, ...] = ()
    machine: str = ""
    cgroup_namespace: bool = True
    netns: Path | None = None  # None: a new one with lo only
    open_files: int = OPEN_FILES
    notify: Notify | None = None  # needs `machine`
    root_hook: Path | None = None  # a program that takes away what crun gives the root: devices of the image, setuid


def process_json(
    command: Command, identity: Identity, *, init: tuple[str, ...] = (), open_files: int = OPEN_FILES
) -> dict[str, Any]:
    """The process object; `open_files` is how many descriptors it may have, at most what this host allows. A user other
    than root gets no capability that it could use, as with docker."""
    usable = list(CAPABILITIES) if identity.uid == 0 else []
    process: dict[str, Any] = {
        "terminal": command.tty,
        "user": {"uid": identity.uid, "gid": identity.gid, "additionalGids": list(identity.groups)},
        "args": [*init, *command.argv],
        "env": [f"{key}={value}" for key, value in command.env],
        "cwd": command.workdir or "/",
        "capabilities": {"bounding": list(CAPABILITIES), "effective": usable, "permitted": usable},
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "hard": open_files, "soft": open_files},
            {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
        ],
        "noNewPrivileges": True,
    }
    if command.tty:
        process["consoleSize"] = {"height": command.rows, "width": command.cols}
    return process


def _mount(target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": list(options)}


def mounts() -> list[dict[str, Any]]:
    """What every container sees beside its root: proc, a minimal /dev, shared memory, a read-only /sys."""
    return [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"gid={TTY_GID}"),
        _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", f"size={SHM_BYTES >> 10}k"),
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]


def _namespaces(shape: BundleShape) -> list[dict[str, str]]:
    kinds = ["pid", "ipc", "uts", "mount", *(["cgroup"] if shape.cgroup_namespace else [])]
    network = {"type": "network", **({"path": str(shape.netns)} if shape.netns else {})}
    return [*({"type": kind} for kind in kinds), network]


def config_json(command: Command, identity: Identity, shape: BundleShape) -> dict[str, Any]:
    """All of config.json."""
    linux: dict[str, Any] = {
        "namespaces": _namespaces(shape),
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READONLY_PATHS),
        "rootfsPropagation": "private",
    }
    if shape.machine:
        linux["seccomp"] = seccomp_profile(shape.machine, shape.notify)
    hook = shape.root_hook
    hooks = [{"path": str(hook), "args": [hook.name, "nodev", str(shape.rootfs)]}] if hook else []
    return {
        "ociVersion": "1.0.2",
        "process": process_json(command, identity, init=shape.init, open_files=shape.open_files),
        "root": {"path": str(shape.rootfs), "readonly": False},
        "hostname": shape.hostname,
        "mounts": mounts(),
        "hooks": {"createContainer": hooks},
        "linux": linux,
    }


def moved_config(config: Mapping[str, Any], rootfs: Path, netns: Path | None = None) -> dict[str, Any]:
    """A container's configuration for another one that goes on from it. Pure."""
    linux = dict(config["linux"])
    others = [one for one in linux["namespaces"] if one["type"] != "network"]
    linux["namespaces"] = [*others, {"type": "network", **({"path": str(netns)} if netns else {})}]
    return {**config, "root": {**config["root"], "path": str(rootfs)}, "linux": linux}


@cache
def _syscalls() -> tuple[tuple[str, ...], tuple[str, ...]]:
    lists = json.loads((Path(__file__).parent / "seccomp.json").read_text(encoding="utf-8"))
    return tuple(lists["allow"]), tuple(lists["eperm"])


@cache
def seccomp_profile(machine: str, notify: Notify | None = None) -> dict[str, Any]:
    """The default filter: what is not on the list is ENOSYS, so that programs fall back; what is known to be refused is
    EPERM. clone(2) must not make namespaces, and clone3(2), whose flags a filter cannot read, is ENOSYS.

    With `notify` its calls are a supervisor's, and calls by other numbers than this machine's own (32-bit, x32) end the
    caller by SIGSYS, which is what libseccomp has for architectures that are not named: they could go around it."""
    allow, refused = _syscalls()
    calls = notify.calls if notify else ()
    served = {call.name for call in calls if call.argument is None}
    no_namespaces = {"index": 0, "value": CLONE_NEW_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    profile: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "syscalls": [
            {"names": [name for name in allow if name not in served], "action": "SCMP_ACT_ALLOW"},
            {"names": list(refused), "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [no_namespaces]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
            *_socket_rules(calls),
            *(_rule("personality", "SCMP_ACT_ALLOW", 0, value) for value in (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)),
            *({"names": [name], "action": "SCMP_ACT_NOTIFY"} for name in sorted(served)),
        ],
    }
    if machine in SECCOMP_ARCHITECTURES:
        profile["architectures"] = list(SECCOMP_ARCHITECTURES[machine][: 1 if notify else None])
    if notify and calls:
        profile["listenerPath"] = str(notify.listener)
        profile["flags"] = list(notify.flags)
    return profile


def _rule(name: str, action: str, index: int, value: int, op: str = "SCMP_CMP_EQ") -> dict[str, Any]:
    return {"names": [name], "action": action, "args": [{"index": index, "value": value, "op": op}]}


def _socket_rules(calls: tuple[NotifiedCall, ...]) -> list[dict[str, Any]]:
    """socket(2) by its family. Rules that overlap have no order in libseccomp: where some families are served, the
    others are allowed one by one. ValueError for another call that is served by an argument: there is no such rule."""
    by_argument = [call for call in calls if call.argument is not None]
    if not by_argument:
        return [_rule("socket", "SCMP_ACT_ALLOW", 0, AF_VSOCK, "SCMP_CMP_NE")]
    if any((call.name, call.argument) != ("socket", 0) for call in by_argument):
        raise ValueError(f"no rule for {by_argument}")
    served = {call.value for call in by_argument}
    open_to_all = [family for family in range(AF_END) if family not in served | {AF_VSOCK}]
    return [
        *(_rule("socket", "SCMP_ACT_NOTIFY", 0, family) for family in sorted(served)),
        *(_rule("socket", "SCMP_ACT_ALLOW", 0, family) for family in open_to_all),
    ]
