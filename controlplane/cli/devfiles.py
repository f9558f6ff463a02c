"""The files of a one-host fabric: its CA and certificates, and the configuration of its two daemons.

HOME/tls/ca/           the authority (controlplane.ca)
HOME/tls/              ca.crt, and <role>.crt and .key of operator, controlplane and host
HOME/controlplane.toml listen, store, tls_ca, tls_cert, tls_key, ca_dir, join_listen
HOME/hostd.toml        as hostd/config.py has it; also remembers what `dev up` was told the first time, and keeps
                       what its owner added
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from controlplane.api.channel import TlsFiles
from controlplane.api.identity import NAME_PATTERN, Identity, Role
from controlplane.ca import Authority
from controlplane.cli.errors import CliError
from controlplane.cli.home import Context, Home, replace_file

LOOPBACK = "127.0.0.1"
ANY_PORT = f"{LOOPBACK}:0"
ACCELS = ("auto", "kvm", "tcg")
OPERATOR, CONTROLPLANE = "admin", "local"
MAX_RUN_DIR_BYTES = 67  # hostd/config.py: what unix(7) leaves for the sockets below it
LOCK_S = 120.0
LOCK_POLL_S = 0.1
TICKS_S = 0.5


@dataclass(frozen=True)
class HostSettings:
    """What `dev up` may be told of its host."""

    name: str
    accel: str = "auto"
    memory_reserve_mib: int = 512
    registries: tuple[str, ...] = ()
    plain_registries: tuple[str, ...] = ()  # they are among `registries`, too

    def runs_as(self, other: HostSettings) -> bool:
        """Whether a hostd that runs with these may go on as it is, or begin anew, when `other` is asked for."""
        return (self.accel, self.memory_reserve_mib) == (other.accel, other.memory_reserve_mib)


def default_host_name(nodename: str) -> str:
    """A DNS label of this machine's name; `local` when nothing is left of it."""
    label = re.sub(r"[^a-z0-9-]+", "-", nodename.split(".", 1)[0].lower()).strip("-")[:63].strip("-")
    return label if NAME_PATTERN.fullmatch(label) else "local"


Value = str | int | float | Path | Sequence[str | int | float]


def toml(values: Mapping[str, Value]) -> str:
    """Top-level keys as TOML; JSON's strings are TOML's basic strings but for DEL."""
    return "".join(f"{key} = {_toml_value(value)}\n".replace("\x7f", "\\u007F") for key, value in values.items())


def _toml_value(value: Value) -> str:
    plain = str(value) if isinstance(value, Path) else value
    return json.dumps(plain if isinstance(plain, str | int | float) else list(plain), ensure_ascii=False)


def store_for(home: Home, asked: str | None) -> str:
    """Where records are kept: as recorded by an earlier `dev up`, else as asked, else in a file of HOME's.

    CliError when they would be left behind."""
    try:
        recorded = str(tomllib.loads(controlplane_config(home).read_text(encoding="utf-8"))["store"])
    except (OSError, ValueError, KeyError):
        return asked or f"sqlite:{home.store / 'sandloom.db'}"
    if asked is not None and asked != recorded:
        raise CliError(
            f"this fabric's records cannot move to {asked}", f"they are in {recorded}",
            "leave --store out, or begin anew after `sandloom dev down --purge`",
        )  # fmt: skip
    return recorded


def controlplane_toml(home: Home, listen: str, store: str) -> str:
    """The control plane's configuration."""
    tls = tls_files(home, Role.CONTROLPLANE)
    return toml({
        "listen": listen, "store": store, "tls_ca": tls.ca, "tls_cert": tls.cert, "tls_key": tls.key,
        "ca_dir": home.tls / "ca", "join_listen": ANY_PORT,
    })  # fmt: skip


def cgroup_name(home: Home) -> str:
    """The folder of this fabric's cgroups: a machine may have several fabrics."""
    return f"sandloom-{hashlib.sha256(str(home.root).encode()).hexdigest()[:12]}"


def hostd_toml(home: Home, settings: HostSettings, controlplane: str, listen: str = ANY_PORT) -> str:
    """hostd's configuration, with what its owner added to the one that there is. CliError when that is no TOML."""
    tls = tls_files(home, Role.HOST)
    ours: dict[str, Value] = {
        "host": settings.name, "state_dir": home.state, "run_dir": home.run, "listen": listen,
        "controlplane": controlplane, "tls_ca": tls.ca, "tls_cert": tls.cert, "tls_key": tls.key,
        "cgroup": cgroup_name(home), "accel": settings.accel, "memory_reserve_mib": settings.memory_reserve_mib,
    }  # fmt: skip
    for key, names in (("registries", settings.registries), ("plain_registries", settings.plain_registries)):
        if names:
            ours[key] = names
    return toml({**_added(hostd_config(home), ours), **ours})


def _added(path: Path, ours: Mapping[str, Value]) -> dict[str, Value]:
    """The keys of a configuration that are not ours."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CliError(f"{path} cannot be kept", str(error), "mend it, or remove it: it is made anew then") from error
    added = {key: value for key, value in values.items() if key not in ours}
    for key, value in added.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            raise CliError(f"{path} cannot be kept", f"{key} is neither a value nor a list of them", "take it out")
    return added


def is_newer_than(path: Path, uptime_s: float) -> bool:
    """Whether a configuration was changed after the daemon that reads it had begun, by more than clocks' ticks."""
    return time.time() - path.stat().st_mtime + TICKS_S < uptime_s


def controlplane_config(home: Home) -> Path:
    return home.root / "controlplane.toml"


def hostd_config(home: Home) -> Path:
    return home.root / "hostd.toml"


def recorded_settings(home: Home) -> HostSettings | None:
    """What an earlier `dev up` was told; None when there was none or its file is no use."""
    try:
        values = tomllib.loads(hostd_config(home).read_text(encoding="utf-8"))
        settings = HostSettings(
            str(values["host"]), str(values["accel"]), int(values["memory_reserve_mib"]),
            _names(values, "registries"), _names(values, "plain_registries"),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if NAME_PATTERN.fullmatch(settings.name) else None


def _names(values: Mapping[str, object], key: str) -> tuple[str, ...]:
    names = values.get(key, [])
    if not isinstance(names, list):
        raise TypeError(key)
    return tuple(map(str, names))


def settings_for(
    home: Home, host_name: str | None = None, accel: str | None = None, memory_reserve_mib: int | None = None,
    *, registries: Sequence[str] = (), plain_registries: Sequence[str] = (),
) -> HostSettings:  # fmt: skip
    """What was asked for, else what was recorded, else the defaults; registries are added to those that were recorded.
    CliError when the host would be renamed."""
    before = recorded_settings(home)
    if before is not None and host_name is not None and host_name != before.name:
        raise CliError(
            f"this fabric's host cannot become {host_name}", f"it is named {before.name}",
            "leave --host-name out, or begin anew after `sandloom dev down --purge`",
        )  # fmt: skip
    name = host_name or (before.name if before else default_host_name(platform.node()))
    if not NAME_PATTERN.fullmatch(name):
        raise CliError("not a host name", repr(name), "use small letters, digits and -, at most 63")
    base = before or HostSettings(name)
    if memory_reserve_mib is not None:
        require_room(memory_reserve_mib)
    return HostSettings(
        name, accel or base.accel, base.memory_reserve_mib if memory_reserve_mib is None else memory_reserve_mib,
        tuple(dict.fromkeys([*base.registries, *registries, *plain_registries])),
        tuple(dict.fromkeys([*base.plain_registries, *plain_registries])),
    )  # fmt: skip


def require_room(memory_reserve_mib: int) -> None:
    """CliError when a reserve leaves this machine's sandboxes nothing."""
    total_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    if memory_reserve_mib >= total_mib:
        raise CliError(
            "--memory-reserve leaves nothing for sandboxes", f"{memory_reserve_mib} MiB of {total_mib} MiB", "give less"
        )


def check_length(home: Home) -> None:
    """CliError when HOME is too long for the unix sockets below it."""
    length = len(os.fsencode(home.run))
    if length > MAX_RUN_DIR_BYTES:
        raise CliError(
            "this HOME's path is too long", f"{home.run} has {length} bytes, {MAX_RUN_DIR_BYTES} are the most",
            "choose a shorter --home: unix sockets live below it",
        )  # fmt: skip


def tls_files(home: Home, role: Role) -> TlsFiles:
    """Where a role's certificate is, issued or not."""
    return TlsFiles(home.tls / "ca.crt", home.tls / f"{role.value}.crt", home.tls / f"{role.value}.key")


def issue(home: Home, role: Role, name: str) -> None:
    """A new certificate of the fabric's own CA, which is made when there is none. TlsError."""
    addresses = (LOOPBACK,) if role in (Role.CONTROLPLANE, Role.HOST) else ()
    Authority.ensure(home.tls / "ca").issue_files(Identity(role, name), home.tls, ip_addresses=addresses)


def context_of(home: Home, address: str) -> Context:
    """How the operator reaches the control plane at `address`."""
    tls = tls_files(home, Role.OPERATOR)
    return Context(address, tls.ca, tls.cert, tls.key)


def write_config(path: Path, text: str) -> None:
    replace_file(path, text)


@contextmanager
def locked(home: Home, *, waiting: Callable[[], None] = lambda: None, deadline_s: float = LOCK_S) -> Iterator[None]:
    """Holds HOME/lock: one `dev up` or `dev down` at a time. CliError when another one takes too long."""
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        give_up_s = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
            if time.monotonic() > give_up_s:
                raise CliError("another `dev up` or `dev down` is at work", str(home.lock), "wait for it to end")
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
