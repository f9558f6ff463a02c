"""What a sandbox may reach: its policy's rules over addresses, ports and learned names. Pure but for what it learnt.

`Reach.verdict` is the only place that decides; `dns: tool` teaches it which addresses a name had lately. An address of
the host's own (loopback, link-local, the gateway) is never learned by name, so that nobody's DNS opens it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from controlplane.api.services import (
    GATEWAY,
    GATEWAY_V6,
    AllowRule,
    Answerer,
    IPAddress,
    Service,
    ServicePolicy,
    Transport,
    address_of,
    is_host_own,
)

LEARNED_S = 600.0
"""How long a connection may go to an address after its name was last asked for; callers keep answers for a while."""

MAX_LEARNED = 4096
DNS_PORTS = (53, 853)


@dataclass(frozen=True)
class Verdict:
    """Whether, and by which rule; `rule` is for people."""

    allowed: bool
    rule: str


class Reach:
    """The rules of one sandbox."""

    def __init__(self, policy: ServicePolicy) -> None:
        self.policy = policy
        self._learned: OrderedDict[IPAddress, dict[str, float]] = OrderedDict()

    def change(self, policy: ServicePolicy) -> None:
        """Other rules from now on; what was learnt stays, its rules decide anew."""
        self.policy = policy

    def verdict(self, transport: Transport, address: IPAddress, port: int, now_s: float) -> Verdict:
        """May the sandbox speak with `address`, `port`?"""
        address = address_of(str(address))
        if self.policy.now(Service.SOCKETS) is Answerer.DENY:
            return Verdict(False, "sockets: deny")
        if self.policy.now(Service.DNS) is Answerer.DENY and port in DNS_PORTS:
            return Verdict(False, "dns: deny")
        for rule in self.policy.allow:
            if rule.has_port(transport, port) and (rule.has_address(address) or self._named(rule, address, now_s)):
                return Verdict(True, str(rule))
        return Verdict(False, "no rule allows it")

    def _named(self, rule: AllowRule, address: IPAddress, now_s: float) -> bool:
        if not rule.name:
            return False
        names = self._learned.get(address, {})
        return any(until_s > now_s and rule.has_name(name) for name, until_s in names.items())

    def may_resolve(self, name: str) -> Verdict:
        """May the sandbox ask for `name`? If a rule names it, or rules over addresses decide later."""
        if Answerer.DENY in (self.policy.now(Service.SOCKETS), self.policy.now(Service.DNS)):
            return Verdict(False, "dns: deny")
        for rule in self.policy.allow:
            if rule.has_name(name):
                return Verdict(True, str(rule))
        for rule in self.policy.allow:
            if not rule.name:
                return Verdict(True, str(rule))
        return Verdict(False, "no rule names it")

    def learn(self, name: str, addresses: list[IPAddress], now_s: float) -> list[IPAddress]:
        """Remembers what `name` is; gives those addresses that may be told: none of the host's own."""
        fit = [one for one in map(address_of, map(str, addresses)) if not is_host_own(one)]
        for address in fit:
            names = {known: until for known, until in self._learned.get(address, {}).items() if until > now_s}
            self._learned[address] = {**names, name: now_s + LEARNED_S}
            self._learned.move_to_end(address)
        while len(self._learned) > MAX_LEARNED:
            self._learned.popitem(last=False)
        return fit


def host_side(address: IPAddress) -> str:
    """Where the host's tool really goes for `address`: the gateway is the host's own loopback."""
    return {GATEWAY: "127.0.0.1", GATEWAY_V6: "::1"}.get(str(address), str(address))


def sandbox_side(address: IPAddress) -> IPAddress:
    """Who a client of the host is to the sandbox: one on the host's loopback is the gateway."""
    address = address_of(str(address))
    if address.is_loopback:
        return address_of(GATEWAY if address.version == 4 else GATEWAY_V6)
    return address
