"""10,000 simulated hosts and 200,000 sandboxes against one control plane on a real etcd: is everything still correct?

    lists       every sandbox once, at one revision, while others are created
    watch       from that list's revision, replayed over it, gives what a later list gives
    hosts       a host that watches its assignments is told all of its own and nothing else
    reconcile   100 hosts are lost: each of their sandboxes runs elsewhere under a higher epoch, and no other one moved

Correctness has bars (1: it holds); time, memory and CPU of the control plane are reported. The hosts and what runs on
them are put into the store as reports would have; what is asked goes through the API.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from controlplane import codec, keys, transitions
from controlplane.api.channel import connect
from controlplane.api.identity import Identity, Role
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, sandboxes_pb2, sandboxes_pb2_grpc
from controlplane.ca import Authority
from controlplane.model import LayerSize, Phase, Resources, RestartPolicy, Sandbox, SandboxSpec, SandboxStatus
from controlplane.store.contract import Put, Store, Write
from controlplane.store.etcd import open_etcd
from controlplane.store.etcdlink import EtcdAccess
from tests.bench.bench_fabric import configuration, control_plane, etcd, leader
from tests.bench.fabricload import DIGEST, IMAGE, LAYER, MIB, TENANT, Certificates, at_once, populate, wish
from tests.bench.report import Report, Runs, run

HOSTS, SANDBOXES, LOST, WATCHING = 10_000, 200_000, 100, 20
CREATES, ABREAST, PAGE = 2_000, 128, 1_000
GROUP = 1_000
DEADLINE_S = 900.0
LIST_S = 60.0
BARS = (("lists_hold", 1.0), ("watch_holds", 1.0), ("hosts_hold", 1.0), ("reconcile_holds", 1.0))


@dataclass
class Found:
    """What came of it."""

    lists: bool = False
    watch: bool = False
    hosts: bool = False
    reconcile: bool = False
    rows: list[tuple[str, float, str]] = field(default_factory=list)


def sandbox_of(number: int, hosts: int) -> Sandbox:
    """One that runs on its host, an equal share on each."""
    spec = SandboxSpec(
        IMAGE, Resources(32, 256, 32, 10), image_digest=DIGEST, restart=RestartPolicy.ON_HOST_LOSS
    )  # fmt: skip
    made = Sandbox(f"s{number:06d}", f"{number:016x}", TENANT, spec, 1e9, 1, layers=(LayerSize(LAYER, 64 * MIB),))
    there = transitions.scheduled(made, f"h{number % hosts:05d}", 1)
    return replace(there, status=SandboxStatus(Phase.RUNNING, started_at_s=1e9, observed_epoch=1))


def writes_of(sandbox: Sandbox) -> Iterator[Write]:
    key = keys.sandbox(sandbox.tenant, sandbox.name, sandbox.uid)
    yield Put(key, codec.encode(sandbox))
    yield Put(keys.uid(sandbox.uid), key.encode())
    yield Put(keys.name(sandbox.tenant, sandbox.name), sandbox.uid.encode())


async def fill(store: Store, hosts: int, sandboxes: int) -> None:
    """Puts hosts and sandboxes where they would be."""
    await populate(store, hosts)
    for at in range(0, sandboxes, GROUP):
        members = [sandbox_of(number, hosts) for number in range(at, min(at + GROUP, sandboxes))]
        await store.commit([write for sandbox in members for write in writes_of(sandbox)])


async def lose(store: Store, hosts: list[str]) -> None:
    """Ends what says that these are alive, as their leases would."""
    lease = await store.grant_lease(60)
    await store.commit([Put(keys.alive(host), b"", lease) for host in hosts])
    await store.revoke_lease(lease)


Listed = dict[str, sandboxes_pb2.Sandbox]


async def listed(stub: Any) -> tuple[Listed, int, bool]:
    """Every sandbox by uid, the list's revision, and whether each came once, in order, and at one revision."""
    found: Listed = {}
    revisions: set[int] = set()
    order: list[str] = []
    token = ""
    while True:
        request = sandboxes_pb2.ListSandboxesRequest(page_size=PAGE, page_token=token, ended=True)
        page = await stub.ListSandboxes(request, timeout=LIST_S)
        revisions.add(page.resource_version)
        order += [sandbox.name for sandbox in page.sandboxes]
        found.update((sandbox.uid, sandbox) for sandbox in page.sandboxes)
        token = page.next_page_token
        if not token:
            return found, revisions.pop(), not revisions and order == sorted(order) and len(found) == len(order)


class Mirror:
    """A list, kept up by a watch."""

    def __init__(self, found: Listed, revision: int) -> None:
        self.found, self.revision = dict(found), revision
        self._moved = asyncio.Condition()

    async def run(self, stub: Any) -> None:
        request = sandboxes_pb2.WatchSandboxesRequest(resource_version=self.revision)
        async for event in stub.WatchSandboxes(request):
            if event.kind == sandboxes_pb2.SandboxEvent.DELETE:
                self.found.pop(event.sandbox.uid, None)
            elif event.kind != sandboxes_pb2.SandboxEvent.BOOKMARK:
                self.found[event.sandbox.uid] = event.sandbox
            self.revision = max(self.revision, event.resource_version)
            async with self._moved:
                self._moved.notify_all()

    async def reached(self, revision: int) -> None:
        async with asyncio.timeout(DEADLINE_S), self._moved:
            await self._moved.wait_for(lambda: self.revision >= revision)


async def told(stub: Any, host: str) -> set[str]:
    """What a host is told that it has."""
    uids: set[str] = set()
    async with asyncio.timeout(LIST_S):
        async for event in stub.WatchAssignments(hosts_pb2.WatchAssignmentsRequest(host=host)):
            if event.kind == sandboxes_pb2.SandboxEvent.BOOKMARK:
                return uids
            uids.add(event.sandbox.uid)
    raise AssertionError("the watch ended")


async def hosts_hold(address: str, authority: Authority, folder: Path, everything: Listed) -> bool:
    """Whether hosts are told just what the list has of them."""
    for number in range(0, HOSTS, HOSTS // WATCHING):
        name = f"h{number:05d}"
        tls = authority.issue_files(Identity(Role.HOST, name), folder, stem=name)
        async with connect(address, tls) as channel:
            mine = await told(hosts_pb2_grpc.HostSyncStub(channel), name)
        if mine != {uid for uid, sandbox in everything.items() if sandbox.assignment.host == name}:
            return False
    return True


def replaced(before: Listed, after: Listed, lost: set[str]) -> bool:
    """Whether just the sandboxes of lost hosts have moved, each to a living host under a higher epoch."""
    for uid, was in before.items():
        now = after[uid].assignment
        if was.assignment.host in lost:
            if not now.host or now.host in lost or now.epoch <= was.assignment.epoch:
                return False
        elif now != was.assignment:
            return False
    return set(before) == set(after)


async def settled(mirror: Mirror, lost: set[str]) -> None:
    """Until the mirror has no sandbox left on lost hosts or on none."""
    async with asyncio.timeout(DEADLINE_S):
        while any(s.assignment.host in lost or not s.assignment.host for s in mirror.found.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.5)


async def measured(folder: Path) -> Found:
    found = Found()
    certificates = Certificates.made(folder / "tls")
    authority = Authority.load(folder / "tls" / "ca")
    async with AsyncExitStack() as stack:
        (member,) = stack.enter_context(etcd(folder / "etcd", 1))
        store = await stack.enter_async_context(open_etcd(EtcdAccess((member.client,), deadline_s=120)))
        since_s = time.monotonic()

        def took(what: str) -> None:
            nonlocal since_s
            now_s = time.monotonic()
            found.rows.append((what, now_s - since_s, "s"))
            print(f"{what}: {now_s - since_s:.1f} s", file=sys.stderr, flush=True)
            since_s = now_s

        await fill(store, HOSTS, SANDBOXES)
        took("filling etcd")
        path = configuration(folder, "bench", store._link.access, certificates, lost_grace_s=2, etcd_deadline_s=60)
        running, address = await stack.enter_async_context(control_plane(path))
        await leader(store)
        took("control plane ready and leading")
        channel = await stack.enter_async_context(connect(address, certificates.of(Role.OPERATOR)))
        await checked(found, store, sandboxes_pb2_grpc.SandboxesStub(channel), took, (address, authority, folder))
        process = psutil.Process(running.pid)
        cpu = process.cpu_times()
        found.rows.append(("control plane: resident memory", process.memory_info().rss / MIB, "MiB"))
        found.rows.append(("control plane: CPU", cpu.user + cpu.system, "s"))
        assert member.process is not None
        found.rows.append(("etcd: resident memory", psutil.Process(member.process.pid).memory_info().rss / MIB, "MiB"))
    return found


async def checked(found: Found, store: Store, stub: Any, took: Any, hosts: tuple[str, Authority, Path]) -> None:
    """Everything that the module's docstring names, in its order."""
    async with asyncio.TaskGroup() as group:
        creating = group.create_task(
            at_once(CREATES, ABREAST, lambda i: stub.CreateSandbox(wish(f"new-{i:05d}"), timeout=DEADLINE_S))
        )
        before, revision, once = await listed(stub)
        took("listing all while others are created")
        mirror = Mirror(before, revision)
        watching = group.create_task(mirror.run(stub))
        found.rows.append(("creates among them", await creating, "1/s"))
        whole, revision, again = await listed(stub)
        found.lists = once and again and len(whole) == SANDBOXES + CREATES and len(before) >= SANDBOXES
        await mirror.reached(revision)
        found.watch = {uid: s.assignment for uid, s in mirror.found.items()} == {
            uid: s.assignment for uid, s in whole.items()
        }
        took("watch caught up with a second list")
        found.hosts = await hosts_hold(*hosts, whole)
        took(f"{WATCHING} hosts told of what they have")
        lost = {f"h{number:05d}" for number in range(0, HOSTS, HOSTS // LOST)}
        await lose(store, sorted(lost))
        await settled(mirror, lost)
        took(f"sandboxes of {LOST} lost hosts placed elsewhere")
        after, _, _ = await listed(stub)
        found.reconcile = replaced(whole, after, lost)
        watching.cancel()


def body(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="sandloom-bench-") as folder:
        found = asyncio.run(measured(Path(folder)))
    for what, value, unit in found.rows:
        report.row(what, Runs((value,), unit))
    for measure, holds in zip(BARS, (found.lists, found.watch, found.hosts, found.reconcile), strict=True):
        report.bar(measure[0], Runs((float(holds),), ""), at_least=1.0)
    report.note(f"{HOSTS} hosts, {SANDBOXES} sandboxes, one control plane, one etcd, {os.cpu_count()} CPUs for all")


if __name__ == "__main__":
    raise SystemExit(run("scale", body, promised=BARS))
