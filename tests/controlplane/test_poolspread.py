"""How pools are spread over hosts, as a pure function; and what a ready member is worth to the scheduler."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from controlplane.model import Capacity, HostPool, Pool, PoolSpec, Resources, SandboxClass
from controlplane.poolspread import most_on, shares_of, spread
from controlplane.scheduler import Demand, HostState, claimable, place

GUESTS = frozenset({SandboxClass.GUEST_KERNEL})
HELD = frozenset({("acme", "d")})


def host(name: str, memory_mib: int = 8192, *, ready: bool = True, holds: bool = True, **changes: object) -> HostState:
    sizes = Capacity(memory_mib, memory_mib, 0, 4000, 10_000, 512, 64)
    state = HostState(name, ready, sizes, GUESTS, HELD if holds else frozenset(), frozenset())
    return replace(state, **changes)  # type: ignore[arg-type]


def pool(size: int = 4, name: str = "web", min_mib: int = 256) -> Pool:
    spec = PoolSpec("base", Resources(min_mib, 1024, min_mib, 1000), size, "d")
    return Pool(name, f"uid{name}", "acme", spec, 0.0)


def test_members_go_where_the_image_is_the_largest_host_first() -> None:
    hosts = [host("a", 4096), host("b"), host("c", holds=False), host("d", ready=False)]
    assert spread(pool(3), hosts, image_bound=True).wanted == {"b": 2, "a": 1}


def test_no_host_gets_more_than_its_memory_could_hold() -> None:
    small = host("a", 512 + 320 * 2)
    made = spread(pool(5), [small, host("b", 512 + 320)], image_bound=True)
    assert made.wanted == {"a": 2, "b": 1}
    assert made.message == "3 of 5 members fit on the hosts that hold its image"


def test_what_cannot_be_is_said() -> None:
    assert "no READY host holds image base" in spread(pool(), [host("a", holds=False)], image_bound=True).message
    assert "removed" in spread(pool(), [host("a")], image_bound=False).message
    assert spread(pool(0), [], image_bound=False).message == ""
    assert shares_of("a", [pool()], [host("a")], []) == ()


HOSTS = st.lists(
    st.builds(host, st.sampled_from("abcdef"), st.integers(0, 9000), ready=st.booleans(), holds=st.booleans()),
    unique_by=lambda one: one.name,
)


@given(HOSTS, st.integers(0, 60), st.integers(1, 4000), st.randoms())
def test_any_spread_keeps_its_bounds_whatever_the_order(
    hosts: list[HostState], size: int, min_mib: int, random: object
) -> None:
    asked = pool(size, min_mib=min_mib)
    made = spread(asked, hosts, image_bound=True)
    shuffled = list(hosts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert spread(asked, shuffled, image_bound=True) == made
    able = {one.name: one for one in hosts if one.ready and one.images}
    assert set(made.wanted) <= set(able)
    assert all(count <= most_on(asked, able[name]) for name, count in made.wanted.items())
    total = sum(made.wanted.values())
    assert total == min(size, sum(most_on(asked, one) for one in able.values()))
    assert (made.message == "") == (total == size)


MEMBER = HostPool("u", "web", "acme", "d", ready=1, vcpus=1, memory_min_mib=256, fits_above_mib=512, fits_to_mib=1024)
DEMAND = Demand("acme", SandboxClass.GUEST_KERNEL, 256, 1000, "d", (), 1024, 1)


def test_which_members_a_sandbox_can_claim() -> None:
    warm = host("a", pools=(MEMBER,))
    assert claimable(DEMAND, warm) is MEMBER
    for other in (
        replace(DEMAND, cold=True), replace(DEMAND, tenant="other"), replace(DEMAND, image_digest="e"),
        replace(DEMAND, vcpus=2), replace(DEMAND, memory_max_mib=512), replace(DEMAND, memory_max_mib=1025),
        replace(DEMAND, sandbox_class=SandboxClass.HOST_KERNEL),
    ):  # fmt: skip
        assert claimable(other, warm) is None
    assert claimable(DEMAND, replace(warm, settling=1)) is None


def test_a_full_host_still_takes_the_sandbox_that_its_member_was_kept_for() -> None:
    full = host("a", 512 + 320, pools=(MEMBER,), promised_mib=320)
    chosen = place(DEMAND, [full]).placement
    assert chosen is not None and (chosen.host, chosen.pool, chosen.marginal_mib) == ("a", "web", 0)
    assert place(replace(DEMAND, cold=True), [full]).placement is None


def test_a_warm_host_wins_over_a_roomier_one() -> None:
    chosen = place(DEMAND, [host("a", 64_000), host("b", 4096, pools=(MEMBER,), promised_mib=320)]).placement
    assert chosen is not None and chosen.host == "b"
