"""What bench_fabric loads a control plane with: hosts and images put into the store, an echo server, and callers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from controlplane import codec, keys
from controlplane.api.channel import TlsFiles
from controlplane.api.identity import Identity, Role
from controlplane.api.v1 import sandboxes_pb2
from controlplane.ca import Authority
from controlplane.model import Capacity, Host, Image, ImageConfig, Layer, Residency, SandboxClass
from controlplane.store.contract import Put, Store, Write

DIGEST, LAYER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
TENANT, IMAGE = "default", "base"
MIB = 1 << 20
LEASE_S = 3600
READY_S = 60.0
ECHO = "/bench.Echo/Echo"


@dataclass(frozen=True)
class Certificates:
    """Files of the roles, of one CA."""

    folder: Path

    @staticmethod
    def made(folder: Path) -> Certificates:
        authority = Authority.create(folder / "ca")
        for role in Role:
            authority.issue_files(Identity(role, "bench"), folder, stem=role.value)
        return Certificates(folder)

    def of(self, role: Role) -> TlsFiles:
        return TlsFiles(*(self.folder / name for name in ("ca.crt", f"{role.value}.crt", f"{role.value}.key")))


def host_of(number: int, memory_mib: int = 2048) -> Host:
    """A simulated host with much room."""
    return Host(
        name=f"h{number:05d}",
        capacity=Capacity(memory_mib, memory_mib, 0, 64_000, 1 << 20, 512, 32),
        runtime_address="127.0.0.1:1",
        last_seen_s=time.time(),
        classes=(SandboxClass.GUEST_KERNEL,),
        accel="kvm",
        image_digests=(DIGEST,),
    )


async def populate(store: Store, hosts: int) -> None:
    """One image, resident on so many hosts that are alive."""
    now_s = time.time()
    image = Image(IMAGE, TENANT, DIGEST, (Layer(LAYER, 64 * MIB),), ImageConfig(cmd=("sh",)), 64 * MIB, now_s, "rootfs")
    await store.commit([Put(keys.image(TENANT, IMAGE), codec.encode(image))])
    for at in range(0, hosts, 500):
        lease = await store.grant_lease(LEASE_S)
        writes: list[Write] = []
        for number in range(at, min(at + 500, hosts)):
            host = host_of(number)
            held = Residency(TENANT, DIGEST, host.name, now_s)
            writes.append(Put(keys.host(host.name), codec.encode(host)))
            writes.append(Put(keys.alive(host.name), b"", lease))
            writes.append(Put(keys.residency(TENANT, DIGEST, host.name), codec.encode(held)))
        await store.commit(writes)


def wish(name: str) -> sandboxes_pb2.CreateSandboxRequest:
    """A create as a client sends it, with its request_id."""
    spec = sandboxes_pb2.SandboxSpec(
        image=IMAGE,
        resources=sandboxes_pb2.Resources(memory_min_mib=32, memory_max_mib=256, cpu_milli=10),
        process=sandboxes_pb2.Process(argv=["sleep", "1000"]),
        restart=sandboxes_pb2.RESTART_ON_HOST_LOSS,
    )
    return sandboxes_pb2.CreateSandboxRequest(name=name, spec=spec, request_id=f"r-{name}")


async def at_once(count: int, abreast: int, call: Callable[[int], Awaitable[Any]]) -> float:
    """Makes `count` calls, `abreast` of them at a time; calls per second."""
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await call(number)

    begun_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(abreast):
            group.create_task(caller())
    return count / (time.perf_counter() - begun_s)


@asynccontextmanager
async def ready_process(*argv: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A Python process that prints a ready line, and its address. It is ended with the block."""
    running = await asyncio.create_subprocess_exec(
        sys.executable, *argv, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        assert running.stdout is not None
        async with asyncio.timeout(READY_S):
            line = json.loads(await running.stdout.readline())
        yield running, str(line["address"])
    finally:
        if running.returncode is None:
            running.terminate()
            try:
                async with asyncio.timeout(20):
                    await running.wait()
            except TimeoutError:
                running.kill()
        await running.communicate()


async def serve_echo() -> None:
    """A bare grpc.aio server that answers with what it got, until it is ended."""
    server = grpc.aio.server()

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"ready": True, "address": f"127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve_echo())
