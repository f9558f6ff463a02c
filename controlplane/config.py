"""The control plane's configuration file (TOML), parsed once, strictly: an unknown key is an error that names it.

listen, tls_ca, tls_cert, tls_key   required; listen is HOST:PORT, port 0 lets the system choose
store = "sqlite:PATH"               required; relative paths are relative to the file's folder
lease_s = 15                        how long a host stays READY without a report
lost_grace_s = 30                   how long after that its sandboxes are given up
ca_dir                              folder of the CA (ca.crt, ca.key) that signs hosts' keys; none: nobody joins
join_listen                         HOST:PORT where hosts join, without a certificate; none: nobody joins
advertise, join_advertise           HOST:PORT at which others reach listen and join_listen, where those do not say it
history_s = 600                     how far back a watch may begin
kept_events = 10000                 how many events are kept
[quotas.TENANT]                     how much a tenant may have at once, each key optional:
sandboxes, memory_min_mib, memory_max_mib, cpu_milli, images, image_mib, checkpoint_mib     see quotas.py
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from controlplane.api.channel import TlsFiles
from controlplane.api.identity import NAME_PATTERN
from controlplane.errors import ConfigError
from controlplane.quotas import Quota

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

    def __post_init__(self) -> None:
        for name in ("listen", "join_listen", "advertise", "join_advertise"):
            value = getattr(self, name)
            listen = LISTEN.fullmatch(value)
            if (value or name == "listen") and (listen is None or int(listen[2]) > 65535):
                raise ConfigError(f"{name} = {value!r} is not HOST:PORT")
        if self.join_listen and self.ca_dir is None:
            raise ConfigError("join_listen without ca_dir: hosts that join need a CA that signs their keys")
        if not self.store.startswith("sqlite:") or not self.store.removeprefix("sqlite:"):
            raise ConfigError(f"store = {self.store!r} is not sqlite:PATH")
        for name in ("lease_s", "history_s", "kept_events"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")

    @property
    def tls(self) -> TlsFiles:
        """The three files together."""
        return TlsFiles(self.tls_ca, self.tls_cert, self.tls_key)

    @property
    def sqlite_path(self) -> Path:
        """Where the SQLite store is."""
        return Path(self.store.removeprefix("sqlite:"))


def parse(values: dict[str, Any], source: str, folder: Path = Path()) -> Config:
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
        parsed[name] = _typed(name, str(field.type), values[name], source, folder)
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
    known = [field.name for field in fields(Quota)]
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


def load(path: Path) -> Config:
    """Reads and parses `path`. ConfigError when it cannot be read or is not right."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    return parse(values, str(path), path.absolute().parent)
