"""The services' pure core under ASan and UBSan: filters by a BPF interpreter, frames and packets from a generator.

`make soak-abi` runs the million of the issue's bar; here it is fewer.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.guestagent.realagent import SOURCE, built

ROUNDS, SOAK_ROUNDS = 100_000, 1_000_000

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("gcc", "make", "pkg-config")),
    reason="needs gcc, make and pkg-config (deploy/install-packages.sh)",
)


def run(seed: int, rounds: int) -> None:
    done = subprocess.run(
        [str(built("services-core")), str(seed), str(rounds)], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-4000:]


@pytest.mark.parametrize("seed", [1, 2])
def test_filters_frames_and_packets(seed: int) -> None:
    run(seed, ROUNDS)


@pytest.mark.soak
def test_a_million_frames_and_packets() -> None:
    run(20251125, SOAK_ROUNDS)


def test_the_core_does_no_io() -> None:
    """What is fuzzed stays pure."""
    for name in ("policy", "mux", "packet"):
        for suffix in (".c", ".h"):
            text = (SOURCE / (name + suffix)).read_text()
            banned = ("<unistd.h>", "<fcntl.h>", "<stdio.h>", "<stdlib.h>", "<time.h>", '"agent.h"')
            assert not any(header in text for header in banned), name
