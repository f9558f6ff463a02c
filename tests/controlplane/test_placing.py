"""What a sandbox asks of the hosts there are: who may fetch its image, by the view and by an explanation alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from controlplane import codec, keys
from controlplane.explaining import explain
from controlplane.model import Capacity, Host, Residency, Resources, Sandbox, SandboxClass, SandboxSpec
from controlplane.placing import demand_on
from controlplane.scheduler import HostState
from controlplane.store.contract import Delete, Put
from tests.controlplane.test_view import viewed

BOX = Sandbox("box", "u", "t", SandboxSpec("base", Resources(256, 1024, 256, 1000), image_digest="d"), 1.0, 1)
SIZES = Capacity(8192, 8192, 0, 4000, 10_000, 512, 64)


async def test_an_image_may_be_fetched_while_a_host_that_answers_has_it(tmp_path: Path) -> None:
    async with viewed(tmp_path / "store.db") as (store, view):
        assert not demand_on(view, BOX).fetchable
        held = Put(keys.residency("t", "d", "h1"), codec.encode(Residency("t", "d", "h1", 1.0)))
        host = Put(keys.host("h1"), codec.encode(Host("h1", SIZES, "127.0.0.1:1", 1.0)))
        await view.reached(await store.commit([host, held]))
        assert not demand_on(view, BOX).fetchable  # its lease does not hold: nothing can be fetched from it
        await view.reached(await store.commit([Put(keys.alive("h1"), b"")]))
        assert demand_on(view, BOX).fetchable
        assert not demand_on(view, replace(BOX, tenant="other")).fetchable
        assert not demand_on(view, replace(BOX, only_host="h1")).fetchable
        from_checkpoint = replace(BOX, spec=replace(BOX.spec, checkpoint="c"), only_host="h1")
        assert demand_on(view, from_checkpoint).fetchable  # it brings its layers with it
        await view.reached(await store.commit([Delete(keys.alive("h1"))]))
        assert not demand_on(view, BOX).fetchable


def host(name: str, *, holds: bool, ready: bool = True) -> HostState:
    images = frozenset({("t", "d")}) if holds else frozenset()
    return HostState(name, ready, SIZES, frozenset({SandboxClass.GUEST_KERNEL}), images, frozenset())


@pytest.mark.parametrize(
    ("holder", "box", "other"),
    [
        (host("h1", holds=True), BOX, ""),
        (host("h1", holds=False), BOX, "ImageNotResident"),
        (host("h1", holds=True, ready=False), BOX, "ImageNotResident"),
        (host("h1", holds=True), replace(BOX, only_host="h1"), "ImageNotResident"),
        (host("h1", holds=True), replace(BOX, tenant="other"), "ImageNotResident"),
    ],
    ids=["held", "nowhere", "holder lost", "bound to a host", "another tenant's"],
)
def test_an_explanation_counts_what_can_be_fetched(holder: HostState, box: Sandbox, other: str) -> None:
    told = explain(box, [holder, host("h2", holds=False)], most=10)
    verdicts = {verdict.host: verdict for verdict in told.verdicts}
    refusal = verdicts["h2"].refusal
    assert (refusal.reason if refusal else "") == other
    score = verdicts["h2"].score
    assert score is None or score.fetch
