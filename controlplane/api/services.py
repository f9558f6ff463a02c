"""Who answers a sandbox, service by service: values that control plane and hosts share. Pure.

A policy names for each service whether the sandbox's own kernel answers (`kernel`), a tool of ours does (`tool`), or
nobody (`deny`). For `sockets: tool` it also lists what may be reached and which ports are published:

    tcp:10.0.0.0/8:443          an address or network, IPv6 in brackets (tcp:[2001:db8::/32]:443)
    udp:1.1.1.1:53-54           a range of ports, or * for all
    tcp:*.debian.org:80         a name, or all names below one; needs `dns: tool`, which learns their addresses
    tcp:*:*                     everything but this host itself: loopback, link-local and the gateway need a rule that
                                names them

`GATEWAY` (and `GATEWAY_V6`) is the host's own loopback as a sandbox sees it; with `dns: tool` its port 53 answers.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cache

from controlplane.api.errors import PolicyError

GATEWAY, GATEWAY_V6 = "100.64.0.1", "fd73:616e:646c::1"
SANDBOX, SANDBOX_V6 = "100.64.0.2", "fd73:616e:646c::2"
MAX_TIME_OFFSET_MS = 50 * 365 * 86_400_000
"""Fifty years, so that no clock comes before 1970 or near its end."""
MAX_RULES, MAX_PUBLISHED, MAX_PORT = 256, 64, 65535

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(\*\.)?({_LABEL}\.)*{_LABEL}")
_OFFSET = re.compile(r"[+-](?:[0-9]{1,9}[wdhms])+", re.ASCII)
_UNITS_MS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000}
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)


class Service(Enum):
    """What can be answered by somebody else than the sandbox's kernel. The order is the wire's (PROTOCOL.md)."""

    SOCKETS = "sockets"
    DNS = "dns"
    FILES = "files"
    SECRETS = "secrets"
    TIME = "time"
    SYSVIEW = "sysview"
    DEVICES = "devices"


class Answerer(Enum):
    """Who answers."""

    KERNEL = "kernel"
    TOOL = "tool"
    DENY = "deny"


class Transport(Enum):
    """How bytes travel."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True)
class AllowRule:
    """What may be reached: `network` (CIDR) or `name`; both empty is every address that is not the host's own."""

    transport: Transport
    network: str = ""
    name: str = ""
    low_port: int = 0
    high_port: int = MAX_PORT

    def __post_init__(self) -> None:
        if not 0 <= self.low_port <= self.high_port <= MAX_PORT:
            raise PolicyError(f"ports {self.low_port}-{self.high_port} are no range of 0-{MAX_PORT}")
        if self.network:
            _network(self.network)
        if self.name and (self.network or not _NAME.fullmatch(self.name)):
            raise PolicyError(f"{self.name!r} is no DNS name, nor *.NAME")

    def __str__(self) -> str:
        target = self.name or self.network or "*"
        target = f"[{target}]" if ":" in target else target
        if (self.low_port, self.high_port) == (0, MAX_PORT):
            ports = "*"
        else:
            ports = f"{self.low_port}" if self.low_port == self.high_port else f"{self.low_port}-{self.high_port}"
        return f"{self.transport.value}:{target}:{ports}"

    def has_port(self, transport: Transport, port: int) -> bool:
        """Whether transport and port are this rule's."""
        return transport is self.transport and self.low_port <= port <= self.high_port

    def has_address(self, address: IPAddress) -> bool:
        """Whether the address itself is this rule's; never by its name."""
        if self.name:
            return False
        if self.network:
            return address in _network(self.network)
        return not is_host_own(address)

    def has_name(self, name: str) -> bool:
        """Whether it names `name`, lower case without the last dot."""
        if self.name.startswith("*."):
            return name.endswith(self.name[1:])
        return bool(self.name) and name == self.name


@dataclass(frozen=True)
class Publish:
    """A port of the sandbox that the host listens for, at `host_address`."""

    host_port: int
    port: int
    transport: Transport = Transport.TCP
    host_address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if not (0 <= self.host_port <= MAX_PORT and 1 <= self.port <= MAX_PORT):
            raise PolicyError(f"{self}: ports are 1-{MAX_PORT}, on the host also 0 for any")
        try:
            ipaddress.ip_address(self.host_address)
        except ValueError as error:
            raise PolicyError(f"{self.host_address!r} is no address to listen on") from error

    def __str__(self) -> str:
        address = f"[{self.host_address}]" if ":" in self.host_address else self.host_address
        return f"{address}:{self.host_port}:{self.port}/{self.transport.value}"


@dataclass(frozen=True)
class ServicePolicy:
    """Who answers each service of a sandbox; see the module."""

    sockets: Answerer = Answerer.KERNEL
    dns: Answerer = Answerer.KERNEL
    files: Answerer = Answerer.KERNEL
    secrets: Answerer = Answerer.KERNEL
    time: Answerer = Answerer.KERNEL
    sysview: Answerer = Answerer.KERNEL
    devices: Answerer = Answerer.KERNEL
    allow: tuple[AllowRule, ...] = ()
    publish: tuple[Publish, ...] = ()
    withdrawn: tuple[Service, ...] = ()
    """Whose tool refuses everything since it was denied while the sandbox ran (controlplane/api/servicechange.py)."""
    time_offset_ms: int = 0
    """What its clock shows beyond the host's, by `time: tool`."""

    def __post_init__(self) -> None:
        if any(self.of(service) is not Answerer.TOOL for service in self.withdrawn):
            raise PolicyError("only what a tool answers can be withdrawn from it")
        by_tool = self.sockets is Answerer.TOOL
        if not by_tool and (self.allow or self.publish):
            raise PolicyError("rules and published ports need sockets: tool")
        if not by_tool and self.dns is Answerer.TOOL:
            raise PolicyError("dns: tool answers through sockets: tool: ask for both")
        if any(rule.name for rule in self.allow) and self.dns is not Answerer.TOOL:
            raise PolicyError("a rule by name needs dns: tool, which learns the name's addresses")
        if len(self.allow) > MAX_RULES or len(self.publish) > MAX_PUBLISHED:
            raise PolicyError(f"at most {MAX_RULES} rules and {MAX_PUBLISHED} published ports")
        if self.time_offset_ms and self.time is not Answerer.TOOL:
            raise PolicyError("a clock that differs from the host's needs time: tool")
        if abs(self.time_offset_ms) > MAX_TIME_OFFSET_MS:
            raise PolicyError(f"a clock {self.time_offset_ms} ms from the host's: 50 years is the most")
        places = [(p.transport, p.host_address, p.host_port) for p in self.publish if p.host_port]
        if len(set(places)) < len(places):
            raise PolicyError("two published ports listen at the same place of the host")

    def of(self, service: Service) -> Answerer:
        """Who answers `service`."""
        answerer = getattr(self, service.value)
        assert isinstance(answerer, Answerer)
        return answerer

    def now(self, service: Service) -> Answerer:
        """What its callers meet: a tool that was withdrawn denies."""
        return Answerer.DENY if service in self.withdrawn else self.of(service)

    @property
    def answered(self) -> tuple[tuple[Service, Answerer], ...]:
        """The services that the kernel does not answer."""
        return tuple((one, self.of(one)) for one in Service if self.of(one) is not Answerer.KERNEL)


ALL_KERNEL = ServicePolicy()
SERVICE_NAMES = tuple(service.value for service in Service)


def is_host_own(address: IPAddress) -> bool:
    """Whether only a rule that names it may open it: what is the host's own or nobody's."""
    gateways = (ipaddress.ip_address(GATEWAY), ipaddress.ip_address(GATEWAY_V6))
    special = address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
    return special or address in gateways


def address_of(text: str) -> IPAddress:
    """An address; a mapped one (::ffff:a.b.c.d) is the IPv4 address that it reaches. ValueError."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


@cache
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise PolicyError(f"{text!r} is no address and no network: {error}") from error


def parse_transport(text: str) -> Transport:
    """tcp or udp."""
    for transport in Transport:
        if text == transport.value:
            return transport
    raise PolicyError(f"{text!r} is neither tcp nor udp")


def _ports(text: str) -> tuple[int, int]:
    match = _PORTS.fullmatch(text)
    if text == "*":
        return 0, MAX_PORT
    if match is None:
        raise PolicyError(f"{text!r} is no port, no range of ports (80-90) and not *")
    return int(match[1]), int(match[2] or match[1])


def parse_allow(text: str) -> AllowRule:
    """`tcp:10.0.0.0/8:443` and its kin. PolicyError says what is wrong."""
    transport, _, rest = text.partition(":")
    target, _, ports = rest.rpartition(":")
    if not target:
        raise PolicyError(f"{text!r} is no rule: write tcp:10.0.0.0/8:443 or tcp:*.example.org:80")
    low, high = _ports(ports)
    parsed = parse_transport(transport)
    if target == "*":
        return AllowRule(parsed, low_port=low, high_port=high)
    if target.startswith("["):
        return AllowRule(parsed, network=target.replace("[", "", 1).replace("]", "", 1), low_port=low, high_port=high)
    if re.fullmatch(r"[0-9./]+", target):
        return AllowRule(parsed, network=target, low_port=low, high_port=high)
    return AllowRule(parsed, name=target.lower().rstrip("."), low_port=low, high_port=high)


def parse_publish(text: str) -> Publish:
    """`[ADDRESS:]HOST_PORT:PORT[/udp]`; without an address the host's loopback. PolicyError says what is wrong."""
    body, _, transport = text.partition("/")
    place, _, port = body.rpartition(":")
    address, _, host_port = place.rpartition(":")
    if not (host_port.isascii() and host_port.isdigit() and port.isascii() and port.isdigit()) or len(text) > 80:
        raise PolicyError(f"{text!r} is no published port: write 8080:80, 0.0.0.0:8080:80 or 5353:53/udp")
    address = address.removeprefix("[").removesuffix("]") or "127.0.0.1"
    return Publish(int(host_port), int(port), parse_transport(transport or "tcp"), address)


def parse_time_offset(text: str, now_s: float) -> int:
    """`+3h`, `-1d12h`, or the moment at which the clock begins now (2027-01-01T00:00:00Z), as milliseconds from
    `now_s` (since 1970). PolicyError says what is wrong."""
    if _OFFSET.fullmatch(text):
        parts = re.findall(r"([0-9]+)([wdhms])", text)
        offset_ms = sum(int(count) * _UNITS_MS[unit] for count, unit in parts) * (-1 if text.startswith("-") else 1)
    else:
        try:
            moment = datetime.fromisoformat(text)
            if moment.tzinfo is None:
                raise ValueError("it names no time zone")
        except ValueError as error:
            example = "write -1d, +3h30m or 2027-01-01T00:00:00Z"
            raise PolicyError(f"{text!r} is no offset and no moment: {example}") from error
        offset_ms = round((moment.timestamp() - now_s) * 1000)
    if abs(offset_ms) > MAX_TIME_OFFSET_MS:
        raise PolicyError(f"{text} is more than 50 years from now")
    return offset_ms


def parse_answerer(text: str) -> Answerer:
    """kernel, tool or deny."""
    for answerer in Answerer:
        if text == answerer.value:
            return answerer
    raise PolicyError(f"{text!r} is no answerer: write kernel, tool or deny")
