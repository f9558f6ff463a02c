"""A control plane over real mTLS on loopback, with the certificates of everybody who may call it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import pytest

from controlplane.api.calls import keep_status
from controlplane.api.channel import TlsFiles, connect
from controlplane.api.identity import Identity, Role
from controlplane.api.v1 import (
    hosts_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    pools_pb2_grpc,
    sandboxes_pb2,
    sandboxes_pb2_grpc,
    tenants_pb2_grpc,
)
from controlplane.ca import Authority
from controlplane.config import Config
from controlplane.server import ControlPlane, running
from controlplane.tenancy import Tenant
from tests.controlplane.fakehost import FakeHost, fake_host


@dataclass(frozen=True)
class Certificates:
    """Files of every role, of one CA."""

    authority: Authority
    folder: Path

    def of(self, role: Role, name: str) -> TlsFiles:
        files = TlsFiles(*(self.folder / f"{role.value}-{name}{end}" for end in ("-ca.crt", ".crt", ".key")))
        if not files.key.exists():
            issued = self.authority.issue_files(Identity(role, name), self.folder, stem=f"{role.value}-{name}")
            files.ca.write_bytes(issued.ca.read_bytes())
        return files


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    return Certificates(Authority.create(folder / "ca"), folder)


@dataclass(frozen=True)
class Client:
    """Stubs of one connection."""

    channel: grpc.aio.Channel
    sandboxes: sandboxes_pb2_grpc.SandboxesAsyncStub
    images: images_pb2_grpc.ImagesAsyncStub
    hosts: hosts_pb2_grpc.HostsAsyncStub
    pools: pools_pb2_grpc.PoolsAsyncStub
    tenants: tenants_pb2_grpc.TenantsAsyncStub

    async def import_image(self, name: str = "base", *, size_bytes: int = 1000) -> images_pb2.Image:
        """Uploads something, to whichever host is chosen."""
        start = images_pb2.ImportImageRequest.Start(name=name)
        messages = [images_pb2.ImportImageRequest(start=start)]
        if size_bytes:
            messages.append(images_pb2.ImportImageRequest(chunk=bytes(size_bytes)))
        answers = [answer async for answer in keep_status(self.images.ImportImage(iter(messages), timeout=10))]
        return answers[-1].image

    async def create(
        self, name: str = "", *, image: str = "base", memory_mib: int = 256, max_mib: int = 0, request_id: str = "",
        argv: tuple[str, ...] = ("sleep", "1"), validate_only: bool = False, remove_on_exit: bool = False,
        cpu_milli: int = 0,
    ) -> sandboxes_pb2.Sandbox:  # fmt: skip
        sizes = sandboxes_pb2.Resources(
            memory_min_mib=memory_mib, memory_max_mib=max_mib or memory_mib, cpu_milli=cpu_milli
        )
        spec = sandboxes_pb2.SandboxSpec(
            image=image, resources=sizes, process=sandboxes_pb2.Process(argv=argv), remove_on_exit=remove_on_exit
        )
        request = sandboxes_pb2.CreateSandboxRequest(
            name=name, spec=spec, request_id=request_id, validate_only=validate_only
        )
        return await self.sandboxes.CreateSandbox(request, timeout=10)

    async def get(self, name: str) -> sandboxes_pb2.Sandbox:
        return await self.sandboxes.GetSandbox(sandboxes_pb2.GetSandboxRequest(name=name), timeout=10)


def client_at(channel: grpc.aio.Channel) -> Client:
    """All stubs over one connection."""
    return Client(
        channel,
        sandboxes_pb2_grpc.SandboxesStub(channel),
        images_pb2_grpc.ImagesStub(channel),
        hosts_pb2_grpc.HostsStub(channel),
        pools_pb2_grpc.PoolsStub(channel),
        tenants_pb2_grpc.TenantsStub(channel),
    )


class Plane:
    """A running control plane, and what a test does with it. Everything it opens is closed with it."""

    def __init__(self, parts: ControlPlane, address: str, certificates: Certificates, stack: AsyncExitStack) -> None:
        self.parts, self.address, self.certificates, self._stack = parts, address, certificates, stack
        self.kept: AsyncExitStack | None = None

    async def client(self, role: Role = Role.OPERATOR, name: str = "op") -> Client:
        """A connection with the certificate of `role` and `name`."""
        if role is Role.TENANT and self.parts.tenants.find(name) is None:
            await self.parts.tenants.create(Tenant(name))
        channel = await self._stack.enter_async_context(connect(self.address, self.certificates.of(role, name)))
        return client_at(channel)

    def keep_clients(self) -> None:
        """Leaves what was opened open while the control plane stops; it is closed after that."""
        self.kept = self._stack.pop_all()

    async def host(self, name: str = "h1") -> FakeHost:
        """A registered host that stays until the test ends."""
        tls = self.certificates.of(Role.HOST, name)
        return await self._stack.enter_async_context(fake_host(name, self.address, tls))


Configured = Callable[..., Config]


@pytest.fixture
def configured(certificates: Certificates, tmp_path: Path) -> Configured:
    """Makes a Config over one store file."""
    tls = certificates.of(Role.CONTROLPLANE, "cp")
    base = Config("127.0.0.1:0", f"sqlite:{tmp_path / 'store.db'}", tls.ca, tls.cert, tls.key)
    return lambda **changes: replace(base, **changes)


@asynccontextmanager
async def planed(config: Config, certificates: Certificates) -> AsyncIterator[Plane]:
    """A control plane that serves while the block runs."""
    async with running(config) as (parts, address), AsyncExitStack() as stack:
        plane = Plane(parts, address, certificates, stack)
        yield plane
    if plane.kept is not None:
        await plane.kept.aclose()


@pytest.fixture
async def plane(configured: Configured, certificates: Certificates) -> AsyncIterator[Plane]:
    async with planed(configured(), certificates) as plane:
        yield plane
