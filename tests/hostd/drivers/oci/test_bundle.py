"""What a bundle says, as values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hostd.drivers.oci.bundle import CAPABILITIES, BundleShape, config_json, process_json, seccomp_profile
from hostd.drivers.oci.users import Identity
from hostd.spec import Command

COMMAND = Command(("ls", "-l"), (("PATH", "/bin"), ("A", "b=c")), "/srv", "", False, False, 24, 80)
ROOT = Identity(0, 0)
SHAPE = BundleShape(Path("/run/x/rootfs"), "box", init=("/proc/self/fd/3", "init", "--"), machine="x86_64")


def actions(machine: str = "x86_64") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule in seccomp_profile(machine)["syscalls"]:
        for name in rule["names"]:
            found.setdefault(name, []).append(rule["action"] + ("?" if rule.get("args") else ""))
    return found


def test_the_command_stands_behind_its_init() -> None:
    config = config_json(COMMAND, ROOT, SHAPE)
    assert config["process"]["args"] == ["/proc/self/fd/3", "init", "--", "ls", "-l"]
    assert config["process"]["env"] == ["PATH=/bin", "A=b=c"]
    assert (config["process"]["cwd"], config["hostname"], config["root"]["path"]) == ("/srv", "box", "/run/x/rootfs")
    json.dumps(config)


def test_no_workload_makes_devices_or_gains_privileges() -> None:
    process = process_json(COMMAND, ROOT)
    assert "CAP_MKNOD" not in CAPABILITIES
    assert "CAP_SYS_ADMIN" not in CAPABILITIES
    assert process["noNewPrivileges"] is True
    assert "inheritable" not in process["capabilities"]


def test_who_is_not_root_has_no_usable_capability() -> None:
    capabilities = process_json(COMMAND, Identity(1000, 1000, (27,)))["capabilities"]
    assert capabilities["effective"] == capabilities["permitted"] == []
    assert capabilities["bounding"] == list(CAPABILITIES)


def test_the_host_s_limit_of_descriptors_is_kept() -> None:
    limits = process_json(COMMAND, ROOT, open_files=512)["rlimits"]
    assert {"type": "RLIMIT_NOFILE", "hard": 512, "soft": 512} in limits
    assert {"type": "RLIMIT_CORE", "hard": 0, "soft": 0} in limits


def test_a_terminal_has_its_size() -> None:
    process = process_json(replace(COMMAND, tty=True, rows=30, cols=99), ROOT)
    assert process["terminal"] is True
    assert process["consoleSize"] == {"height": 30, "width": 99}


def test_its_own_namespaces_and_no_network() -> None:
    namespaces = config_json(COMMAND, ROOT, SHAPE)["linux"]["namespaces"]
    assert {"type": "network"} in namespaces
    assert {one["type"] for one in namespaces} == {"pid", "ipc", "uts", "mount", "cgroup", "network"}
    given = config_json(COMMAND, ROOT, replace(SHAPE, netns=Path("/run/netns/a")))["linux"]["namespaces"]
    assert {"type": "network", "path": "/run/netns/a"} in given


def test_sys_is_read_only_and_kcore_masked() -> None:
    config = config_json(COMMAND, ROOT, SHAPE)
    sys_mount = next(mount for mount in config["mounts"] if mount["destination"] == "/sys")
    assert "ro" in sys_mount["options"]
    assert "/proc/kcore" in config["linux"]["maskedPaths"]
    assert "/proc/sys" in config["linux"]["readonlyPaths"]


def test_the_filter_allows_work_and_refuses_the_host() -> None:
    found = actions()
    for name in ("read", "openat", "execve", "futex", "mmap", "epoll_wait", "getrandom"):
        assert found[name] == ["SCMP_ACT_ALLOW"]
    for name in ("mount", "unshare", "setns", "bpf", "keyctl", "init_module", "io_uring_setup", "open_by_handle_at"):
        assert found[name] == ["SCMP_ACT_ERRNO"]
    assert found["clone"] == ["SCMP_ACT_ALLOW?"]
    assert found["clone3"] == ["SCMP_ACT_ERRNO"]
    assert found["socket"] == ["SCMP_ACT_ALLOW?"]


def test_no_call_is_both_allowed_and_refused() -> None:
    assert [name for name, what in actions().items() if len(what) != len(set(what)) and name != "personality"] == []
    assert [name for name, what in actions().items() if len(set(what)) > 1] == []


def test_a_machine_without_a_list_of_architectures_is_filtered_for_itself() -> None:
    assert "architectures" not in seccomp_profile("riscv64")
    assert "SCMP_ARCH_X86" in seccomp_profile("x86_64")["architectures"]


def test_the_user_space_kernel_has_its_own_filter() -> None:
    assert "seccomp" not in config_json(COMMAND, ROOT, replace(SHAPE, machine=""))["linux"]
