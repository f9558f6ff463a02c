"""How fast a layer's tar becomes an EROFS image: ours, in one pass, against `tar -x` and `mkfs.erofs`.

    $ make bench-erofs

Three tars: a real userland (Debian with python3; a synthetic one where mmdebstrap cannot run), many small files, a
few large ones. Ours is the whole way into the store, as an import goes it: conversion, SHA-256 of the tar and of the
image, ownership, fsync, publication. The peer neither hashes nor syncs, and runs with the options that give the same
kind of image (uncompressed, no inline data). Both work in memory (tmpfs) where there is room, so that no disk decides;
the tar is in the page cache.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from sharedcache.convert import convert_layer
from sharedcache.domains import Domain
from sharedcache.limits import Limits
from sharedcache.objects import ObjectKind
from sharedcache.store import Store
from tests.bench.report import CannotMeasure, Report, interleaved, ratio, run, timed_ms
from tests.userland import UserlandUnavailable, userland_tar

ROUNDS = 5
PEER = "tar -x, then mkfs.erofs -Enoinline_data -T0"
PROMISED = (("image, peer over ours", 1.0), ("small files, peer over ours", 1.0), ("large files, peer over ours", 1.0))
TIMEOUT_S = 300
_MEMORY = Path("/dev/shm")


def body(report: Report) -> None:
    """Measures all three tars."""
    for tool in ("tar", "mkfs.erofs", "fsck.erofs"):
        if shutil.which(tool) is None:
            raise CannotMeasure(f"needs {tool} (apt install tar erofs-utils)")
    if os.geteuid() != 0:
        raise CannotMeasure("needs root: the store gives blobs to groups of its own, and tar makes device nodes")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=room(), prefix="bench-erofs-") as folder:
        work = Path(folder)
        real, what = image_tar(work)
        report.note(f"image: {what}, {real.stat().st_size >> 20} MiB; both sides worked in {fs_type(work)}")
        report.note("ours includes SHA-256 of tar and image, fsync and publication; the peer does none of these")
        report.note("ours reads, hashes and writes in three threads: it needs a second core that is free")
        report.note(f"load average when this began: {load:.2f} on {os.cpu_count()} cpus")
        compare(report, "image", real, work)
        for name, make in (("small files", small_files), ("large files", large_files)):
            tar = make(work / "made.tar")
            compare(report, name, tar, work)
            tar.unlink()


def compare(report: Report, name: str, tar: Path, work: Path) -> None:
    """Both sides turn about on one tar."""
    tar.read_bytes()  # into the page cache
    times = interleaved({"peer": lambda: peer_ms(tar, work), "ours": lambda: ours_ms(tar, work)}, ROUNDS)
    report.row(f"{name}: tar -x + mkfs.erofs", times["peer"])
    report.row(f"{name}: ours", times["ours"])
    report.bar(f"{name}, peer over ours", ratio(times["peer"], times["ours"]), at_least=1.0, peer=PEER)


def ours_ms(tar: Path, work: Path) -> float:
    """The tar into a store of its own; the result is checked outside the time."""
    root = work / "store"
    with Store.open(root, min_free_bytes=0) as store:
        blob: list[Path] = []

        def convert() -> None:
            with tar.open("rb", buffering=0) as source, store.stage(tar.stat().st_size) as staging:
                meta = convert_layer(source, staging.file, limits=Limits())
                domain = Domain.tenant("bench")
                blob.append(store.publish(staging, domain=domain, kind=ObjectKind.LAYER, meta=meta).path)

        spent_ms = timed_ms(convert)
        check(["fsck.erofs", str(blob[0])])
    shutil.rmtree(root)
    return spent_ms


def peer_ms(tar: Path, work: Path) -> float:
    """The tar unpacked, and the folder made into an image."""
    root, image = work / "root", work / "image.erofs"
    root.mkdir()

    def convert() -> None:
        check(["tar", "-xf", str(tar), "-C", str(root), "--numeric-owner", "--xattrs", "--xattrs-include=*"])
        check(["mkfs.erofs", "--quiet", "-Enoinline_data", "-T0", str(image), str(root)])

    spent_ms = timed_ms(convert)
    image.unlink()
    shutil.rmtree(root)
    return spent_ms


def check(argv: list[str]) -> None:
    """Runs a tool that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise CannotMeasure(f"{argv[0]} failed: {done.stderr.strip()[-500:]}")


def room() -> Path | None:
    """Memory where it has room for a tar, a tree and an image of about 500 MiB each; else the usual folder."""
    try:
        status = os.statvfs(_MEMORY)
    except OSError:
        return None
    return _MEMORY if status.f_bavail * status.f_frsize > 3 << 30 else None


def fs_type(path: Path) -> str:
    """The file system that `path` is on, by name."""
    asked = ["stat", "-f", "-c", "%T", str(path)]
    return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


# ── tars ──


def image_tar(work: Path) -> tuple[Path, str]:
    """A real userland, or what looks like one, and what it is."""
    try:
        return userland_tar(), "a Debian userland with python3"
    except UserlandUnavailable as lack:
        return write_tar(work / "image.tar", image_like), f"synthetic ({lack})"


def small_files(path: Path) -> Path:
    """40,000 files of up to 6 KiB, 200 in a folder."""

    def fill(add: Callable[[str, bytes], None], chance: random.Random) -> None:
        for number in range(40_000):
            add(f"usr/share/pkg{number // 200:03d}/module_{number}.py", chance.randbytes(chance.randrange(100, 6000)))

    return write_tar(path, fill)


def large_files(path: Path) -> Path:
    """6 files of 64 MiB."""

    def fill(add: Callable[[str, bytes], None], chance: random.Random) -> None:
        for number in range(6):
            add(f"opt/model{number}.bin", chance.randbytes(64 << 20))

    return write_tar(path, fill)


def image_like(add: Callable[[str, bytes], None], chance: random.Random) -> None:
    """10,000 files whose sizes are spread as in a userland: most small, a few of many MiB."""
    for number in range(10_000):
        size = min(int(chance.lognormvariate(8.2, 1.8)), 24 << 20)
        add(f"usr/lib/pkg{number // 25:03d}/file{number}", chance.randbytes(size))


def write_tar(path: Path, fill: Callable[[Callable[[str, bytes], None], random.Random], None]) -> Path:
    """A tar at `path`, always the same for the same `fill`."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            tar.addfile(info, io.BytesIO(content))

        fill(add, random.Random(7))
    return path


if __name__ == "__main__":
    raise SystemExit(run("erofs", body, PROMISED))
