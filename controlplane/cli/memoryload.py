"""What `sandloom replay` runs in the sandbox, as `python3 -u -c SOURCE`: it holds as much memory as it is told to.

A line in is `MIB PASSES`: hold so many MiB, each page written, then write over all of them PASSES times. Lines out:

    ready            once, before anything is read
    has MIB          on the way, at most each TELL_S
    done MIB BUSY    it holds them; BUSY seconds went into it
    refused MIB      the kernel gives no more address space: this is what it has

Ends at the end of its input. Only the standard library, of any Python from 3.7 on; memory that is let go of goes back
to the kernel at once (munmap).
"""

from __future__ import annotations

import mmap
import sys
import time
from typing import Callable, Iterator  # noqa: UP035 - of collections.abc they came later

CHUNK_MIB = 2
CHUNK_BYTES = CHUNK_MIB << 20
TELL_S = 0.2
PATTERN = bytes(range(256)) * (CHUNK_BYTES // 256)


def filled() -> mmap.mmap:
    """Two MiB of their own, every page of them written."""
    chunk = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    chunk.write(PATTERN)
    return chunk


def follow(lines: Iterator[str], say: Callable[[str], object]) -> None:
    """See the module; `say` takes each line out."""
    held: list[mmap.mmap] = []
    say("ready")
    for line in lines:
        wanted_mib, passes = [int(word) for word in line.split()]
        begun_s = told_s = time.monotonic()
        count = -(-wanted_mib // CHUNK_MIB)
        while len(held) > count:
            held.pop().close()
        while len(held) < count:
            try:
                held.append(filled())
            except (OSError, MemoryError):
                say(f"refused {len(held) * CHUNK_MIB}")
                break
            if time.monotonic() - told_s >= TELL_S:
                told_s = time.monotonic()
                say(f"has {len(held) * CHUNK_MIB}")
        for _ in range(passes):
            for chunk in held:
                chunk.seek(0)
                chunk.write(PATTERN)
        say(f"done {len(held) * CHUNK_MIB} {time.monotonic() - begun_s:.6f}")
    for chunk in held:
        chunk.close()


if __name__ == "__main__":
    follow(iter(sys.stdin.readline, ""), lambda text: print(text, flush=True))
