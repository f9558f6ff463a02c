"""The planner's cluster file (TOML or JSON): hosts, images, classes, what runs already, the policy. Strict: an unknown
key is an error that names it.

    [policy]                     all optional
    cpu_overcommit = 16.0        how many times over CPU may be asked for
    quantile = 0.95              of measured use that is charged; 0 charges the guarantee alone
    share = true                 false: every sandbox pays its layers itself
    domains = "tenant"           who shares with whom: tenant, all, none

    [[hosts]]                    alike hosts; only memory and cpus are required
    name = "big"                 big-0001, big-0002, …
    count = 40
    memory = "384G"
    cpus = 96
    reserve = "4G"               never given to sandboxes
    disk = "2T"
    labels = ["zone=eu"]         taints = []    accel = "kvm"    smt = false
    pids = 4194304               file_descriptors, shared_memory_files: how many there may be; left out: no bound
    pmem_slots = 96              layers that one guest can have

    [images.debian]
    layers = ["base=120M", "app=30M"]     layers of one name are one and the same

    [classes.web]                memory, cpus and image are required
    memory = "256M:1G"
    cpus = 0.5
    image = "debian"
    tenant = "acme"              class = "guest-kernel"
    use = "400M"                 what one uses of its own memory on average, use_std how much that varies
    affinity = [] tolerate = [] spread = "" trust = []     as `sandloom run` has them

    [[running]]                  what is there already, placed as the scheduler would
    class = "web"
    count = 100
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from controlplane.capacity.calibration import Calibration
from controlplane.capacity.sizes import parse_mib, parse_milli, parse_range
from controlplane.capacity.workload import Image, Workload
from controlplane.errors import ConfigError
from controlplane.model import Capacity, LayerSize, SandboxClass
from controlplane.rules import Pair, Rules, parse_affinity, parse_pair, parse_spread, parse_trust
from controlplane.scheduler_values import MIB, HostState, Level, Policy

T = TypeVar("T")
DOMAINS = ("tenant", "all", "none")
LIMITS = ("pids", "file_descriptors", "shared_memory_files")
MAX_HOSTS = 1_000_000


@dataclass(frozen=True)
class Planning:
    """What an operator may choose. `domains`: who shares with whom."""

    cpu_overcommit: float = 16.0
    quantile: float = 0.95
    share: bool = True
    domains: str = "tenant"

    @property
    def policy(self) -> Policy:
        """The scheduler's."""
        strains = [most for most in (1.0, 4.0) if most < self.cpu_overcommit]
        levels = [Level(most, ceilings=number == 0) for number, most in enumerate(strains)]
        share = self.share and self.domains != "none"
        return Policy((*levels, Level(self.cpu_overcommit)), share, self.quantile)

    def apply(self, workload: Workload) -> Workload:
        """The class in the sharing domain that this makes."""
        return replace(workload, domain="all") if self.domains == "all" else workload


@dataclass(frozen=True)
class Cluster:
    """Hosts on which nothing runs, and what is known besides."""

    hosts: tuple[HostState, ...]
    classes: Mapping[str, Workload]
    running: tuple[tuple[Workload, int], ...] = ()
    planning: Planning = Planning()
    images: Mapping[str, Image] = field(default_factory=dict)
    assigned: tuple[tuple[str, Workload], ...] = ()  # what runs on which host, where that is known


def empty_host(
    name: str, memory_mib: int, cpu_milli: int, calibration: Calibration, *, reserve_mib: int = 0,
    limits: Mapping[str, int] | None = None, pmem_slots: int = 0, **traits: Any,
) -> HostState:  # fmt: skip
    """A host on which nothing runs, all of whose memory above the reserve can be promised."""
    return HostState(
        name=name, ready=True,
        capacity=Capacity(
            memory_mib=memory_mib, memory_available_mib=memory_mib, cpu_milli=cpu_milli,
            system_reserve_mib=reserve_mib, vm_overhead_mib=calibration.guest_overhead_mib,
        ),
        classes=frozenset(SandboxClass), images=frozenset(), mapped_layers=frozenset(),
        limits=dict(limits or {}), guest_limits=(("pmem_slots", pmem_slots),) if pmem_slots else (), **traits,
    )  # fmt: skip


def load(path: Path, calibration: Calibration = Calibration()) -> Cluster:  # noqa: B008 - a frozen value
    """Reads and parses a file. ConfigError when it cannot be read or is not right."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path}: is not {kind}: {error}") from error
    return parse(values, str(path), calibration)


def parse(values: Any, source: str, calibration: Calibration = Calibration()) -> Cluster:  # noqa: B008 - a frozen value
    """A cluster of TOML's or JSON's values. ConfigError names the key and `source`."""
    top = _Table(values, source, ("policy", "hosts", "images", "classes", "running"))
    images = {name: _image(name, table) for name, table in top.tables("images", ("layers",)).items()}
    keys = ("memory", "cpus", "image", "tenant", "class", "use", "use_std", "affinity", "tolerate", "spread", "trust")
    classes = {name: _workload(name, table, images) for name, table in top.tables("classes", keys).items()}
    running = tuple(_running(table, classes) for table in top.list("running", ("class", "count")))
    hosts: list[HostState] = []
    for number, table in enumerate(top.list("hosts", HOST_KEYS), 1):
        hosts += _hosts(number, table, calibration)
    names = [host.name for host in hosts]
    if len(set(names)) < len(names):
        raise ConfigError(f"{source}: hosts: two have the same name: give each group a name of its own")
    policy = top.table("policy", ("cpu_overcommit", "quantile", "share", "domains"))
    return Cluster(tuple(hosts), classes, running, _planning(policy), images)


HOST_KEYS = (
    "name", "count", "memory", "cpus", "reserve", "disk", "labels", "taints", "accel", "smt", *LIMITS, "pmem_slots",
)  # fmt: skip


class _Table:
    """A table with the keys that it may have, and where it is, for what is wrong with it."""

    def __init__(self, values: Any, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is not a table")
        for key in values:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
        self.values, self.where = values, where

    def table(self, key: str, known: tuple[str, ...]) -> _Table:
        return _Table(self.values.get(key, {}), f"{self.where}: {key}", known)

    def tables(self, key: str, known: tuple[str, ...]) -> dict[str, _Table]:
        found = self.values.get(key, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{self.where}: {key} is not a table of tables")
        return {name: _Table(table, f"{self.where}: {key}.{name}", known) for name, table in found.items()}

    def list(self, key: str, known: tuple[str, ...]) -> list[_Table]:
        found = self.values.get(key, [])
        if not isinstance(found, list):
            raise ConfigError(f"{self.where}: {key} is not a list of tables")
        return [_Table(table, f"{self.where}: {key} {at}", known) for at, table in enumerate(found, 1)]

    def get(self, key: str, read: Callable[[Any], T], default: T | None = None) -> T:
        if key not in self.values:
            if default is None:
                raise ConfigError(f"{self.where}: {key} is missing")
            return default
        try:
            return read(self.values[key])
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{self.where}: {key} = {self.values[key]!r}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it is not a text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it is neither true nor false")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("it is not a whole number of at least 0")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise ValueError("it is not a number of at least 0")
    return float(value)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("it is not a list of texts")
    return [_text(one) for one in value]


NO_PAIRS: tuple[Pair, ...] = ()


def _pairs(value: Any) -> tuple[Pair, ...]:
    return tuple(sorted(map(parse_pair, _texts(value))))


def _planning(table: _Table) -> Planning:
    planning = Planning(
        table.get("cpu_overcommit", _number, 16.0), table.get("quantile", _number, 0.95),
        table.get("share", _flag, True), table.get("domains", _text, "tenant"),
    )  # fmt: skip
    if planning.domains not in DOMAINS:
        raise ConfigError(f"{table.where}: domains = {planning.domains!r} is none of {', '.join(DOMAINS)}")
    if planning.cpu_overcommit < 0.01 or planning.quantile >= 1:
        raise ConfigError(f"{table.where}: cpu_overcommit must be at least 0.01, and quantile below 1")
    return planning


def _image(name: str, table: _Table) -> Image:
    def layer(text: str) -> LayerSize:
        digest, equals, size = text.partition("=")
        if not equals or not digest:
            raise ValueError(f"{text!r} is not NAME=SIZE")
        return LayerSize(digest, parse_mib(size) * MIB)

    return Image(name, table.get("layers", lambda texts: tuple(map(layer, _texts(texts)))))


def _workload(name: str, table: _Table, images: Mapping[str, Image]) -> Workload:
    least_mib, most_mib = table.get("memory", parse_range)
    image = table.get("image", _text)
    if image not in images:
        raise ConfigError(f"{table.where}: image {image!r} has no [images.{image}]")
    use_mib = table.get("use", parse_mib, -1)
    return Workload(
        name, least_mib, most_mib, table.get("cpus", parse_milli), images[image],
        table.get("tenant", _text, "default"), table.get("class", SandboxClass, SandboxClass.GUEST_KERNEL),
        Rules(
            table.get("affinity", lambda texts: tuple(map(parse_affinity, _texts(texts))), ()),
            table.get("tolerate", lambda texts: tuple(map(parse_pair, _texts(texts))), ()),
            table.get("spread", parse_spread) if table.values.get("spread") else None,
            parse_trust(table.get("trust", lambda words: list(parse_trust(_texts(words)).words), [])),
        ),
        use_mib=None if use_mib < 0 else float(use_mib), use_std_mib=float(table.get("use_std", parse_mib, 0)),
    )  # fmt: skip


def _running(table: _Table, classes: Mapping[str, Workload]) -> tuple[Workload, int]:
    name = table.get("class", _text)
    if name not in classes:
        raise ConfigError(f"{table.where}: class {name!r} has no [classes.{name}]")
    return classes[name], table.get("count", _whole, 1)


def _hosts(number: int, table: _Table, calibration: Calibration) -> list[HostState]:
    count = table.get("count", _whole, 1)
    if not 1 <= count <= MAX_HOSTS:
        raise ConfigError(f"{table.where}: count = {count} is not between 1 and {MAX_HOSTS}")
    name = table.get("name", _text, f"host{number}")
    limits = {key: table.get(key, _whole) for key in LIMITS if key in table.values}
    if "disk" in table.values:
        limits["disk_mib"] = table.get("disk", parse_mib)
    one = empty_host(
        name, table.get("memory", parse_mib), table.get("cpus", parse_milli), calibration,
        reserve_mib=table.get("reserve", parse_mib, 0), limits=limits, pmem_slots=table.get("pmem_slots", _whole, 0),
        labels=table.get("labels", _pairs, NO_PAIRS), taints=table.get("taints", _pairs, NO_PAIRS),
        accel=table.get("accel", _text, "kvm"), smt=table.get("smt", _flag, False),
    )  # fmt: skip
    width = max(4, len(str(count)))
    return [one] if count == 1 else [replace(one, name=f"{name}-{at:0{width}}") for at in range(1, count + 1)]
