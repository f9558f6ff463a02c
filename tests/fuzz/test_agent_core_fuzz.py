"""The agent's pure core against hostile bytes, under ASan and UBSan: frames, messages, passwd files, windows.

A mutation driver with fixed seeds runs always; clang's libFuzzer, where it is installed, goes on from the same seeds.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from guestagent.errors import ProtocolError
from guestagent.frames import Limits, check_shape, encode_frame, sync_flush
from guestagent.messages import StartProcess
from guestagent.wire import encode_configure, encode_start
from tests.guestagent.realagent import CONFIGURE, SOURCE, built

FRAMES, MESSAGE, REPLY, USER, TEXT, FLOW = (bytes([number]) for number in range(6))
ROUNDS = 200
LIBFUZZER_S = 10
AGENT_MAX_NODES = 16384  # message.h

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("gcc", "make", "pkg-config")),
    reason="needs gcc, make and pkg-config (deploy/install-packages.sh)",
)

START = StartProcess(1, (b"sh", b"-c", b"true"), (b"PATH=/bin",), b"/tmp", b"1:2", True, 24, 80, True)
REQUESTS: list[list[object]] = [
    [1, 1, 1],
    [2, 2, encode_configure(CONFIGURE)],
    [3, 3, encode_start(START)],
    [4, 0, 1, 5, b"data" * 100, True],
    [5, 0, 1, 2, 70000],
    [6, 5, 1, 15],
    [7, 6, 1, 24, 80],
    [8, 7],
    [9, 8, 1000],
    [10, 9, 1],
    [11, 10, {"layers": [b"u" * 16], "deadline_ms": 5}],
    [15, 11, 300, 2048, 4096, 5000],
    [16, 12, 3000],
    [17, 13],
    [18, 14, 4, 1000],
]
PASSWD = b"".join(b"user%d:x:%d:%d:comment:/home/user%d:/bin/sh\n" % (n, n, n, n) for n in range(40))
GROUP = b"".join(b"group%d:x:%d:user1,user2,user%d\n" % (n, n, n) for n in range(70))


def seeds() -> list[bytes]:
    rng = random.Random(11)
    frames = [encode_frame(message) for message in REQUESTS]
    flush, again = sync_flush(b"nonce..1"), sync_flush(b"nonce..2")
    found = [FRAMES + flush[:64] + b"".join(frames) + cut + again + b"".join(frames) for cut in (b"", frames[2][:20])]
    found.append(FRAMES + flush[:16] + struct.pack(">II", 131072, 0) + b"x" * 131072 + again[:32] + frames[0])
    found += [MESSAGE + frame[8:] for frame in frames]
    found.append(REPLY + rng.randbytes(300))
    for asked in (b"", b"user3", b"7", b"user3:group5", b"7:9", b"nobody:", b"99999999999"):
        found.append(USER + bytes([len(asked) + 1]) + asked + PASSWD + GROUP + b"x" * 3000 + b"\n:::::\n")
    found.append(TEXT + b"MemTotal: 12 kB\nCached:  345 kB\nsome avg10=0.00 total=123456789012345678901\n")
    found += [FLOW + rng.randbytes(900) for _ in range(4)]
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, seed in enumerate(seeds()):
        (folder / f"{number:03}").write_bytes(seed)
    return folder


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_breaks_the_core(corpus: Path, seed: int) -> None:
    files = sorted(map(str, corpus.iterdir()))
    done = subprocess.run(
        [str(built("fuzz-core")), str(seed), str(ROUNDS), *files], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang for libFuzzer; the mutation driver ran instead")
def test_libfuzzer_finds_nothing(corpus: Path, tmp_path: Path) -> None:
    program = built("libfuzzer-core")
    done = subprocess.run(
        [str(program), f"-max_total_time={LIBFUZZER_S}", "-seed=1", "-max_len=140000", str(tmp_path), str(corpus)],
        capture_output=True, text=True, timeout=LIBFUZZER_S + 100, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def python_takes(payload: bytes) -> bool:
    try:
        check_shape(payload, Limits(max_nodes=AGENT_MAX_NODES))
    except ProtocolError:
        return False
    return True


def test_both_ends_take_the_same_shapes() -> None:
    """The agent's check of a payload's shape and the host's are one contract: they agree on any bytes."""
    rng = random.Random(5)
    payloads = [encode_frame(message)[8:] for message in REQUESTS]
    deep = [b"\x91" * n + b"\xc0" for n in range(10)] + [b"\x81\x00" * n + b"\xc0" for n in range(10)]
    wide = [struct.pack(">BH", 0xDC, n) + b"\xc0" * n for n in (0, 4095, 4096, 4097)]
    nodes = [b"\x95" + (struct.pack(">BH", 0xDC, n) + b"\xc0" * n) * 5 for n in (3275, 3276, 3277, 4000)]
    payloads += deep + wide + nodes + [b"", b"\xc1", b"\xc7\x00\x00", b"\xd4\x00\x00"]
    for _round in range(4000):
        payload = bytearray(rng.choice(payloads[:11]))
        for _change in range(rng.randrange(1, 4)):
            payload[rng.randrange(len(payload))] = rng.choice([rng.randrange(256), 0xC0, 0x90, 0xDD, 0xC6])
        payloads.append(bytes(payload[: rng.choice([len(payload), rng.randrange(len(payload) + 1)])]))
    told = subprocess.run(
        [str(built("fuzz-core")), "shape"],
        input=b"".join(struct.pack(">I", len(payload)) + payload for payload in payloads),
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    differing = [p for p, mark in zip(payloads, told.stdout.decode(), strict=True) if (mark == "1") != python_takes(p)]
    assert differing == []
    assert b"0" in told.stdout and b"1" in told.stdout


def test_the_core_does_no_io() -> None:
    """What is fuzzed stays pure: no system header but those for memory and types."""
    for name in ("text", "wire", "shape", "message", "flow", "user"):
        for suffix in (".c", ".h"):
            path = SOURCE / (name + suffix)
            if path.exists():
                banned = ("<unistd.h>", "<fcntl.h>", "<sys/", "<stdio.h>", "<stdlib.h>", "<time.h>", '"agent.h"')
                assert not any(header in path.read_text() for header in banned), path
