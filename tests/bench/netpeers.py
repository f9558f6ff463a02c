"""Two guests that do the same network work: one with QEMU's user network (slirp), one without any, by `sockets: tool`.

The peer's guest is the same QEMU, kernel, memory and vCPU, with a virtio-net card on `-netdev user` and the program
that measures (tests/bench/c/netload.c) as process 1; ours is a clone with that program started in it. Both are asked
over a connection of their own to do one thing at a time, against the same servers, which are a process of their own:

    python -m tests.bench.netpeers     prints its ports as a line of JSON, and ends with its stdin
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.api.services import GATEWAY, Answerer, ServicePolicy, parse_allow
from hostd import kernel
from hostd.drivers.contract import Engine
from hostd.drivers.qemu.command import qemu_argv
from hostd.drivers.qemu.plan import shape_for
from hostd.drivers.qemu.template import Origin
from hostd.initramfs import WANTED, decompress, initramfs, load_order, module_name
from tests.bench.clones import clone_kit
from tests.bench.guests import Bench, command
from tests.bench.report import CannotMeasure

ROOT = Path(__file__).resolve().parents[2]
SLIRP_HOST = "10.0.2.2"
CARD_MODULES = ("failover", "net_failover", "virtio_net")
DEADLINE_S = 240.0
PIECE_BYTES = 1 << 16
WORK = ("up", "down", "ping", "rate")


class Workers:
    """A server for each kind of work."""

    @staticmethod
    async def up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 18):
            pass
        writer.close()

    @staticmethod
    async def down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = int(await reader.readline())
        while left > 0:
            writer.write(bytes(min(left, PIECE_BYTES)))
            left -= PIECE_BYTES
            await writer.drain()
        writer.close()

    @staticmethod
    async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(64):
            writer.write(data)
        writer.close()

    @staticmethod
    async def rate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()


async def work() -> None:
    """Serves until stdin ends."""
    ports = {}
    for name in WORK:
        server = await asyncio.start_server(getattr(Workers, name), "127.0.0.1", 0, backlog=512)
        ports[name] = server.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)


class Servers:
    """What guests connect to. `ports`: of each kind of work, and of `orders`, where they are told what to do."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.guests: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Servers:
        orders = await asyncio.start_server(self._orders, "127.0.0.1", 0)
        self._stack.callback(orders.close)
        workers = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        assert workers.stdin is not None and workers.stdout is not None
        self._stack.push_async_callback(workers.wait)
        self._stack.callback(workers.stdin.close)
        async with asyncio.timeout(DEADLINE_S):
            self.ports = json.loads(await workers.stdout.readline())
        self.ports["orders"] = orders.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _orders(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.guests.put((reader, writer))


@dataclass
class Guest:
    """A guest that does as it is told."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ports: dict[str, int]

    async def do(self, what: str, count: int) -> float:
        """Seconds that it took there. CannotMeasure when it ends instead."""
        self.writer.write(f"{what} {count} {self.ports[what]}\n".encode())
        async with asyncio.timeout(DEADLINE_S):
            answer = await self.reader.readline()
        if not answer:
            raise CannotMeasure(f"a guest ended at `{what} {count}`")
        return float(answer)


def build(folder: Path) -> Path:
    """The program. CannotMeasure without a compiler."""
    if shutil.which("gcc") is None:
        raise CannotMeasure("no gcc on this machine (deploy/install-packages.sh)")
    program = folder / "netload"
    argv = ["gcc", "-O2", "-static", "-s", "-D_GNU_SOURCE", str(ROOT / "tests/bench/c/netload.c"), "-o", str(program)]
    subprocess.run(argv, check=True, timeout=DEADLINE_S)
    return program


def card_initrd(program: Path) -> bytes:
    """An initramfs with the card's driver and `program` as /init. CannotMeasure, KernelMissing."""
    deb = kernel.fetch(Path("/var/cache/sandloom"))
    files = kernel.extract(deb)
    modules = dict(files.modules)
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if ".ko" in member.name and module_name(member.name) in CARD_MODULES:
                file = archive.extractfile(member)
                assert file is not None
                modules[module_name(member.name)] = decompress(member.name, file.read())
    if "virtio_net" not in modules and "virtio_net" not in files.built_in:
        raise CannotMeasure(f"{deb.name} has no virtio_net")
    order = load_order([*WANTED[:1], "virtio_net"], modules, files.built_in)
    return initramfs(program.read_bytes(), modules, order)


def slirp_argv(host: Bench, folder: Path, program: Path, port: int) -> list[str]:
    """The peer's command line. CannotMeasure for a QEMU without slirp."""
    known = subprocess.run(
        ["qemu-system-x86_64", "-netdev", "help"], capture_output=True, text=True, timeout=60, check=False
    )
    if "user" not in known.stdout.split():
        raise CannotMeasure("this QEMU has no user network (-netdev user)")
    initrd = folder / "card.initrd"
    initrd.write_bytes(card_initrd(program))
    shape = shape_for(replace(host.plan(), layers=()), host.kernel, host.accel)
    argv = qemu_argv(replace(shape, folder=folder, initrd=initrd))
    at = argv.index("-append") + 1
    argv[at] += f" -- {SLIRP_HOST} {port}"
    return [*argv, "-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0"]


@asynccontextmanager
async def slirp_guest(host: Bench, servers: Servers, folder: Path, program: Path) -> AsyncIterator[Guest]:
    """The peer, ready."""
    argv = slirp_argv(host, folder, program, servers.ports["orders"])
    process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await servers.guests.get()
        yield Guest(reader, writer, servers.ports)
        writer.close()
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def tool_guest(host: Bench, servers: Servers, program: Path) -> AsyncIterator[Guest]:
    """Ours, ready: a clone of a generic template."""
    rules = tuple(parse_allow(f"tcp:{GATEWAY}:{port}") for port in servers.ports.values())
    policy = ServicePolicy(sockets=Answerer.TOOL, allow=rules)
    async with clone_kit(host.store, host.kernel, host.accel, host.cgroups) as kit:
        await kit.make(host.plan())
        driver = kit.driver(Origin.GENERIC)
        plan = host.plan()
        plan = replace(plan, spec=replace(plan.spec, services=policy))
        engine: Engine = await driver.start(plan, lambda _: None)
        try:
            load = "cat > /tmp/netload && chmod 755 /tmp/netload && exec /tmp/netload"
            words = command("sh", "-c", f"{load} {GATEWAY} {servers.ports['orders']}")
            process = await engine.spawn(replace(words, stdin=True), main=True)
            await process.write(await asyncio.to_thread(program.read_bytes))
            await process.close_stdin()
            async with asyncio.timeout(DEADLINE_S):
                reader, writer = await servers.guests.get()
            yield Guest(reader, writer, servers.ports)
            writer.close()
        finally:
            await host.end(driver, plan, engine)


if __name__ == "__main__":
    asyncio.run(work())
