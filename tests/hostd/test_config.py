"""hostd's configuration file: strict, and every complaint names file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.config import Config, load
from hostd.errors import ConfigError

GOOD = """
host = "host-1"
state_dir = "/var/lib/s"
run_dir = "/run/s"
listen = "127.0.0.1:0"
controlplane = "cp.example:7000"
tls_ca = "/etc/s/ca.crt"
tls_cert = "/etc/s/host.crt"
tls_key = "/etc/s/host.key"
"""


def parse(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "hostd.toml"
    path.write_text(text)
    return load(path)


def test_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    config = parse(tmp_path, GOOD)
    assert (config.host, config.run_dir, config.driver, config.accel) == ("host-1", Path("/run/s"), "qemu", "auto")
    more = parse(tmp_path, GOOD + 'driver = "fake"\naccel = "tcg"\nboot_deadline_s = 60\nmemory_reserve_mib = 0\n')
    assert (more.driver, more.accel, more.boot_deadline_s, more.memory_reserve_mib) == ("fake", "tcg", 60.0, 0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('acell = "tcg"', "unknown key 'acell'"),
        ('accel = "warp"', "auto, kvm, tcg"),
        ('driver = "xen"', "qemu, fake"),
        ("accel = 7", "accel = 7 is not a valid str"),
        ("memory_reserve_mib = -1", "memory_reserve_mib = -1"),
        ("memory_reserve_mib = true", "memory_reserve_mib = True"),
        ('boot_deadline_s = "long"', "boot_deadline_s"),
        ("boot_deadline_s = 0", "outside 0..3600"),
        ("boot_deadline_s = nan", "outside 0..3600"),
        ("[section]", "unknown key 'section'"),
        ("= 3", "is not TOML"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, GOOD + line + "\n")
    assert complaint in str(error.value)
    assert "hostd.toml" in str(error.value)


@pytest.mark.parametrize("key", ["host", "state_dir", "tls_key", "controlplane"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse(tmp_path, "\n".join(line for line in GOOD.splitlines() if not line.startswith(key + " ")))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("host", "", "no name for a host"), ("host", "Host_1", "no name for a host"), ("listen", "7000", "HOST:PORT"),
        ("controlplane", "cp.example", "HOST:PORT"), ("run_dir", "/" + "x" * 80, "too long for unix sockets"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(tmp_path: Path, key: str, value: str, complaint: str) -> None:
    lines = [f'{key} = "{value}"' if line.startswith(key + " ") else line for line in GOOD.splitlines()]
    with pytest.raises(ConfigError, match=complaint):
        parse(tmp_path, "\n".join(lines))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml")


def test_labels_and_taints_are_checked_one_by_one(tmp_path: Path) -> None:
    config = parse(tmp_path, GOOD + 'labels = ["zone=eu", "ssd"]\ntaints = ["gpu=a100"]\n')
    assert (config.labels, config.taints) == (("zone=eu", "ssd"), ("gpu=a100",))
    for wrong in ('["zone="]', '["=x"]', '["a b"]', '"zone=eu"', "[1]"):
        with pytest.raises(ConfigError, match="labels"):
            parse(tmp_path, GOOD + f"labels = {wrong}\n")


def test_a_reserve_leaves_something_for_sandboxes(tmp_path: Path) -> None:
    config = parse(tmp_path, GOOD + "memory_reserve_mib = 4096\n")
    config.require_room(4097)
    with pytest.raises(ConfigError, match="memory_reserve_mib 4096 is not below this host's memory, 4096 MiB"):
        config.require_room(4096)
