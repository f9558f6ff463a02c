"""`sandloom pool`: what it asks for, and what it prints."""

from __future__ import annotations

import json

from controlplane.api.v1 import pools_pb2
from tests.controlplane.cli.conftest import NOW_S, Cli
from tests.controlplane.cli.fakefabric import FakeFabric


def test_a_pool_from_its_making_to_its_end(fabric: FakeFabric, cli: Cli) -> None:
    made = cli.ok("pool", "create", "web", "--image", "debian", "--size", "2", "--memory", "512M:2G", "--cpus", "2")
    assert made == "web: 0 of 2 ready\n"
    pool = fabric.pools["web"]
    assert (pool.spec.resources.memory_min_mib, pool.spec.resources.memory_max_mib) == (512, 2048)
    assert pool.spec.resources.cpu_milli == 2000
    pool.created_at.FromSeconds(int(NOW_S) - 300)
    pool.ready = 1
    pool.hosts.append(pools_pb2.PoolOnHost(host="loom", wanted=2, ready=1, message="short of memory"))
    listed = cli.ok("pool", "ls").splitlines()
    assert listed[0].split() == ["NAME", "IMAGE", "READY", "MEMORY", "CPUS", "AGE", "NOTE"]
    assert listed[1].split() == ["web", "debian", "1/2", "512M:2G", "2", "5m", "loom:", "short", "of", "memory"]
    assert "loom=1/2" in cli.ok("pool", "ls", "-o", "wide")
    assert cli.ok("pool", "ls", "-o", "name") == "web\n"
    assert json.loads(cli.ok("pool", "inspect", "web"))["hosts"][0]["wanted"] == 2
    assert cli.ok("pool", "resize", "web", "4", "-o", "name") == "web\n"
    assert pool.spec.size == 4
    assert cli.ok("pool", "rm", "web") == "web\n"
    assert cli("pool", "rm", "web").code == 1
    assert cli("pool", "rm", "-f", "web").code == 0


def test_what_is_wrong_is_said(fabric: FakeFabric, cli: Cli) -> None:
    wrong = cli("pool", "create", "web", "--image", "debian", "--size", "many")
    assert wrong.code == 2 and "not a size of a pool" in wrong.err
    assert "sandloom pool ls" in cli("pool", "inspect", "nothing").err
    assert "pool create" in cli("pool", "ls").err
