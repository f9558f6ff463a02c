"""What a tenant may have at once: sandboxes and pools' members together, as a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.errors import Exhausted
from controlplane.model import Phase, Placed, Pool, PoolSpec, Resources, Sandbox, SandboxSpec, SandboxStatus
from controlplane.poolspread import allowed
from controlplane.quotas import Quota, members_of, require_pool_within, require_within, usage


def sizes(low: int = 256, high: int = 1024, cpu_milli: int = 1000) -> Resources:
    return Resources(low, high, low, cpu_milli)


def box(name: str, resources: Resources | None = None, *, phase: Phase = Phase.RUNNING, pool: str = "") -> Sandbox:
    placed = Placed("h", 1, 1, 0, 0, 0, pool) if pool else None
    spec = SandboxSpec("base", resources or sizes())
    return Sandbox(name, name, "acme", spec, 0.0, 1, status=SandboxStatus(phase), host="h", placed=placed)


def pool(name: str, size: int, resources: Resources | None = None) -> Pool:
    return Pool(name, f"uid-{name}", "acme", PoolSpec("base", resources or sizes(), size, "d"), 0.0)


def test_a_pool_is_filled_as_far_as_the_quota_leaves_room() -> None:
    pools = [pool("b", 3), pool("a", 2)]
    assert members_of(Quota(sandboxes=4), [box("one")], pools) == {"uid-a": 2, "uid-b": 1}
    assert members_of(Quota(memory_max_mib=2500), [box("one")], pools) == {"uid-a": 1, "uid-b": 0}
    assert members_of(Quota(cpu_milli=500), [], pools) == {"uid-a": 0, "uid-b": 0}
    assert members_of(Quota(), [box("one")], pools) == {"uid-a": 2, "uid-b": 3}
    assert members_of(Quota(sandboxes=2), [box("one", phase=Phase.EXITED)], [pool("a", 2)]) == {"uid-a": 2}


def test_a_claim_takes_a_member_s_place() -> None:
    quota, pools = Quota(sandboxes=2), [pool("web", 2)]
    require_within(quota, [], box("one"), pools, claimed="web")
    with pytest.raises(Exhausted, match="it has 2 and asks for 1 more"):
        require_within(quota, [], box("one"), pools)
    require_within(quota, [box("one")], box("two"), pools, claimed="web")
    with pytest.raises(Exhausted):
        require_within(quota, [box("one"), box("two")], box("three"), pools, claimed="web")


def test_a_member_is_kept_for_the_sandbox_that_comes_for_it() -> None:
    quota, pools = Quota(sandboxes=2), [pool("web", 2)]

    def kept(*live: Sandbox) -> list[int]:
        return [one.spec.size for one in allowed(pools, lambda _: quota, lambda _: live)]

    assert kept(box("one", phase=Phase.SCHEDULED, pool="web")) == [2]
    assert kept(box("one", phase=Phase.STARTING, pool="web")) == [1]
    assert kept(box("one", phase=Phase.SCHEDULED)) == [1]


def test_usage_counts_members_too() -> None:
    used = usage(Quota(), [box("one"), box("old", phase=Phase.FAILED)], [pool("web", 3)], [])
    assert (used.sandboxes, used.memory_min_mib, used.memory_max_mib, used.cpu_milli, used.pools) == (
        4, 1024, 4096, 4000, 1,
    )  # fmt: skip


BOUND = st.none() | st.integers(0, 12)
SIZES = st.builds(
    lambda low, more, cpu: sizes(low, low + more, cpu), st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)
)


@given(
    st.builds(Quota, BOUND, BOUND, BOUND, BOUND),
    st.lists(SIZES, max_size=5),
    st.lists(st.tuples(SIZES, st.integers(0, 9)), max_size=3),
    SIZES,
    st.sampled_from(["", "p0", "p1"]),
)
def test_sandboxes_and_members_never_come_to_more_than_the_quota(
    quota: Quota, asked: list[Resources], kept: list[tuple[Resources, int]], last: Resources, claimed: str
) -> None:
    live: list[Sandbox] = []
    pools = [pool(f"p{number}", size, resources) for number, (resources, size) in enumerate(kept)]
    for number, resources in enumerate([*asked, last]):
        try:
            require_within(quota, live, box(str(number), resources), pools, claimed=claimed)
        except Exhausted:
            continue
        live.append(box(str(number), resources))
    used = usage(quota, live, pools, [])
    for name in ("sandboxes", "memory_min_mib", "memory_max_mib", "cpu_milli"):
        most = getattr(quota, name)
        assert most is None or getattr(used, name) <= most, name


def test_a_pool_that_is_too_large_is_refused_by_each_bound() -> None:
    for quota, bound in (
        (Quota(sandboxes=2), "sandboxes"), (Quota(memory_min_mib=767), "memory_min_mib"),
        (Quota(memory_max_mib=3071), "memory_max_mib"), (Quota(cpu_milli=2999), "cpu_milli"),
    ):  # fmt: skip
        with pytest.raises(Exhausted) as refused:
            require_pool_within(quota, [], [], pool("web", 3))
        assert dict(refused.value.details)["quota"] == bound
    require_pool_within(Quota(3, 768, 3072, 3000), [], [pool("web", 1)], pool("web", 3))
