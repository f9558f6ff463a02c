"""Clones of one template have nothing in common that must be one sandbox's own: no two values are equal.

The kernel's generator, what is taken from it (keys, uuids, seeds, where memory is mapped), machine id, boot id and
hostname, from clones of the image template and of the generic one, and from claims of warm members; read as early as
can be: by the first process.
"""

from __future__ import annotations

import asyncio
import collections
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hostd.drivers.qemu.template import Origin
from hostd.spec import Resources
from tests.bench import guests
from tests.bench.clones import CloneKit, clone_kit
from tests.bench.guests import Bench
from tests.bench.report import CannotMeasure

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]
SMALL = Resources(memory_min_mib=256, memory_max_mib=512, memory_mib=256, cpu_milli=1000)
CLONES = 10
CLAIMS = 4
SOAK_CLONES = 1000
AT_ONCE = 8
READ = r"""
import os, _random
def text(path):
    with open(path) as file: return file.read().strip()
def data(path):
    with open(path, 'rb', buffering=0) as file: return file.read(16)
def ssh_key():
    argv = ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', '', '-f', f'/tmp/key{os.getpid()}']
    status = os.waitstatus_to_exitcode(os.waitpid(os.posix_spawnp(argv[0], argv, os.environ), 0)[1])
    if status: raise SystemExit(f'ssh-keygen gave {status}')
    return text(f'/tmp/key{os.getpid()}.pub').split()[1]
def show(name, value): print(name, value.hex() if isinstance(value, bytes) else value)
show('getrandom', os.getrandom(16))
show('getrandom of few bytes', os.getrandom(6))
show('/dev/urandom', data('/dev/urandom'))
show('/dev/random', data('/dev/random'))
show('kernel uuid', text('/proc/sys/kernel/random/uuid'))
show('boot id', text('/proc/sys/kernel/random/boot_id'))
show('machine id', text('/etc/machine-id'))
show('hostname', os.uname().nodename)
show('ssh key', ssh_key())
show('seeded generator', _random.Random().random())
show('hash of a text', hash('text'))
show('layout of addresses', '+'.join(line.split()[0] for line in text('/proc/self/maps').splitlines()))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parts() -> AsyncIterator[tuple[Bench, CloneKit]]:
    """A host with both templates of the Debian userland."""
    try:
        async with guests.bench() as host, clone_kit(host.store, host.kernel, host.accel, host.cgroups) as kit:
            await kit.make(host.plan(SMALL))
            yield host, kit
    except CannotMeasure as lack:
        pytest.skip(f"no guests of a Debian userland here: {lack}")


async def values_of(host: Bench, kit: CloneKit, origin: Origin) -> dict[str, str]:
    """What a clone's first process reads, by name."""
    plan = host.plan(SMALL)
    driver = kit.driver(origin)
    engine = await driver.start(plan, lambda _: None)
    try:
        assert engine.origin.startswith(origin.value), engine.origin
        out = await guests.run(engine, "python3", "-ISc", READ, main=True)
        return dict(line.rsplit(" ", 1) for line in out.decode().splitlines())
    finally:
        await host.end(driver, plan, engine)


async def read_many(host: Bench, kit: CloneKit, count: int) -> list[dict[str, str]]:
    """The values of `count` clones: every second one is of the generic template."""
    turns = asyncio.Semaphore(min(AT_ONCE, 2 * (os.cpu_count() or 1)))

    async def one(number: int) -> dict[str, str]:
        async with turns:
            return await values_of(host, kit, (Origin.IMAGE, Origin.GENERIC)[number % 2])

    async with asyncio.TaskGroup() as group:  # unlike gather it waits for all, so that no guest outlives a failure
        reading = [group.create_task(one(number)) for number in range(count)]
    return [each.result() for each in reading]


async def claimed_values(host: Bench, kit: CloneKit) -> list[dict[str, str]]:
    """What two processes of a claimed member read: it was rehearsed, with an identity of its own, and paused."""
    driver = kit.driver(Origin.IMAGE)
    assert driver.warming is not None
    plan = host.plan(SMALL)
    guest = await driver.warming.prewarm(plan, lambda _: None)
    assert guest.unrehearsed == ""
    mine = host.plan(SMALL)
    engine = await driver.warming.claim(guest, mine, lambda _: None)
    try:
        outs = [await guests.run(engine, "python3", "-ISc", READ, main=main) for main in (False, True)]
        return [dict(line.rsplit(" ", 1) for line in out.decode().splitlines()) for out in outs]
    finally:
        await host.end(driver, mine, engine)


def repeated(all_values: list[dict[str, str]]) -> dict[str, list[str]]:
    """Values that came more than once, by name."""
    found: dict[str, list[str]] = {}
    for name in all_values[0]:
        counted = collections.Counter(values[name] for values in all_values)
        twice = [value for value, count in counted.items() if count > 1]
        if twice:
            found[name] = twice
    return found


async def test_no_two_clones_have_a_value_in_common(parts: tuple[Bench, CloneKit]) -> None:
    all_values = await read_many(*parts, 2 * CLONES)
    assert len(all_values[0]) == 12
    assert len({tuple(values) for values in all_values}) == 1
    assert repeated(all_values) == {}


async def test_no_two_claims_of_rehearsed_members_have_a_value_in_common(parts: tuple[Bench, CloneKit]) -> None:
    """Nor have two processes of one claim what is drawn anew for each, where its memory lies included."""
    turns = asyncio.Semaphore(os.cpu_count() or 1)

    async def one() -> list[dict[str, str]]:
        async with turns:
            return await claimed_values(*parts)

    async with asyncio.TaskGroup() as group:
        claiming = [group.create_task(one()) for _ in range(CLAIMS)]
    first, second = ([each.result()[turn] for each in claiming] for turn in (0, 1))
    assert repeated(first) == repeated(second) == {}
    same = {"boot id", "machine id", "hostname"}
    assert set(repeated(first + second)) == same


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
async def test_a_thousand_clones_have_no_value_in_common(parts: tuple[Bench, CloneKit]) -> None:
    assert repeated(await read_many(*parts, SOAK_CLONES)) == {}
