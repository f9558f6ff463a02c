"""The index answers what looking at every host answers, whatever happened to the hosts before."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import scheduler
from controlplane.model import Capacity, HostPool, LayerSize, SandboxClass
from controlplane.rules import Rules, Spread, Trust, parse_affinity
from controlplane.scheduler import Demand, HostState, Policy
from controlplane.scheduler_index import Index
from controlplane.scheduler_rooms import BLOCK
from controlplane.scheduler_values import Level

MIB = 1 << 20
LAYERS = tuple(LayerSize(f"l{number}", (40 + 37 * number) * MIB - number) for number in range(9))
IMAGES = {
    "base": LAYERS[:2], "web": LAYERS[:4], "db": (*LAYERS[:2], LAYERS[4]), "odd": (LAYERS[3], LAYERS[5]),
    "whole": LAYERS, "none": (),
}  # fmt: skip
POLICIES = (
    Policy(),
    Policy(levels=(Level(16.0),)),
    Policy(levels=(Level(1.0), Level(2.0, ceilings=True), Level(4.0)), share=False),
)


def some_host(random: Random, name: str) -> HostState:
    """A host on which nothing runs."""
    images = frozenset((tenant, image) for tenant in "tu" for image in IMAGES if random.random() < 0.7)
    pools = tuple(
        HostPool(f"p{number}", f"pool{number}", "t", random.choice(list(IMAGES)), ready=random.randrange(3),
                 memory_min_mib=256, fits_to_mib=2048)
        for number in range(random.choice((0, 0, 0, 2)))
    )  # fmt: skip
    memory_mib = random.choice((2048, 4096, 8192))
    return HostState(
        name, random.random() < 0.9,
        Capacity(memory_mib, memory_mib - random.choice((0, 0, 700)), 0, random.choice((2000, 8000)), 0, 256,
                 random.choice((64, 64, 80))),
        frozenset({SandboxClass.GUEST_KERNEL}), images, frozenset(), pools=pools,
        labels=(("zone", random.choice("ab")),) if random.random() < 0.8 else (),
        taints=(("gpu", ""),) if random.random() < 0.1 else (), accel=random.choice(("kvm", "tcg")),
        smt=random.random() < 0.3, cordoned=random.random() < 0.05, limits={"pids": random.choice((3, 1000))},
    )  # fmt: skip


def some_demand(random: Random) -> Demand:
    image = random.choice(list(IMAGES))
    minimum_mib = random.choice((64, 256, 256, 900))
    rules = Rules()
    if random.random() < 0.4:
        rules = Rules(
            affinity=random.choice(((), (parse_affinity("zone=a"),), (parse_affinity("!zone"),))),
            tolerations=random.choice(((), (("gpu", ""),))),
            spread=random.choice((None, Spread("host"), Spread("host", 1), Spread("zone"), Spread("zone", 2))),
            trust=Trust(random.random() < 0.2, random.random() < 0.2, random.random() < 0.15),
        )
    return Demand(
        random.choice("ttu"), SandboxClass.GUEST_KERNEL, minimum_mib, random.choice((500, 1000, 3000)), image,
        IMAGES[image], random.choice((minimum_mib, 1024, 2048)), rules=rules, group=image, cold=random.random() < 0.5,
        expected_mib=random.choice((0, 300)), extra_mib=random.choice((0, 3)), extras=(("pids", 1),),
        share_domain=random.choice(("", "", "all")), fetchable=random.random() < 0.3,
    )  # fmt: skip


class World:
    """Hosts with what runs on them, as plain values, beside an index that is told of every change."""

    def __init__(self, random: Random, hosts: int, policy: Policy) -> None:
        self.policy, self.random = policy, random
        self.empty = {name: some_host(random, name) for name in (f"h{number:03}" for number in range(hosts))}
        self.there: dict[str, list[Demand]] = {name: [] for name in self.empty}
        self.index = Index(policy, self.empty.values())
        self.as_numbers: set[str] = set()

    def state(self, name: str) -> HostState:
        there = self.there[name]
        return scheduler.loaded(self.empty[name], there, there, share=self.policy.share)

    def states(self) -> list[HostState]:
        return [self.state(name) for name in self.empty]

    def step(self) -> None:
        roll, name = self.random.random(), self.random.choice(list(self.empty))
        if roll < 0.2 and self.there[name] and name not in self.as_numbers:
            self.index.release(name, self.there[name].pop(self.random.randrange(len(self.there[name]))))
        elif roll < 0.28:
            self.empty[name] = some_host(self.random, name)
            self.there[name] = []
            self.as_numbers.discard(name)
            self.index.put(self.empty[name])
        elif roll < 0.33:
            self.index.put(self.state(name))
            self.as_numbers.add(name)  # as a report has it: which sandboxes these are is not known to the index
        else:
            self.decide(some_demand(self.random))

    def decide(self, demand: Demand) -> None:
        told = scheduler.place(demand, self.states(), self.policy)
        found = self.index.place(demand)
        assert found == told.placement
        if found is None:
            assert self.index.decide(demand).refusals == told.refusals
            back = any(refused.for_now for refused in told.refusals)
            assert self.index.fits_when_back(demand) == back
            return
        self.index.assume(found.host, demand)
        self.there[found.host].append(demand)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 9), st.sampled_from(POLICIES))
def test_it_chooses_what_a_look_at_every_host_chooses(seed: int, hosts: int, policy: Policy) -> None:
    world = World(Random(seed), hosts, policy)
    for _ in range(60):
        world.step()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_with_more_hosts_than_a_block_has(policy: Policy) -> None:
    world = World(Random(7), 3 * BLOCK, policy)
    for _ in range(60):
        world.step()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 6), st.integers(1, 60))
def test_a_batch_is_placed_as_one_by_one_and_never_promises_more_than_there_is(
    seed: int, hosts: int, count: int
) -> None:
    random = Random(seed)
    empty = {name: replace(some_host(random, name), pools=()) for name in (f"h{at}" for at in range(hosts))}
    demands = [some_demand(random) for _ in range(count)]
    index, there = Index(Policy(), empty.values()), dict[str, list[Demand]]((name, []) for name in empty)
    for demand, placement in zip(demands, index.place_all(demands), strict=True):
        told = scheduler.place(demand, [scheduler.loaded(empty[name], there[name], there[name]) for name in empty])
        assert placement == told.placement
        if placement is not None:
            there[placement.host].append(demand)  # on one host, and on no other
    for name, mine in there.items():
        state, row = scheduler.loaded(empty[name], mine, mine), index.row(name)
        assert min(state.unpromised_mib, state.usable_mib) >= 0 or not mine
        assert (row.unpromised_mib, row.usable_mib, row.mapped_mib) == (
            state.unpromised_mib, state.usable_mib, state.mapped_mib,
        )  # fmt: skip
        assert sum(demand.memory_min_mib for demand in mine) <= state.capacity.memory_mib
