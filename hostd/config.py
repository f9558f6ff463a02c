"""hostd's configuration file (TOML), parsed once, strictly: an unknown key is an error that names it.

host, state_dir, run_dir, listen, controlplane, tls_ca, tls_cert, tls_key     required
driver = "qemu" | "fake"            fake: sandboxes that exist in memory only (hostd/drivers/fake.py)
accel = "auto" | "kvm" | "tcg"      memory_reserve_mib   disk_reserve_mib
cache_dir                           packages and probe verdicts, shared by all hostds of a machine
cgroup = "sandloom"                 the folder for its sandboxes' cgroups; hostds of one machine have one each
scrub_interval_s                    how often every blob in the store is hashed again
labels = ["zone=eu", "ssd"]         what sandboxes' affinity and spread go by: KEY or KEY=VALUE
taints = ["gpu"]                    what keeps away every sandbox that does not tolerate it
network_cidr = "10.213.0.0/16"      addresses of sandboxes with a link to this host (IPv4)
network_nat = false                 whether they reach beyond it under the host's own address
elastic_pages = "auto" | "small"    what elastic memory stands on: huge pages where this host can, or 4 KiB ones
init_on_alloc = "on" | "off"        whether guest kernels clear each page they give out (Debian's default); off makes
                                    taking memory back some 20 times as fast under TCG
registries = ["r.example:5000"]     the registries that images are pulled from; none unless named, "*" is any
plain_registries                    those of them whose TLS is not verified, or that have none
registry_auth_dir                   a folder of TENANT.json: what registries know each tenant by, as `skopeo login
                                    --authfile` writes it; readable by root only. Without one, pulls are anonymous
boot_deadline_s                     how long a guest may take to its agent's first answer
memory_broker = "on" | "off"        off: a resize gets what it asks for, and nothing else moves (hostd/memory/broker.py)
memory_budget_mib                   what all sandboxes may use together, as a hard limit too; 0: all the host has
memory_sense_s                      how often the broker looks at the host and its guests
memory_overcommit_percent           how much of what is allocated and idle may be promised to others
memory_headroom_percent             what a sandbox should have free, of what it uses
memory_park_after_s, memory_evict_after_s    how long the host may be short before a sandbox is parked, or evicted
memory_follow_s                     how long a guest may keep what it calls idle before it loses its credit
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from controlplane.api.identity import NAME_PATTERN
from hostd.cgroups import SLICE
from hostd.errors import ConfigError
from hostd.memory.broker import Rules

DRIVERS = ("qemu", "fake")
ACCELS = ("auto", "kvm", "tcg")
MOST_PREFIX_BITS = 24
ELASTIC_PAGES = ("auto", "small")
SWITCH = ("on", "off")
_CGROUP = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_PAIR = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?(=[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:]+):[0-9]{1,5}")


@dataclass(frozen=True)
class Config:
    """All a hostd needs to know before it starts."""

    host: str
    state_dir: Path
    run_dir: Path
    listen: str
    controlplane: str
    tls_ca: Path
    tls_cert: Path
    tls_key: Path
    driver: str = "qemu"
    accel: str = "auto"
    memory_reserve_mib: int = 512
    disk_reserve_mib: int = 512
    cache_dir: Path = Path("/var/cache/sandloom")
    cgroup: str = SLICE
    boot_deadline_s: float = 120.0
    scrub_interval_s: float = 86_400.0
    registries: tuple[str, ...] = ()
    plain_registries: tuple[str, ...] = ()
    registry_auth_dir: Path | None = None
    labels: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()
    network_cidr: str = "10.213.0.0/16"
    network_nat: bool = False
    elastic_pages: str = "auto"
    init_on_alloc: str = "on"
    memory_broker: str = "on"
    memory_budget_mib: int = 0
    memory_sense_s: float = 0.5
    memory_overcommit_percent: int = 50
    memory_headroom_percent: int = 10
    memory_park_after_s: float = 10.0
    memory_evict_after_s: float = 30.0
    memory_follow_s: float = 30.0

    @property
    def mounts_dir(self) -> Path:
        """Where layers are mounted for OCI sandboxes (hostd/drivers/oci/mounts.py)."""
        return self.state_dir / "mounts"

    def __post_init__(self) -> None:
        chosen = (
            ("driver", self.driver, DRIVERS),
            ("accel", self.accel, ACCELS),
            ("elastic_pages", self.elastic_pages, ELASTIC_PAGES),
            ("init_on_alloc", self.init_on_alloc, SWITCH),
            ("memory_broker", self.memory_broker, SWITCH),
        )
        for key, value, choices in chosen:
            if value not in choices:
                raise ConfigError(f"{key} {value!r}: choose one of {', '.join(choices)}")
        if not NAME_PATTERN.fullmatch(self.host):
            raise ConfigError(f"host {self.host!r} is no name for a host: use a-z, 0-9 and dashes, at most 63")
        if not _CGROUP.fullmatch(self.cgroup):
            raise ConfigError(f"cgroup {self.cgroup!r}: use a-z, 0-9, dashes and dots, at most 64")
        for key, address in (("listen", self.listen), ("controlplane", self.controlplane)):
            if not _ADDRESS.fullmatch(address):
                raise ConfigError(f"{key} {address!r} is not HOST:PORT")
        for key, texts in (("labels", self.labels), ("taints", self.taints)):
            for text in texts:
                if not _PAIR.fullmatch(text):
                    raise ConfigError(f"{key}: {text!r} is neither KEY nor KEY=VALUE of letters, digits and . _ - /")
        try:
            if IPv4Network(self.network_cidr).prefixlen > MOST_PREFIX_BITS:
                raise ValueError(f"at most /{MOST_PREFIX_BITS}: each sandbox gets an address")
        except ValueError as error:
            raise ConfigError(f"network_cidr {self.network_cidr!r}: {error}") from error
        if self.scrub_interval_s < 60:
            raise ConfigError(f"scrub_interval_s {self.scrub_interval_s} is below 60 seconds")
        if not 0 < self.boot_deadline_s <= 3600:
            raise ConfigError(f"boot_deadline_s {self.boot_deadline_s} is outside 0..3600 seconds")
        self._require_memory()
        # 107 bytes is all a unix socket's path may have (unix(7)); the longest is RUN/UID/agent.sock.
        if len(str(self.run_dir)) > 107 - 40:
            raise ConfigError(f"run_dir {self.run_dir} is too long for unix sockets below it: 67 bytes at most")

    def memory_rules(self, overhead_mib: int) -> Rules:
        """What the broker goes by."""
        return Rules(
            reserve_mib=self.memory_reserve_mib,
            overhead_mib=overhead_mib,
            overcommit_percent=self.memory_overcommit_percent,
            headroom_percent=self.memory_headroom_percent,
            park_after_s=self.memory_park_after_s,
            evict_after_s=self.memory_evict_after_s,
            follow_s=self.memory_follow_s,
        )

    def require_room(self, total_mib: int) -> None:
        """ConfigError when the reserve leaves sandboxes nothing of a host of `total_mib`."""
        if self.memory_reserve_mib >= total_mib:
            raise ConfigError(
                f"memory_reserve_mib {self.memory_reserve_mib} is not below this host's memory, {total_mib} MiB:"
                " nothing would be left for sandboxes"
            )

    def _require_memory(self) -> None:
        if 0 < self.memory_budget_mib <= self.memory_reserve_mib:
            raise ConfigError(
                f"memory_budget_mib {self.memory_budget_mib} is not above memory_reserve_mib {self.memory_reserve_mib}:"
                " nothing would be left for sandboxes"
            )
        if not 0.05 <= self.memory_sense_s <= 60:
            raise ConfigError(f"memory_sense_s {self.memory_sense_s} is outside 0.05..60 seconds")
        if not 1 <= self.memory_follow_s <= 3600:
            raise ConfigError(f"memory_follow_s {self.memory_follow_s} is outside 1..3600 seconds")
        for key in ("memory_overcommit_percent", "memory_headroom_percent"):
            if not 0 <= getattr(self, key) <= 100:
                raise ConfigError(f"{key} {getattr(self, key)} is outside 0..100")
        if not 0 < self.memory_park_after_s <= self.memory_evict_after_s:
            raise ConfigError(
                f"memory_park_after_s {self.memory_park_after_s} and memory_evict_after_s {self.memory_evict_after_s}:"
                " both must be above 0, and parking must come first"
            )


def parse(values: dict[str, Any], source: str) -> Config:
    """A Config from TOML's values. ConfigError names the key and `source`."""
    known = {field.name: field for field in fields(Config)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}; known are {', '.join(known)}")
    parsed: dict[str, Any] = {}
    for name, field in known.items():
        if name not in values:
            if field.default is MISSING:
                raise ConfigError(f"{source}: {name} is missing")
            continue
        parsed[name] = _typed(name, str(field.type), values[name], source)
    try:
        return Config(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _typed(name: str, kind: str, value: Any, source: str) -> Any:
    if kind in ("Path", "Path | None") and isinstance(value, str):
        return Path(value)
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ConfigError(f"{source}: {name} = {value!r} is not a valid {kind}")


def load(path: Path) -> Config:
    """Reads and parses `path`. ConfigError when it cannot be read or is not right."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    return parse(values, str(path))
