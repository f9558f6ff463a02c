"""The control plane's configuration file (TOML), parsed once, strictly: an unknown key is an error that names it.

listen, tls_ca, tls_cert, tls_key   required; listen is HOST:PORT, port 0 lets the system choose
store                               required: "sqlite:PATH" (relative to the file's folder) for one control plane, or
                                    "etcd:HOST:PORT,HOST:PORT,..." for any number of replicas
name = the machine's host name      what this replica calls itself, to be seen when it leads
etcd_prefix = "sandloom/"           before every key: fabrics that share a cluster differ in it
etcd_ca, etcd_cert, etcd_key        the CA of etcd's certificates (without it: no TLS), and what to show etcd
etcd_user, etcd_password_file       to authenticate with; a trailing line break in the file does not count
etcd_deadline_s = 5                 how long a call to etcd may take before it fails with UNAVAILABLE
lease_s = 15                        how long a host stays READY without a report
lost_grace_s = 30                   how long after that its sandboxes are given up
ca_dir                              folder of the CA (ca.crt, ca.key) that signs hosts' keys; none: nobody joins
join_listen                         HOST:PORT where hosts join, without a certificate; none: nobody joins
advertise, join_advertise           HOST:PORT at which others reach listen and join_listen, where those do not say it
history_s = 600                     how far back a watch may begin
kept_events = 10000                 how many events are kept
[quotas.TENANT]                     how much a tenant may have at once, each key optional:
sandboxes, memory_min_mib, memory_max_mib, cpu_milli, images, image_mib, checkpoint_mib     see quotas.py
[services.TENANT]                   who answers a tenant's sandboxes unless they say otherwise, each key optional:
sockets, dns, files, secrets, time, sysview, devices = "kernel", "tool" or "deny"; allow = ["tcp:10.0.0.0/8:443"]
"""

from __future__ import annotations

import re
import socket
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from controlplane.api.channel import TlsFiles
from controlplane.api.errors import PolicyError
from controlplane.api.identity import NAME_PATTERN
from controlplane.api.services import SERVICE_NAMES, ServicePolicy, parse_allow, parse_answerer
from controlplane.errors import ConfigError
from controlplane.quotas import Quota

ETCD_PREFIX = re.compile(r"([A-Za-z0-9._-]+/)+")
LISTEN = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Config:
    """All a control plane needs to know before it starts. ConfigError when the values do not fit."""

    listen: str
    store: str
    tls_ca: Path
    tls_cert: Path
    tls_key: Path
    lease_s: int = 15
    lost_grace_s: int = 30
    history_s: int = 600
    kept_events: int = 10_000
    ca_dir: Path | None = None
    join_listen: str = ""
    advertise: str = ""
    join_advertise: str = ""
    quotas: tuple[tuple[str, Quota], ...] = ()
    name: str = field(default_factory=socket.gethostname)
    etcd_prefix: str = "sandloom/"
    etcd_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    etcd_user: str = ""
    etcd_password_file: Path | None = None
    etcd_deadline_s: int = 5
    services: tuple[tuple[str, ServicePolicy], ...] = ()

    def __post_init__(self) -> None:
        for name in ("listen", "join_listen", "advertise", "join_advertise"):
            value = getattr(self, name)
            listen = LISTEN.fullmatch(value)
            if (value or name == "listen") and (listen is None or int(listen[2]) > 65535):
                raise ConfigError(f"{name} = {value!r} is not HOST:PORT")
        if self.join_listen and self.ca_dir is None:
            raise ConfigError("join_listen without ca_dir: hosts that join need a CA that signs their keys")
        kind, _, where = self.store.partition(":")
        if kind not in ("sqlite", "etcd") or not where:
            raise ConfigError(f"store = {self.store!r} is neither sqlite:PATH nor etcd:HOST:PORT,HOST:PORT,...")
        if kind == "etcd":
            self._require_etcd()
        for name in ("lease_s", "history_s", "kept_events", "etcd_deadline_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")

    def _require_etcd(self) -> None:
        for endpoint in self.etcd_endpoints:
            if not LISTEN.fullmatch(endpoint):
                raise ConfigError(f"store: etcd's endpoint {endpoint!r} is not HOST:PORT")
        if not ETCD_PREFIX.fullmatch(self.etcd_prefix):
            raise ConfigError(f"etcd_prefix = {self.etcd_prefix!r} must match {ETCD_PREFIX.pattern}")
        if bool(self.etcd_cert) != bool(self.etcd_key) or (self.etcd_cert and not self.etcd_ca):
            raise ConfigError("etcd_cert needs etcd_key and etcd_ca, and etcd_key needs etcd_cert")
        if bool(self.etcd_user) != bool(self.etcd_password_file):
            raise ConfigError("etcd_user and etcd_password_file need each other")

    @property
    def tls(self) -> TlsFiles:
        """The three files together."""
        return TlsFiles(self.tls_ca, self.tls_cert, self.tls_key)

    @property
    def sqlite_path(self) -> Path | None:
        """Where the SQLite store is; None when it is another one."""
        return Path(self.store.removeprefix("sqlite:")) if self.store.startswith("sqlite:") else None

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """etcd's members as HOST:PORT; none when the store is another one."""
        return tuple(self.store.removeprefix("etcd:").split(",")) if self.store.startswith("etcd:") else ()


def parse(values: dict[str, Any], source: str, folder: Path = Path()) -> Config:
    """A Config from TOML's values. ConfigError names the key and `source`."""
    known = {each.name: each for each in fields(Config)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}; known are {', '.join(known)}")
    parsed: dict[str, Any] = {}
    for name, each in known.items():
        if name not in values:
            if each.default is MISSING and each.default_factory is MISSING:
                raise ConfigError(f"{source}: {name} is missing")
            continue
        parsed[name] = _typed(name, str(each.type), values[name], source, folder)
    if parsed["store"].startswith("sqlite:") and parsed["store"] != "sqlite:":
        parsed["store"] = f"sqlite:{folder / parsed['store'].removeprefix('sqlite:')}"
    try:
        return Config(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _typed(name: str, kind: str, value: Any, source: str, folder: Path) -> Any:
    if name == "quotas":
        return _quotas(value, source)
    kind = kind.removesuffix(" | None")
    if name == "services":
        return _services(value, source)
    if kind == "Path" and isinstance(value, str) and value:
        return folder / value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if kind == "str" and isinstance(value, str) and value:
        return value
    wanted = {"Path": "a path", "int": "a whole number of at least 0", "str": "a text"}[kind]
    raise ConfigError(f"{source}: {name} = {value!r} is not {wanted}")


def _quotas(value: Any, source: str) -> tuple[tuple[str, Quota], ...]:
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: quotas is not a table of tenants")
    known = [each.name for each in fields(Quota)]
    parsed = []
    for tenant, bounds in value.items():
        where = f"{source}: quotas.{tenant}"
        if not NAME_PATTERN.fullmatch(tenant) or not isinstance(bounds, dict):
            raise ConfigError(f"{where} is not a tenant's table")
        for key, most in bounds.items():
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
            _typed(f"quotas.{tenant}.{key}", "int", most, source, Path())
        parsed.append((tenant, Quota(**bounds)))
    return tuple(parsed)


def _services(value: Any, source: str) -> tuple[tuple[str, ServicePolicy], ...]:
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: services is not a table of tenants")
    return tuple((tenant, _policy(f"{source}: services.{tenant}", tenant, keys)) for tenant, keys in value.items())


def _policy(where: str, tenant: str, keys: Any) -> ServicePolicy:
    known = [*SERVICE_NAMES, "allow"]
    if not NAME_PATTERN.fullmatch(tenant) or not isinstance(keys, dict):
        raise ConfigError(f"{where} is not a tenant's table")
    for key, given in keys.items():
        words = given if key == "allow" and isinstance(given, list) else [given]
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
        if not all(isinstance(word, str) for word in words) or (key == "allow") is not isinstance(given, list):
            raise ConfigError(f"{where}: {key} = {given!r} is not {'a list of texts' if key == 'allow' else 'a text'}")
    try:
        answerers: dict[str, Any] = {name: parse_answerer(keys[name]) for name in SERVICE_NAMES if name in keys}
        return ServicePolicy(**answerers, allow=tuple(map(parse_allow, keys.get("allow", ()))))
    except PolicyError as error:
        raise ConfigError(f"{where}: {error}") from error


def load(path: Path) -> Config:
    """Reads and parses `path`. ConfigError when it cannot be read or is not right."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    return parse(values, str(path), path.absolute().parent)
