"""Durable creates on a real etcd of three members, against one-by-one puts and a bare echo; and a leader that dies.

    creates_vs_puts     creates per second (CreateSandboxes, PACK in each call) over what one-by-one puts make: the five
                        records of a create, put one after the other to the same etcd
    creates_vs_echo     the same creates over calls per second of a bare grpc.aio echo, as many at once as there are
                        creates under way
    killed_s, paused_s  from SIGKILL or SIGSTOP of the leading control plane until a create that another replica was
                        asked for after that is placed

A create is parsed, admitted, placed among 1,000 hosts, and with five records in etcd on two of three disks when it is
answered, over mTLS. Rows without a bar tell the rest: creates that come in a call each (CreateSandbox), single puts.
All parties, the load included, share the machine's CPUs. Where the disk is quick creates are bounded by Python's CPU
time, and the first ratio with them: its peer gets faster, and they do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from controlplane import keys
from controlplane.api.channel import connect
from controlplane.api.identity import Role
from controlplane.api.v1 import sandboxes_pb2, sandboxes_pb2_grpc
from controlplane.store.etcd import EtcdStore, open_etcd
from controlplane.store.etcdlink import EtcdAccess, EtcdLink
from tests.bench.fabricload import ECHO, Certificates, at_once, populate, ready_process, wish
from tests.bench.report import CannotMeasure, Report, Runs, ratio, run
from tests.etcdserver import Member, cluster

ROUNDS, DEATHS = 3, 3
HOSTS = 1_000
PUTS, ECHOES, CREATES, ABREAST = 200, 4_000, 2_000, 256
PACK = 64
RECORDS_BYTES = (900, 50, 16, 400, 150)
"""Of a create: the sandbox, its uid's pointer, its name's guard, the event, the used request."""
FAILOVER_S = 60.0
BARS = (("creates_vs_puts", 10.0), ("creates_vs_echo", 0.3))
CREATE, CREATE_MANY = "/sandloom.v1.Sandboxes/CreateSandbox", "/sandloom.v1.Sandboxes/CreateSandboxes"
MEMBER_FLAGS = ("--quota-backend-bytes", str(8 << 30), "--snapshot-count", "20000")


@dataclass
class Figures:
    """What was measured, a value a round."""

    puts: list[float] = field(default_factory=list)
    creates_by_puts: list[float] = field(default_factory=list)
    echoes: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    creates: list[float] = field(default_factory=list)
    killed_s: list[float] = field(default_factory=list)
    paused_s: list[float] = field(default_factory=list)


@contextlib.contextmanager
def etcd(folder: Path, members: int) -> Iterator[list[Member]]:
    """A cluster; CannotMeasure where etcd is not installed."""
    if shutil.which("etcd") is None:
        raise CannotMeasure("etcd is not installed: apt-get install etcd-server")
    with cluster(folder, members, *MEMBER_FLAGS, on_disk=True) as found:
        yield found


def configuration(folder: Path, name: str, access: EtcdAccess, certificates: Certificates, **extra: object) -> Path:
    """A control plane's configuration file."""
    tls = certificates.of(Role.CONTROLPLANE)
    values = {
        "listen": "127.0.0.1:0", "store": f"etcd:{','.join(access.endpoints)}", "etcd_prefix": access.prefix,
        "tls_ca": str(tls.ca), "tls_cert": str(tls.cert), "tls_key": str(tls.key), "name": name, **extra,
    }  # fmt: skip
    path = folder / f"{name}.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


@asynccontextmanager
async def control_plane(path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A control plane process, and its address."""
    async with ready_process("-m", "controlplane.server", "--config", str(path)) as found:
        yield found


async def leader(store: EtcdStore, *, but: str = "") -> str:
    """Who leads, once somebody else than `but` does."""
    async with asyncio.timeout(FAILOVER_S):
        while True:
            record = await store.get(keys.LEADER)
            if record is not None and record.value.decode() != but:
                return record.value.decode()
            await asyncio.sleep(0.02)


async def placed_s(stub: Any, name: str) -> float:
    """Creates a sandbox and waits until it is placed; when that was, by the monotonic clock."""
    async with asyncio.timeout(FAILOVER_S):
        while True:
            try:
                made = await stub.CreateSandbox(wish(name), timeout=5)
                while made.status.phase != sandboxes_pb2.SCHEDULED:
                    await asyncio.sleep(0.01)
                    made = await stub.GetSandbox(sandboxes_pb2.GetSandboxRequest(name=name), timeout=5)
                return time.monotonic()
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)


async def throughput(folder: Path, access: EtcdAccess, certificates: Certificates, figures: Figures) -> None:
    """Puts, echoes and creates, one after the other in each round."""
    link = EtcdLink(access)
    path = configuration(folder, "bench", access, certificates)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(link.close)
        _, address = await stack.enter_async_context(control_plane(path))
        _, echo_address = await stack.enter_async_context(ready_process("-m", "tests.bench.fabricload"))
        channel = await stack.enter_async_context(connect(address, certificates.of(Role.OPERATOR)))
        echo = (await stack.enter_async_context(grpc.aio.insecure_channel(echo_address))).unary_unary(ECHO, None, None)
        create, many = (channel.unary_unary(method, None, None) for method in (CREATE, CREATE_MANY))
        await placed_s(sandboxes_pb2_grpc.SandboxesStub(channel), "first")
        payload = wish("echo").SerializeToString()

        async def put(number: int, size_bytes: int = RECORDS_BYTES[0]) -> None:
            request = link.proto.PutRequest(key=b"bench/put/%d-%d" % (number, size_bytes), value=bytes(size_bytes))
            await link.call("KV", "Put", request, safe=True)

        async def create_by_puts(number: int) -> None:
            for size_bytes in RECORDS_BYTES:
                await put(number, size_bytes)

        for number in range(ROUNDS):
            wishes = [wish(f"box-{number}-{i}").SerializeToString() for i in range(CREATES)]
            packs = [packed(f"pack-{number}-{i}") for i in range(CREATES // PACK)]
            figures.puts.append(await at_once(PUTS, 1, put))
            figures.creates_by_puts.append(await at_once(PUTS // len(RECORDS_BYTES), 1, create_by_puts))
            figures.echoes.append(await at_once(ECHOES, ABREAST, lambda _: echo(payload)))
            figures.single.append(await at_once(CREATES, ABREAST, lambda i, wishes=wishes: create(wishes[i])))  # type: ignore[misc]
            calls = await at_once(len(packs), ABREAST // PACK, lambda i, packs=packs: made(many, packs[i]))  # type: ignore[misc]
            figures.creates.append(calls * PACK)


def packed(name: str) -> bytes:
    """A CreateSandboxes as a client sends it."""
    wishes = [wish(f"{name}-{number}") for number in range(PACK)]
    return sandboxes_pb2.CreateSandboxesRequest(requests=wishes).SerializeToString()


async def made(many: Any, pack: bytes) -> None:
    """One call, all of whose sandboxes were made."""
    answer = sandboxes_pb2.CreateSandboxesResponse.FromString(await many(pack))
    refused = [outcome.error for outcome in answer.outcomes if not outcome.HasField("sandbox")]
    if refused or len(answer.outcomes) != PACK:
        raise CannotMeasure(f"{len(refused)} of a call's {PACK} creates were refused: {refused[:1]}")


async def failovers(folder: Path, store: EtcdStore, certificates: Certificates, figures: Figures) -> None:
    """Two replicas; the one that leads is killed or paused, again and again."""
    numbers = itertools.count()
    for signo, found in ((signal.SIGKILL, figures.killed_s), (signal.SIGSTOP, figures.paused_s)):
        for _ in range(DEATHS):
            async with AsyncExitStack() as stack:
                replicas = {}
                for _ in range(2):
                    name = f"cp{next(numbers)}"
                    path = configuration(folder, name, store._link.access, certificates)
                    running, address = await stack.enter_async_context(control_plane(path))
                    channel = await stack.enter_async_context(connect(address, certificates.of(Role.OPERATOR)))
                    replicas[name] = (running, sandboxes_pb2_grpc.SandboxesStub(channel))
                first = await leader(store)
                other = next(stub for name, (_, stub) in replicas.items() if name != first)
                await placed_s(other, f"before-{first}")
                victim = replicas[first][0]
                begun_s = time.monotonic()
                victim.send_signal(signo)
                found.append(await placed_s(other, f"after-{first}") - begun_s)
                if signo == signal.SIGSTOP:
                    victim.send_signal(signal.SIGCONT)


async def measured(folder: Path) -> Figures:
    figures = Figures()
    certificates = Certificates.made(folder / "tls")
    with etcd(folder / "etcd", 3) as members:
        access = EtcdAccess(tuple(member.client for member in members), deadline_s=30)
        async with open_etcd(access) as store:
            await populate(store, HOSTS)
        await throughput(folder, access, certificates, figures)  # nobody but the control plane watches the store
        async with open_etcd(access) as store:
            await failovers(folder, store, certificates, figures)
    return figures


def body(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="sandloom-bench-") as folder:
        figures = asyncio.run(measured(Path(folder)))
    by_puts, echoes = Runs(tuple(figures.creates_by_puts), "1/s"), Runs(tuple(figures.echoes), "1/s")
    creates = Runs(tuple(figures.creates), "1/s")
    report.row("etcd, one put after the other", Runs(tuple(figures.puts), "1/s"))
    report.row("peer: a create's records by one put after the other", by_puts)
    report.row(f"peer: bare grpc.aio echo, {ABREAST} at once", echoes)
    report.row(f"creates, {ABREAST} at once, one a call", Runs(tuple(figures.single), "1/s"))
    report.row(f"creates, {ABREAST} at once, {PACK} a call", creates)
    report.bar("creates_vs_puts", ratio(creates, by_puts), at_least=10.0, peer="a create's records, put by put")
    report.bar("creates_vs_echo", ratio(creates, echoes), at_least=0.3, peer="bare grpc.aio echo")
    report.bar("killed_s", Runs(tuple(figures.killed_s), "s"), at_most=3.0)
    report.bar("paused_s", Runs(tuple(figures.paused_s), "s"), at_most=3.0)
    report.note(f"three etcd members on one disk; a create writes 5 records, placed among {HOSTS} hosts")


if __name__ == "__main__":
    raise SystemExit(run("fabric", body, promised=BARS))
