"""Bare runtimes beside a benchmark: what a process is told, and how its answers are taken."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from hostd.drivers.contract import LayerFile
from hostd.drivers.oci.probe import HYBRID_CGROUPS
from hostd.spec import Resources
from tests.bench import bare
from tests.bench.bare import Bare
from tests.bench.report import CannotMeasure

LAYERS = (
    LayerFile(Path("/store/a b/blob"), 4096, bytes(range(16)), 290_001),
    LayerFile(Path("/store/c/blob"), 8192, bytes(16), 290_002),
)
SMALL = Resources(memory_min_mib=256, memory_max_mib=512, memory_mib=256, cpu_milli=1000)


def test_what_is_told_is_what_is_heard() -> None:
    assert bare.parse(bare.render(LAYERS, SMALL)) == (LAYERS, SMALL)


def test_a_module_runs_where_the_unified_tree_is_not_in_sight() -> None:
    argv = bare.inside("some.module", "{}")
    assert argv[:4] == ["unshare", "--mount", "--propagation", "slave"]
    assert argv[argv.index("-ec") + 1].startswith(f"umount -l {HYBRID_CGROUPS};")
    assert argv[-4:] == [sys.executable, "-m", "some.module", "{}"]


async def answered(said: str) -> float:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"print({said!r}, end='')", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        return await Bare(process).answer()
    finally:
        await process.wait()


async def test_an_answer_is_milliseconds() -> None:
    assert await answered('{"ms": 12.5}\n') == 12.5


@pytest.mark.parametrize(
    ("said", "why"), [('{"lacks": "runsc is not installed"}\n', "runsc is not installed"), ("", "ended")]
)
async def test_what_is_lacking_is_told(said: str, why: str) -> None:
    with pytest.raises(CannotMeasure, match=why):
        await answered(said)
