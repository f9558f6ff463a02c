"""What a removal enters into the usage ledger, what of it is kept, and how tenants read it over real gRPC."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from controlplane import keys
from controlplane.api.identity import Role
from controlplane.api.v1 import sandboxes_pb2 as pb
from controlplane.model import Phase, Resources, Sandbox, SandboxSpec, SandboxStatus
from controlplane.store.contract import Put
from controlplane.store.sqlite import open_sqlite
from controlplane.usageledger import KEPT_S, UsageLedger, doomed, usage_of
from tests.controlplane.conftest import Plane

SANDBOX = Sandbox("box", "u1", "acme", SandboxSpec("base", Resources(256, 1024, 256, 1000)), 90.0, 1, host="h1")


def test_a_sandbox_is_entered_with_its_time() -> None:
    ended = replace(SANDBOX, status=SandboxStatus(Phase.EXITED, started_at_s=100.0, finished_at_s=160.0))
    usage = usage_of(ended, now_s=500.0)
    assert usage is not None
    assert (usage.created_at_s, usage.started_at_s, usage.ended_at_s) == (90.0, 100.0, 160.0)
    assert (usage.image, usage.resources, usage.host) == ("base", ended.spec.resources, "h1")


def test_one_that_is_removed_while_it_runs_ended_now() -> None:
    running = replace(SANDBOX, status=SandboxStatus(Phase.RUNNING, started_at_s=100.0))
    usage = usage_of(running, now_s=500.0)
    assert usage is not None
    assert usage.ended_at_s == 500.0


def test_one_that_never_ran_took_nothing() -> None:
    assert usage_of(SANDBOX, now_s=500.0) is None


def test_what_is_old_or_too_much_goes_of_each_tenant_apart() -> None:
    found = [keys.ledger("a", at, f"u{at}") for at in (1, 2, 3, 4)] + [keys.ledger("b", 1, "v1")]
    assert doomed(found, oldest_ns=2, most=2) == [found[0], found[1], found[4]]
    assert doomed(found, oldest_ns=1, most=4) == []


async def test_pruning_keeps_what_is_promised(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "s.db") as store:
        now_s = 10 * KEPT_S
        at_ns = [int((now_s - age_s) * 1e9) for age_s in (KEPT_S + 1, KEPT_S - 1, 0)]
        await store.commit([Put(keys.ledger("t", removed_ns, "u"), b"{}") for removed_ns in at_ns])
        assert await UsageLedger(store, now_s=lambda: now_s).prune() == 1
        assert [record.key for record in (await store.page(keys.LEDGER)).records] == [
            keys.ledger("t", removed_ns, "u") for removed_ns in at_ns[1:]
        ]


async def test_a_removed_sandbox_is_in_the_ledger_of_its_tenant_alone(plane: Plane) -> None:
    host = await plane.host()
    mine, other = await plane.client(Role.TENANT, "mine"), await plane.client(Role.TENANT, "other")
    await mine.import_image()
    for name in ("one", "two", "never"):
        box = await mine.create(name, remove_on_exit=True)
        await host.until(lambda box=box: box.uid in host.assigned)  # type: ignore[misc]
        if name != "never":
            await host.tell(box.uid, pb.RUNNING, started_at=box.created_at)
            await host.tell(box.uid, pb.EXITED, exit_code=0, started_at=box.created_at, finished_at=box.created_at)
        await host.tell(box.uid, pb.EXITED, exit_code=0, removed=True)
    first = await mine.sandboxes.ListUsage(pb.ListUsageRequest(page_size=1), timeout=10)
    rest = await mine.sandboxes.ListUsage(
        pb.ListUsageRequest(page_size=1, page_token=first.next_page_token), timeout=10
    )
    assert [usage.name for usage in (*first.usage, *rest.usage)] == ["one", "two"]
    assert (first.usage[0].image, first.usage[0].resources.memory_min_mib, rest.next_page_token) == ("base", 256, "")
    assert not (await other.sandboxes.ListUsage(pb.ListUsageRequest(), timeout=10)).usage
    assert not (await mine.sandboxes.ListSandboxes(pb.ListSandboxesRequest(ended=True), timeout=10)).sandboxes
