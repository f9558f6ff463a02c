"""The scheduler's promises, on made-up fabrics: never more than a host admits, sharing counts, reasons with numbers."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import scheduler
from controlplane.model import (
    Capacity,
    CountedLimit,
    Host,
    LayerSize,
    Phase,
    Process,
    Residency,
    Resources,
    Sandbox,
    SandboxClass,
    SandboxSpec,
    SandboxStatus,
)
from controlplane.rules import Rules, Spread, parse_affinity, parse_trust
from controlplane.scheduler import Demand, HostState, Policy

few = settings(max_examples=40, deadline=None)
GUEST = SandboxClass.GUEST_KERNEL
DIGESTS = ("sha256:1", "sha256:2")
LAYERS = {
    "sha256:1": (LayerSize("base", 100 << 20), LayerSize("one", 50 << 20)),
    "sha256:2": (LayerSize("base", 100 << 20), LayerSize("two", (10 << 20) + 1)),
}


def host_state(name: str = "h", **how: object) -> HostState:
    whole = HostState(
        name=name,
        ready=True,
        capacity=Capacity(
            memory_mib=4096, memory_available_mib=4096, cpu_milli=4000, system_reserve_mib=512, vm_overhead_mib=64
        ),
        classes=frozenset({GUEST}),
        images=frozenset({("t", "sha256:1")}),
        mapped_layers=frozenset(),
    )
    return replace(whole, **how)  # type: ignore[arg-type]


def demand(memory_min_mib: int = 256, **how: object) -> Demand:
    whole = Demand("t", GUEST, memory_min_mib, 1000, "sha256:1", LAYERS["sha256:1"])
    return replace(whole, **how)  # type: ignore[arg-type]


capacities = st.builds(
    Capacity,
    memory_mib=st.integers(0, 8192),
    memory_available_mib=st.integers(0, 8192),
    cpu_milli=st.integers(0, 8000),
    system_reserve_mib=st.integers(0, 1024),
    vm_overhead_mib=st.integers(0, 128),
)
states = st.builds(
    HostState,
    name=st.sampled_from("abcdefgh"),
    ready=st.booleans(),
    capacity=capacities,
    classes=st.frozensets(st.sampled_from(SandboxClass)),
    images=st.frozensets(st.tuples(st.sampled_from("tu"), st.sampled_from(DIGESTS))),
    mapped_layers=st.frozensets(st.tuples(st.sampled_from("tu"), st.sampled_from(("base", "one", "two")))),
    promised_mib=st.integers(0, 8192),
    unsettled_mib=st.integers(0, 1024),
    cpu_asked_milli=st.integers(0, 100_000),
)
fabrics = st.lists(states, max_size=6, unique_by=lambda state: state.name)
demands = st.builds(
    Demand,
    tenant=st.sampled_from("tu"),
    sandbox_class=st.sampled_from(SandboxClass),
    memory_min_mib=st.integers(1, 4096),
    cpu_milli=st.integers(1, 8000),
    image_digest=st.sampled_from(DIGESTS),
    layers=st.sampled_from(list(LAYERS.values())),
)


@few
@given(demands, fabrics)
def test_a_placement_is_on_a_host_that_can_take_it_and_every_other_one_says_why(
    wanted: Demand, hosts: list[HostState]
) -> None:
    decision = scheduler.place(wanted, hosts)
    if decision.placement is None:
        assert sorted(refusal.host for refusal in decision.refusals) == sorted(host.name for host in hosts)
        assert all(refusal.message and refusal.reason for refusal in decision.refusals)
        return
    chosen = next(host for host in hosts if host.name == decision.placement.host)
    need_mib = wanted.memory_min_mib + chosen.capacity.vm_overhead_mib
    sizes = chosen.capacity
    assert chosen.ready
    assert wanted.sandbox_class in chosen.classes
    assert (wanted.tenant, wanted.image_digest) in chosen.images
    assert chosen.promised_mib + need_mib <= sizes.memory_mib - sizes.system_reserve_mib
    assert need_mib <= sizes.memory_available_mib - sizes.system_reserve_mib - chosen.unsettled_mib
    assert decision.placement.marginal_mib >= need_mib


@few
@given(demands, fabrics, st.randoms())
def test_the_order_of_hosts_does_not_matter(wanted: Demand, hosts: list[HostState], random: object) -> None:
    shuffled = list(hosts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert scheduler.place(wanted, hosts).placement == scheduler.place(wanted, shuffled).placement


@few
@given(demands, fabrics)
def test_the_choice_is_the_cheapest_of_those_that_fit(wanted: Demand, hosts: list[HostState]) -> None:
    decision = scheduler.place(wanted, hosts)
    fit = [host for host in hosts if scheduler.refusal(wanted, host) is None]
    if fit:
        assert decision.placement is not None
        chosen = next(host for host in fit if host.name == decision.placement.host)
        assert scheduler.score(wanted, chosen) == min(scheduler.score(wanted, host) for host in fit)
    else:
        assert decision.placement is None


@few
@given(demands, states)
def test_mapping_a_layer_of_ones_own_domain_never_makes_a_host_dearer(wanted: Demand, host: HostState) -> None:
    layer = wanted.layers[0]
    shared = replace(host, mapped_layers=host.mapped_layers | {(wanted.tenant, layer.digest)})
    strange = replace(host, mapped_layers=host.mapped_layers | {("somebody", layer.digest)})
    assert scheduler.marginal_mib(wanted, shared) <= scheduler.marginal_mib(wanted, host)
    assert scheduler.marginal_mib(wanted, strange) == scheduler.marginal_mib(wanted, host)


@few
@given(st.lists(st.integers(1, 2000), max_size=40))
def test_placing_one_after_the_other_never_promises_more_than_there_is(minimums: list[int]) -> None:
    """As the control plane does it: each decision sees the ones before."""
    hosts = [Host(name, host_state().capacity, "x:1", 0.0, (GUEST,)) for name in ("a", "b")]
    held = [Residency("t", "sha256:1", host.name, 0.0) for host in hosts]
    placed: list[Sandbox] = []
    for at, minimum in enumerate(minimums):
        wanted = sandbox(f"s{at}", minimum)
        surveyed = scheduler.survey(hosts, {"a", "b"}, placed, held)
        decision = scheduler.place(Demand.of(wanted), surveyed)
        if decision.placement is not None:
            placed.append(replace(wanted, host=decision.placement.host, status=SandboxStatus(Phase.SCHEDULED)))
    for host in hosts:
        promised = sum(s.spec.resources.memory_min_mib + 64 for s in placed if s.host == host.name)
        assert promised <= 4096 - 512


def sandbox(uid: str, minimum_mib: int, **how: object) -> Sandbox:
    sizes = Resources(minimum_mib, minimum_mib, minimum_mib, 1000)
    spec = SandboxSpec("base", sizes, Process(("sh",)), "sha256:1")
    return replace(Sandbox(uid, uid, "t", spec, 0.0, 1, LAYERS["sha256:1"]), **how)  # type: ignore[arg-type]


def test_marginal_memory_is_guarantee_overhead_and_the_layers_nobody_maps_there() -> None:
    assert scheduler.marginal_mib(demand(), host_state()) == 256 + 64 + 150
    assert scheduler.marginal_mib(demand(), host_state(mapped_layers=frozenset({("t", "base")}))) == 256 + 64 + 50
    two = demand(image_digest="sha256:2", layers=LAYERS["sha256:2"])
    assert scheduler.marginal_mib(two, host_state()) == 256 + 64 + 111  # a part of a MiB counts whole


def test_sandboxes_of_one_image_gather_until_their_host_would_be_strained() -> None:
    mapped = frozenset({("t", "base"), ("t", "one")})
    there = host_state("b", mapped_layers=mapped, mapped_mib=150, promised_mib=3000, ceilings_mib=3000)
    assert _choice(host_state("a"), there) == "b"
    assert _choice(host_state("a"), replace(there, cpu_asked_milli=3500)) == "a"  # more CPU asked than there is
    assert _choice(host_state("a"), replace(there, ceilings_mib=3300)) == "a"  # not every ceiling would fit
    assert _choice(host_state("a", cordoned=True), replace(there, cpu_asked_milli=3500)) == "b"


def test_the_tightest_fit_keeps_large_rooms_whole() -> None:
    assert _choice(host_state("a"), host_state("b", promised_mib=2000), host_state("c", promised_mib=1000)) == "b"


def test_layers_are_promised_once_and_count_against_what_a_host_has() -> None:
    full = host_state(promised_mib=4096 - 512 - 320 - 149)
    assert scheduler.refusal(demand(), full) is not None
    shared = replace(full, mapped_layers=frozenset({("t", "base"), ("t", "one")}))
    assert scheduler.refusal(demand(), shared) is None
    assert scheduler.refusal(demand(), shared, Policy(share=False)) is not None


def test_what_a_workload_was_measured_to_use_is_charged_up_to_its_ceiling() -> None:
    assert demand(memory_max_mib=1024, expected_mib=700).charge_mib == 700
    assert demand(memory_max_mib=512, expected_mib=700).charge_mib == 512
    assert demand(memory_max_mib=1024, expected_mib=100).charge_mib == 256  # the guarantee holds whatever is measured
    wanted = demand(memory_max_mib=4096, expected_mib=3500)
    refusal = scheduler.refusal(wanted, host_state())
    assert refusal is not None
    assert "3500 MiB charged by its workload's measured use" in refusal.message
    assert refusal.lacking == 3500 + 64 + 150 - 3584


def test_rules_are_told_by_name() -> None:
    def reason(host: HostState, **rules: object) -> str:
        refused = scheduler.refusal(demand(rules=Rules(**rules)), host)  # type: ignore[arg-type]
        return refused.reason if refused else ""

    assert reason(host_state(), affinity=(parse_affinity("zone=eu"),)) == "AffinityNotMet"
    assert reason(host_state(labels=(("zone", "eu"),)), affinity=(parse_affinity("zone=eu"),)) == ""
    assert reason(host_state(taints=(("gpu", "a"),))) == "TaintNotTolerated"
    assert reason(host_state(taints=(("gpu", "a"),)), tolerations=(("gpu", ""),)) == ""
    assert reason(host_state(smt=True), trust=parse_trust(["no-smt"])) == "TrustNotMet"
    assert reason(host_state(accel="tcg"), trust=parse_trust(["kvm"])) == "TrustNotMet"
    assert reason(host_state(tenants=frozenset({"u"})), trust=parse_trust(["dedicated"])) == "HasOtherTenants"
    assert reason(host_state(dedicated_to="u")) == "HasOtherTenants"
    assert reason(host_state(limits={"pids": 3})) == ""
    short = scheduler.refusal(
        demand(extras=(("shared_memory_files", 4),)), host_state(limits={"shared_memory_files": 3})
    )
    assert short is not None
    assert (short.reason, short.lacking) == ("ShortOfSharedMemoryFiles", 1)


def test_a_group_is_spread_as_evenly_as_its_rule_says() -> None:
    group = {("t", "web"): 1}
    hosts = [host_state("a", labels=(("zone", "x"),), groups=group), host_state("b", labels=(("zone", "y"),))]
    even = demand(group="web", rules=Rules(spread=Spread("zone")))
    assert scheduler.place(even, hosts).placement == scheduler.placement_on(even, hosts[1])
    full = [hosts[0], replace(hosts[1], promised_mib=4000)]
    placed = scheduler.place(even, full).placement
    assert placed is not None and placed.host == "a"  # only a preference
    hard = demand(group="web", rules=Rules(spread=Spread("zone", 1)))
    assert scheduler.by_reason(scheduler.place(hard, full).refusals) == {"SpreadTooUneven": 1, "ShortOfMemory": 1}


def _choice(*hosts: HostState) -> str:
    placement = scheduler.place(demand(), hosts).placement
    assert placement is not None
    return placement.host


def test_every_reason_has_its_numbers() -> None:
    cases = [
        (host_state(ready=False), demand(), "HostLost", "lease"),
        (host_state(classes=frozenset()), demand(), "ClassNotOffered", "guest-kernel"),
        (host_state(images=frozenset()), demand(), "ImageNotResident", "image"),
        (host_state(images=frozenset({("u", "sha256:1")})), demand(), "ImageNotResident", "image"),
        (host_state(), demand(cpu_milli=5000), "ShortOfCpu", "5 CPUs needed, it has 4"),
        (host_state(cpu_asked_milli=63_500), demand(), "ShortOfCpu", "0.5 left of 4 times 16"),
        (host_state(promised_mib=3300), demand(), "ShortOfMemory", "470 MiB needed (256 MiB guaranteed + 64 MiB"),
        (host_state(promised_mib=3300), demand(), "ShortOfMemory", "284 MiB not promised"),
        (host_state(unsettled_mib=3300), demand(), "ShortOfMemory", "284 MiB usable now"),
    ]
    for host, wanted, reason, text in cases:
        refusal = scheduler.refusal(wanted, host)
        assert refusal is not None
        assert refusal.reason == reason
        assert text in refusal.message
        assert host.name in refusal.message


def test_waiting_makes_sense_only_for_a_host_that_could_take_it_when_it_returns() -> None:
    assert scheduler.place(demand(), []).may_wait
    away, full = host_state("a", ready=False), host_state("b", promised_mib=4000)
    assert scheduler.place(demand(), [away, full]).may_wait
    assert not scheduler.place(demand(), [full]).may_wait
    assert not scheduler.place(demand(5000), [away, full]).may_wait


def test_the_survey_counts_what_lives_and_what_the_host_cannot_know_yet() -> None:
    limits = (CountedLimit("pids", 50), CountedLimit("pmem_slots", 8, of_a_guest=True))
    host = Host("h", host_state().capacity, "x:1", last_seen_s=100.0, classes=(GUEST,), limits=limits)
    sandboxes = [
        sandbox("a", 100, host="h", status=SandboxStatus(Phase.RUNNING, started_at_s=50.0)),
        sandbox("b", 200, host="h", status=SandboxStatus(Phase.RUNNING, started_at_s=150.0)),  # after the report
        sandbox("c", 300, host="h", status=SandboxStatus(Phase.SCHEDULED)),
        sandbox("d", 400, host="h", status=SandboxStatus(Phase.EXITED)),
        sandbox("e", 500, host="other", status=SandboxStatus(Phase.RUNNING)),
        sandbox("f", 600),
    ]
    held = [Residency("t", "sha256:1", "h", 0.0), Residency("t", "sha256:2", "other", 0.0)]
    (state,) = scheduler.survey([host], {"h"}, sandboxes, held)
    assert (state.ready, state.promised_mib, state.unsettled_mib) == (True, 600 + 3 * 64, 500 + 2 * 64)
    assert state.cpu_asked_milli == 3000
    assert (state.limits, state.guest_limits) == ({"pids": 50 - 2 * 7}, (("pmem_slots", 8),))  # it knows of a
    assert state.images == {("t", "sha256:1")}
    assert state.mapped_layers == {("t", "base"), ("t", "one")}
    (lost,) = scheduler.survey([host], set(), sandboxes, held)
    assert not lost.ready
