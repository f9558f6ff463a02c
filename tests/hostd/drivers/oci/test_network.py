"""Links of sandboxes to their host: what the policy lets through, from inside, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hostd.drivers.contract import Engine, StartPlan
from hostd.drivers.oci.driver import OciDriver
from hostd.drivers.oci.mounts import Layers
from hostd.drivers.oci.netpolicy import GATEWAY, Link, address_of, name_of, ruleset
from hostd.drivers.oci.network import Links
from hostd.errors import CannotCheckpoint, ShortOfResources
from hostd.spec import Allowed, Network
from tests.contract.driver_suite import command
from tests.hostd.drivers.oci.rig import OciRig, Surroundings, left_of, run, sh

NUMBER = os.getpid() % 16000
RANGE = f"10.{214 + NUMBER // 256 % 40}.{NUMBER % 256}.0/24"
SERVE = """
import socket, sys, threading
def serve(listener):
    while True:
        with listener.accept()[0] as peer:
            peer.sendall(f"hello {listener.getsockname()[1]} {peer.getpeername()[0]}\\n".encode())
listeners = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
for each in listeners:
    threading.Thread(target=serve, args=(each,)).start()
print(*(each.getsockname()[1] for each in listeners), flush=True)
"""


CONNECT = """
import socket, sys
print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).recv(64).decode(), end="")
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)


@dataclass(frozen=True)
class Outside:
    """A machine beyond the host: `address` serves ports 80 and 81. The host itself is `host`, and serves `port`."""

    name: str
    host: str
    address: str
    port: int = 0


@contextlib.contextmanager
def serving(*prefix: str, ports: tuple[str, ...]) -> Iterator[list[int]]:
    argv = [*prefix, sys.executable, "-c", SERVE, *ports]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            yield [int(word) for word in server.stdout.readline().split()]
        finally:
            server.kill()


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    name, base = f"slo{NUMBER}", f"198.18.{NUMBER // 64}"
    at = NUMBER % 64 * 4
    beyond = Outside(name, f"{base}.{at + 1}", f"{base}.{at + 2}")
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs iproute2 and network namespaces: {error}")
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{beyond.host}/30", "dev", name)
        ip("link", "set", name, "up")
        for words in ("link set lo up", f"addr add {beyond.address}/30 dev eth0", "link set eth0 up"):
            ip("-netns", name, *words.split())
        ip("-netns", name, "route", "add", "default", "via", beyond.host)
        Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding").write_text("1")
        with serving("ip", "netns", "exec", name, ports=("80", "81")) as ports, serving(ports=("0",)) as own:
            assert ports == [80, 81]
            yield replace(beyond, port=own[0])
    finally:
        ip("netns", "delete", name)


@contextlib.asynccontextmanager
async def linked(rig: OciRig, uid: str, *allow: Allowed, nat: bool = False) -> AsyncIterator[tuple[Engine, StartPlan]]:
    """A sandbox with a link; nothing of it is left afterwards, which is asserted."""
    layers = Layers(rig.around.root / "mounts")
    driver = OciDriver(rig.runtime, layers, rig.around.cgroups, links=Links(RANGE, nat))
    plan = rig.plan(uid)
    plan = replace(plan, spec=replace(plan.spec, network=Network(True, allow)))
    engine = await driver.start(plan, lambda _: None)
    try:
        await engine.spawn(command(("sleep", "100000")), main=True)
        yield engine, plan
    finally:
        await engine.detach()
        await driver.destroy(plan.spec.uid, plan.folder, engine.handle)
    assert left_of(plan.spec.uid, plan.folder) == []
    assert links_left(plan.spec.uid) == []


def links_left(uid: str) -> list[str]:
    name = name_of(uid)
    said = [
        subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        for argv in (["ip", "netns", "list"], ["ip", "-o", "link"], ["nft", "list", "tables"], ["ip", "route"])
    ]
    return [line for text in said for line in text.splitlines() if name in line]


async def ask(engine: Engine, address: str, port: int) -> str:
    return (await run(engine, sh(f"nc -w 1 {address} {port} < /dev/null 2>/dev/null")))[0].strip()


async def test_what_is_allowed_and_nothing_else(each: OciRig, outside: Outside) -> None:
    async with linked(each, "web", Allowed(f"{outside.address}/32", "tcp", 80, 80)) as (engine, plan):
        address = engine.handle.address
        assert links_left(plan.spec.uid) != []
        assert await ask(engine, outside.address, 80) == f"hello 80 {address}"
        assert await ask(engine, outside.address, 81) == ""
        for host in (outside.host, GATEWAY):
            assert await ask(engine, host, outside.port) == ""
        routes, _, _ = await run(engine, sh("cat /proc/net/dev"))
        assert "eth0" in routes
        begun = ["ip", "netns", "exec", outside.name, sys.executable, "-c", CONNECT, address, "22"]
        done = await asyncio.to_thread(subprocess.run, begun, capture_output=True, text=True, timeout=60)
        assert "timed out" in done.stderr


async def test_all_of_the_world_is_neither_the_host_nor_other_sandboxes(each: OciRig, outside: Outside) -> None:
    everything = Allowed("0.0.0.0/0")
    async with linked(each, "one", everything, nat=True) as (one, _), linked(each, "two", everything) as (two, _):
        assert await ask(one, outside.address, 81) == f"hello 81 {outside.host}"  # as its host: NAT
        for host in (outside.host, GATEWAY):
            assert await ask(one, host, outside.port) == ""
        served = await two.spawn(command(sh("echo served | nc -l -p 7000")), main=False)
        assert await ask(one, two.handle.address, 7000) == ""
        begun = [sys.executable, "-c", CONNECT, two.handle.address, "7000"]
        from_host = await asyncio.to_thread(subprocess.run, begun, capture_output=True, text=True, timeout=60)
        assert from_host.stdout == "served\n", from_host.stderr
        await served.wait()
        await served.release()


async def test_a_network_is_not_carried_into_a_checkpoint(around: Surroundings) -> None:
    rig = OciRig(around, "runsc")
    async with linked(rig, "copied") as (engine, _):
        checkpointing = rig.new_driver().checkpointing
        assert checkpointing is not None
        with pytest.raises(CannotCheckpoint, match="it has a network"):
            await checkpointing.checkpoint(engine, dict)


async def test_a_destroy_without_a_handle_and_a_failed_start_leave_nothing(around: Surroundings) -> None:
    rig = OciRig(around, "crun")
    plan = rig.plan("gone")
    driver = OciDriver(rig.runtime, Layers(around.root / "mounts"), around.cgroups, links=Links(RANGE))
    driver.links.make(plan.spec.uid, Network(True))
    await driver.destroy(plan.spec.uid, plan.folder, None)
    assert links_left(plan.spec.uid) == []
    await driver.destroy(plan.spec.uid, plan.folder, None)
    with pytest.raises(ShortOfResources, match="widen network_cidr"):
        Links("10.250.250.0/31").make(plan.spec.uid, Network(True))
    assert links_left(plan.spec.uid) == []


def test_addresses_are_a_sandbox_s_own_and_not_taken_twice() -> None:
    first = address_of("box", "10.1.2.0/24", ())
    assert first == address_of("box", "10.1.2.0/24", ())
    assert address_of("box", "10.1.2.0/24", {first}) != first
    every = {f"10.1.2.{number}" for number in range(1, 255)}
    assert first in every
    assert address_of("box", "10.1.2.0/24", every) == ""
    assert address_of("box", "10.1.2.0/24", every - {"10.1.2.7"}) == "10.1.2.7"
    assert len(name_of("box")) == 15


def test_rules_are_in_an_order_that_keeps_link_local_closed() -> None:
    network = Network(
        True,
        (Allowed("0.0.0.0/0"), Allowed("169.254.169.254/32", "tcp", 80, 80), Allowed("10.0.0.0/8", "udp", 5, 9)),
    )
    text = ruleset(Link("slx", "10.1.2.3"), network, nat=False)
    order = [
        "ip daddr 169.254.169.254/32 tcp dport 80 accept", "ip daddr 169.254.0.0/16 drop", "ip daddr 0.0.0.0/0 accept",
        "ip daddr 10.0.0.0/8 udp dport 5-9 accept", "chain through",
    ]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "masquerade" not in text
    assert "masquerade" in ruleset(Link("slx", "10.1.2.3"), network, nat=True)
