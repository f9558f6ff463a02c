"""Whether a host can take a demand at all, and what it lacks if not. Pure.

A host is asked in this order, and the first thing that stands against it is told:

    HostLost Cordoned ClassNotOffered AffinityNotMet TaintNotTolerated TrustNotMet      by its traits
    HasOtherTenants ImageNotResident ShortOfCpu ShortOfMemory ShortOf… SpreadTooUneven  by what is there
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane.model import HostPool
from controlplane.rules import HOST_KEY, NO_RULES, text_of
from controlplane.scheduler_values import Demand, HostFacts, Policy, Refusal, Traits, layer_mib

UNSPREAD = 1 << 30
"""In place of a count, for a host that has not the label over whose values a group is spread."""
Problem = tuple[str, str, int]
"""Reason, message, how much is lacking."""


@dataclass(frozen=True)
class SpreadCounts:
    """How many of a demand's group each value of its spread key has; `least` over all values that could take it."""

    counts: Mapping[str, int]
    least: int = 0


NO_SPREAD = SpreadCounts({})


def unfit_traits(demand: Demand, traits: Traits) -> Problem | None:
    """What stands against a host whatever runs there, apart from whether it takes anything new."""
    if demand.sandbox_class not in traits.classes:
        offered = ", ".join(sorted(kind.value for kind in traits.classes)) or "none"
        return "ClassNotOffered", f"it does not offer {demand.sandbox_class.value} (it offers {offered})", 0
    rules = demand.rules
    if rules is not NO_RULES:
        labels = dict(traits.labels)
        for term in rules.affinity:
            if not term.holds(labels):
                has = f"{term.key}={labels[term.key]}" if term.key in labels else f"no label {term.key}"
                return "AffinityNotMet", f"affinity {term} does not hold: it has {has}", 0
    for taint in traits.taints:
        if not rules.tolerates(taint):
            return "TaintNotTolerated", f"it is tainted {text_of(taint)}", 0
    if rules.trust.no_smt and traits.smt:
        return "TrustNotMet", "its CPUs run hyperthreads (SMT), and trust no-smt is asked", 0
    if rules.trust.kvm and traits.accel != "kvm":
        return "TrustNotMet", f"its guests run by {traits.accel or 'an unknown engine'}, and trust kvm is asked", 0
    for name, amount in demand.guest_needs:
        most = dict(traits.guest_limits).get(name, amount)
        if amount > most:
            return _short_of(name), f"{amount} {name.replace('_', ' ')} needed, a guest can have {most}", amount - most
    if traits.dedicated_to not in ("", demand.tenant):
        return "HasOtherTenants", "it is dedicated to another tenant", 0
    return None


def unfit_presence(demand: Demand, host: HostFacts) -> Problem | None:
    """What of a host's present use stands against it, sizes apart."""
    if demand.rules.trust.dedicated and host.crowded_for not in ("", demand.tenant):
        return "HasOtherTenants", "it runs other tenants' sandboxes, and a dedicated host is asked", 0
    if not demand.fetchable and (demand.tenant, demand.image_digest) not in host.images:
        return "ImageNotResident", "it does not hold the image", 0
    return None


def unfit_sizes(demand: Demand, host: HostFacts, policy: Policy) -> Problem | None:
    """What the host is short of."""
    sizes = host.capacity
    if demand.cpu_milli > sizes.cpu_milli:
        text = f"{demand.cpu_milli / 1000:g} CPUs needed, it has {sizes.cpu_milli / 1000:g}"
        return "ShortOfCpu", text, demand.cpu_milli - sizes.cpu_milli
    cpu_left = int(sizes.cpu_milli * policy.cpu_overcommit) - host.cpu_asked_milli
    if demand.cpu_milli > cpu_left:
        return "ShortOfCpu", (
            f"{demand.cpu_milli / 1000:g} CPUs needed, {max(0, cpu_left) / 1000:g} left of"
            f" {sizes.cpu_milli / 1000:g} times {policy.cpu_overcommit:g}"
        ), demand.cpu_milli - cpu_left  # fmt: skip
    need_mib = marginal_all_mib(demand, host, policy)
    if (lacking := need_mib - held_mib(demand, host) - host.unpromised_mib) > 0:
        return "ShortOfMemory", (
            f"{need_mib} MiB needed ({_parts(demand, host, policy)}),"
            f" {max(0, host.unpromised_mib)} MiB not promised (total {sizes.memory_mib},"
            f" reserve {sizes.system_reserve_mib},"
            f" promised {sizes.memory_mib - sizes.system_reserve_mib - host.unpromised_mib})"
        ), lacking  # fmt: skip
    if (lacking := need_mib - host.usable_mib) > 0:
        return "ShortOfMemory", (
            f"{need_mib} MiB needed, {max(0, host.usable_mib)} MiB usable now (available {sizes.memory_available_mib},"
            f" reserve {sizes.system_reserve_mib}, about to be used"
            f" {sizes.memory_available_mib - sizes.system_reserve_mib - host.usable_mib})"
        ), lacking  # fmt: skip
    for name, amount in demand.extras:
        if amount > host.limits.get(name, amount):
            words = name.replace("_", " ")
            text = f"{amount} {words} needed, {max(0, host.limits[name])} left"
            return _short_of(name), text, amount - host.limits[name]
    return None


def _short_of(name: str) -> str:
    return "ShortOf" + "".join(word.capitalize() for word in name.split("_"))


def _parts(demand: Demand, host: HostFacts, policy: Policy) -> str:
    said = [f"{demand.memory_min_mib} MiB guaranteed"]
    if demand.charge_mib > demand.memory_min_mib:
        said = [f"{demand.charge_mib} MiB charged by its workload's measured use"]
    said.append(f"{host.capacity.vm_overhead_mib} MiB overhead")
    if demand.extra_mib:
        said.append(f"{demand.extra_mib} MiB page tables")
    if missing := missing_mib(demand, host, policy):
        said.append(f"{missing} MiB of layers that nobody maps there")
    return " + ".join(said)


def domain_of(key: str, host: HostFacts) -> str | None:
    """The value of a host under a spread key; None when it has none."""
    return host.name if key == HOST_KEY else dict(host.traits.labels).get(key)


def spread_count(demand: Demand, host: HostFacts, spread: SpreadCounts) -> int:
    """How many of the demand's group are in the host's part of its spread."""
    if demand.rules.spread is None:
        return 0
    domain = domain_of(demand.rules.spread.key, host)
    return UNSPREAD if domain is None else spread.counts.get(domain, 0)


def unfit_spread(demand: Demand, host: HostFacts, spread: SpreadCounts) -> Problem | None:
    """Whether one more there would make it too uneven."""
    rule = demand.rules.spread
    if rule is None or not rule.max_skew:
        return None
    count = spread_count(demand, host, spread)
    if count == UNSPREAD:
        return "SpreadTooUneven", f"it has no label {rule.key} to be spread over", 0
    if count + 1 - spread.least > rule.max_skew:
        text = f"{rule.key}={domain_of(rule.key, host)} has {count} of its group, the least is {spread.least}"
        return (
            "SpreadTooUneven",
            f"{text}, and they may differ by {rule.max_skew}",
            count + 1 - spread.least - rule.max_skew,
        )
    return None


def counted(demand: Demand, hosts: Iterable[HostFacts]) -> SpreadCounts:
    """The counts over every host that takes new sandboxes and whose traits let it take this one."""
    rule = demand.rules.spread
    if rule is None:
        return NO_SPREAD
    counts: dict[str, int] = {}
    for host in hosts:
        domain = domain_of(rule.key, host)
        if domain is not None and host.traits.takes_new and unfit_traits(demand, host.traits) is None:
            counts[domain] = counts.get(domain, 0) + host.groups.get((demand.tenant, demand.group), 0)
    return SpreadCounts(counts, min(counts.values(), default=0))


def claimable(demand: Demand, host: HostFacts) -> HostPool | None:
    """The pool of `host` that surely has a ready member that can become the sandbox; the first by name."""
    if demand.cold:
        return None
    fitting = (
        pool
        for pool in host.pools
        if (pool.tenant, pool.image_digest, pool.vcpus) == (demand.tenant, demand.image_digest, demand.vcpus)
        and pool.fits_above_mib < demand.memory_max_mib <= pool.fits_to_mib
        and pool.sandbox_class is demand.sandbox_class
        and pool.ready > host.settling
    )
    return min(fitting, key=lambda pool: (pool.name, pool.uid), default=None)


def held_mib(demand: Demand, host: HostFacts) -> int:
    """What is promised already to the member that the sandbox would claim."""
    if not host.pools:
        return 0
    pool = claimable(demand, host)
    return 0 if pool is None else pool.memory_min_mib + host.capacity.vm_overhead_mib


def own_mib(demand: Demand, host: HostFacts) -> int:
    """What the sandbox takes there for itself alone: its charge, the overhead of a guest, page tables."""
    return demand.charge_mib + host.capacity.vm_overhead_mib + demand.extra_mib


def missing_mib(demand: Demand, host: HostFacts, policy: Policy) -> int:
    """The layers that nobody of its domain maps there yet (all of them under a policy that does not share)."""
    there = host.mapped_layers if policy.share else ()
    layers = {layer.digest: layer for layer in demand.layers}.values()
    return sum(layer_mib(layer) for layer in layers if (demand.domain, layer.digest) not in there)


def marginal_all_mib(demand: Demand, host: HostFacts, policy: Policy) -> int:
    """What must be free there: its own and the missing layers."""
    return own_mib(demand, host) + missing_mib(demand, host, policy)


def marginal_mib(demand: Demand, host: HostFacts, policy: Policy) -> int:
    """What the sandbox adds to the host's memory: the same without what a claimed member has already."""
    own = max(0, own_mib(demand, host) - held_mib(demand, host))
    return own + missing_mib(demand, host, policy)


def refusal_of(demand: Demand, host: HostFacts, policy: Policy, spread: SpreadCounts) -> Refusal | None:
    """Why `host` cannot take it, or None when it can."""
    problem = (
        unfit_traits(demand, host.traits)
        or unfit_presence(demand, host)
        or unfit_sizes(demand, host, policy)
        or unfit_spread(demand, host, spread)
    )
    traits = host.traits
    if not traits.takes_new:
        reason, text = ("Cordoned", "is cordoned") if traits.ready else ("HostLost", "is LOST: its lease ran out")
        also = "" if problem is None else f", and: {problem[1]}"
        return Refusal(host.name, reason, f"{host.name} {text}{also}", for_now=problem is None)
    return None if problem is None else Refusal(host.name, problem[0], f"{host.name}: {problem[1]}", lacking=problem[2])


def level_of(demand: Demand, host: HostFacts, policy: Policy) -> int:
    """The first level that holds after the placement; the last one when only that does."""
    asked_milli = host.cpu_asked_milli + demand.cpu_milli
    for number, level in enumerate(policy.levels[:-1]):
        cpu_fits = asked_milli <= int(host.capacity.cpu_milli * level.cpu_overcommit)
        if cpu_fits and (not level.ceilings or _ceiling_fits(demand, host, policy)):
            return number
    return len(policy.levels) - 1


def _ceiling_fits(demand: Demand, host: HostFacts, policy: Policy) -> bool:
    more = demand.ceiling_mib + host.capacity.vm_overhead_mib + demand.extra_mib + missing_mib(demand, host, policy)
    return more <= host.uncommitted_mib
