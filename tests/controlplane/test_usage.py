"""Measured use: recorded from what hosts tell, charged by its quantile, and forgotten."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from controlplane import codec, keys
from controlplane.api.v1 import sandboxes_pb2 as pb
from controlplane.sampling import Sampler
from controlplane.scheduler import DEFAULT_POLICY
from controlplane.store.contract import Put
from controlplane.usage import (
    GROWTH,
    HALF_LIFE_S,
    KEPT_S,
    LEAST_SAMPLES,
    Use,
    expected_mib,
    quantile_mib,
    with_samples,
)
from controlplane.view import View
from tests.controlplane.conftest import Plane
from tests.controlplane.fakehost import DIGEST

EMPTY = Use("t", "d")


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_quantile_is_right_to_a_bucket(sizes: list[float], share: float) -> None:
    use = with_samples(EMPTY, sizes, 5.0)
    found = quantile_mib(dict(use.buckets), share)
    exact = sorted(sizes)[max(0, -int(-share * len(sizes) * (1 - 1e-9) // 1) - 1)]
    assert exact * (1 - 1e-6) <= found <= max(1.0, exact) * GROWTH * (1 + 1e-6)


def test_nothing_is_charged_before_there_are_enough_samples() -> None:
    few = with_samples(EMPTY, [500.0] * (LEAST_SAMPLES - 1), 5.0)
    assert expected_mib(few, 0.95) == 0
    assert 500 <= expected_mib(with_samples(few, [500.0], 6.0), 0.95) <= 526


def test_old_samples_fade() -> None:
    use = with_samples(EMPTY, [1000.0] * 100, 0.0)
    later = with_samples(use, [100.0] * 100, 10 * HALF_LIFE_S)
    assert later.samples == 200
    assert expected_mib(later, 0.95) < 120
    assert (later.first_s, later.newest_s) == (0.0, 10 * HALF_LIFE_S)
    assert codec.decode(Use, codec.encode(later), "k") == later


def _seen(view: View, samples: int) -> bool | None:
    use = view.measured.uses.get(("default", DIGEST))
    return True if use is not None and use.samples >= samples else None


async def test_what_hosts_tell_is_charged_to_those_to_come(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box", memory_mib=256, max_mib=2048)
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, pb.RUNNING)
    held = pb.SandboxMemory(name="box", uid=box.uid, guest_ram_bytes=700 << 20)
    host.ledger = pb.SharingLedger(sandboxes=[held, pb.SandboxMemory(name="other", uid="unknown", guest_ram_bytes=1)])
    parts, now_s = plane.parts, 1000.0
    sampler = Sampler(parts.store, parts.view, parts.links, now_s=lambda: now_s)
    for number in range(LEAST_SAMPLES):
        now_s = 1000.0 + number
        await sampler.sample()
        await parts.view.until(partial(_seen, parts.view, number + 1))
    assert parts.view.measured.uses["default", DIGEST].samples == LEAST_SAMPLES
    charged_mib = parts.view.measured.expected["default", DIGEST]
    assert 700 <= charged_mib <= 736
    state = parts.view.census.state("h1")
    assert state is not None
    assert state.promised_mib == charged_mib + state.capacity.vm_overhead_mib  # what runs is charged, too
    await client.create("next", memory_mib=256, max_mib=2048)
    told = await client.sandboxes.ExplainSandbox(pb.ExplainSandboxRequest(name="next"), timeout=20)
    assert told.charge_mib == charged_mib
    assert DEFAULT_POLICY.quantile == 0.95


async def test_what_was_not_seen_for_long_is_forgotten(plane: Plane) -> None:
    parts = plane.parts
    gone = with_samples(Use("t", "sha256:gone"), [5.0], 0.0)
    await parts.view.reached(await parts.store.commit([Put(keys.use("t", "sha256:gone"), codec.encode(gone))]))
    await Sampler(parts.store, parts.view, parts.links, now_s=lambda: KEPT_S - 1).sample()
    assert ("t", "sha256:gone") in parts.view.measured.uses
    await Sampler(parts.store, parts.view, parts.links, now_s=lambda: KEPT_S + 1).sample()
    await parts.view.until(lambda: not parts.view.measured.uses or None)
