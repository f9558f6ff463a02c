"""`sandloom plan calibrate`: runs a few guests on a real host, and writes down what they cost and how fast they
change."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.api.v1 import images_pb2, sandboxes_pb2
from controlplane.capacity.calibration import Calibration, dump
from controlplane.capacity.forecast import Seen, calibrated
from controlplane.cli import lookup
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import CALL_S, Fabric, calling
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.progress import Progress
from controlplane.cli.run import until_gone
from controlplane.cli.sizes import parse_memory_range

MIB = 1 << 20
START_S, RESIZE_S, SETTLE_S = 300.0, 60.0, 30.0
STEADY = 0.01
"""The ledger counts as settled once its sum moves by less than this between two looks a second apart."""


@dataclass(frozen=True)
class CalibrateOptions:
    """`program` empty: sleep, which an image must have then."""

    image: str
    guests: int
    least_mib: int
    most_mib: int
    program: tuple[str, ...]
    output: Path | None


def act(options: CalibrateOptions, shell: Shell) -> int:
    calibration = shell.over(lambda fabric: _measure(fabric, options, shell))
    text = dump(calibration)
    if options.output is None:
        shell.printer.write(text)
        return 0
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(
            "cannot write the calibration", f"{options.output} ({error.strerror})", "name another"
        ) from error
    shell.say(f"calibration: {options.output}")
    return 0


async def _measure(fabric: Fabric, options: CalibrateOptions, shell: Shell) -> Calibration:
    with calling(f"no image {options.image}"):
        image = await fabric.images.GetImage(images_pb2.GetImageRequest(name=options.image), timeout=CALL_S)
    image_mib = sum(layer.size_bytes for layer in image.layers) / MIB
    made: list[sandboxes_pb2.Sandbox] = []
    with Progress(quiet=shell.quiet or not sys.stderr.isatty()) as progress:
        async with _taken_down(fabric, made):
            progress.update("a cold boot")
            cold = await _start(fabric, options, made, cold=True)
            await _remove(fabric, made.pop())
            progress.update("a guest that makes the template")
            await _start(fabric, options, made)
            await _remove(fabric, made.pop())
            seen, clones = [], []
            for number in range(1, options.guests + 1):
                progress.update(f"guest {number} of {options.guests}")
                clones.append(await _start(fabric, options, made))
                seen.append(await _settled(fabric, made))
            last = clones[-1]
            base = replace(
                Calibration(), measured_on=f"{last.assignment.host}, {last.status.accel}, image {options.image}",
                start_cold_s=_took_s(cold), start_clone_s=min(map(_took_s, clones)),
            )  # fmt: skip
            base = _counted(base, last.status.host_pid)
            progress.update("resizing")
            base = await _resized(fabric, options, made[-1], base)
    try:
        return calibrated(base, seen, image_mib)
    except ValueError as error:
        raise CliError("cannot calibrate", str(error)) from error


@asynccontextmanager
async def _taken_down(fabric: Fabric, made: list[sandboxes_pb2.Sandbox]) -> AsyncIterator[None]:
    """Removes every sandbox of the list, however the block ends."""
    try:
        yield
    finally:
        for box in made:
            await _remove(fabric, box)


async def _remove(fabric: Fabric, box: sandboxes_pb2.Sandbox) -> None:
    with calling(f"cannot remove {box.name}"):
        request = sandboxes_pb2.DeleteSandboxRequest(name=box.uid, force=True, allow_missing=True)
        await fabric.sandboxes.DeleteSandbox(request, timeout=CALL_S)
    await until_gone(fabric, box)


async def _start(
    fabric: Fabric, options: CalibrateOptions, made: list[sandboxes_pb2.Sandbox], *, cold: bool = False
) -> sandboxes_pb2.Sandbox:
    spec = sandboxes_pb2.SandboxSpec(
        image=options.image, cold=cold, process=sandboxes_pb2.Process(argv=options.program or ("sleep", "100000")),
        resources=sandboxes_pb2.Resources(
            memory_min_mib=options.least_mib, memory_max_mib=options.most_mib, cpu_milli=1000
        ),
    )  # fmt: skip
    with calling(f"cannot start a guest of {options.image}"):
        request = sandboxes_pb2.CreateSandboxRequest(spec=spec, request_id=str(uuid.uuid4()))
        box = await fabric.sandboxes.CreateSandbox(request, timeout=CALL_S)
    made.append(box)
    now = await lookup.until(fabric, box.uid, _has_begun, deadline_s=START_S)
    if now is None or now.status.phase != sandboxes_pb2.RUNNING:
        if now is not None and lookup.has_ended(now):
            raise lookup.failure_of(now)
        raise CliError("a guest did not start in time", box.name, "`sandloom events` tells what it waits for")
    return now


def _has_begun(box: sandboxes_pb2.Sandbox | None) -> bool:
    return lookup.has_ended(box) or (box is not None and box.status.phase == sandboxes_pb2.RUNNING)


def _took_s(box: sandboxes_pb2.Sandbox) -> float:
    return round(sum(phase.seconds for phase in box.status.start_phases), 3)


async def _settled(fabric: Fabric, made: list[sandboxes_pb2.Sandbox]) -> Seen:
    """What the ledger shows of these once they hold still."""
    uids = {box.uid for box in made}
    before, give_up_s = -1.0, time.monotonic() + SETTLE_S
    while True:
        with calling("cannot read the sharing ledger"):
            ledger = await fabric.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(), timeout=CALL_S)
        rows = [row for row in ledger.sandboxes if row.uid in uids]
        distinct_mib = sum(row.proportional_bytes for row in rows) / MIB
        if rows and (abs(distinct_mib - before) <= STEADY * distinct_mib or time.monotonic() > give_up_s):
            count = len(rows)
            layers_mib = sum(row.layer_bytes for row in rows) / count / MIB
            return Seen(count, distinct_mib, layers_mib, sum(row.vmm_bytes for row in rows) / count / MIB)
        before = distinct_mib
        await asyncio.sleep(1.0)


def _counted(base: Calibration, pid: int) -> Calibration:
    """Processes, open files and memory files of a VMM, when it is on this machine and may be looked at."""
    folder = Path(f"/proc/{pid}")
    try:
        tasks = len(list((folder / "task").iterdir()))
        links = [str(link.readlink()) for link in (folder / "fd").iterdir()]
    except OSError:
        return base
    files = sum(link.startswith("/memfd:") for link in links)
    return replace(
        base, guest_pids=max(1, tasks), guest_file_descriptors=len(links), guest_shared_memory_files=max(1, files)
    )


async def _resized(
    fabric: Fabric, options: CalibrateOptions, box: sandboxes_pb2.Sandbox, base: Calibration
) -> Calibration:
    """How long a guest takes to grow to its ceiling, and how much a second it gives back."""
    grew_s = await _resize(fabric, box, options.most_mib)
    shrank_s = await _resize(fabric, box, options.least_mib)
    if grew_s is None or shrank_s is None:
        return base
    rate = (options.most_mib - options.least_mib) / max(shrank_s, 1e-3)
    return replace(base, resize_lag_s=round(grew_s, 3), reclaim_mib_s=round(rate, 1))


async def _resize(fabric: Fabric, box: sandboxes_pb2.Sandbox, memory_mib: int) -> float | None:
    begun_s = time.monotonic()
    with calling(f"cannot resize {box.name}"):
        request = sandboxes_pb2.ResizeSandboxRequest(name=box.uid, memory_mib=memory_mib)
        await fabric.sandboxes.ResizeSandbox(request, timeout=CALL_S)

    def done(now: sandboxes_pb2.Sandbox | None) -> bool:
        return now is None or now.status.resize.state == sandboxes_pb2.RESIZE_DONE

    now = await lookup.until(fabric, box.uid, done, deadline_s=RESIZE_S)
    return time.monotonic() - begun_s if done(now) and now is not None else None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="what the guests run; nothing else of it should run meanwhile")
    parser.add_argument("--guests", default="3", metavar="N", help="how many guests at once, 3 unless given")
    parser.add_argument("--memory", default="256M:1G", metavar="MIN:MAX", help="of each; the range is resized over")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the calibration there; it is printed otherwise"
    )


def parse(namespace: argparse.Namespace) -> CalibrateOptions:
    if not namespace.guests.isdigit() or not 2 <= int(namespace.guests) <= 64:
        raise UsageError("not a number of guests", repr(namespace.guests), "2 to 64: one and more are compared")
    memory = parse_memory_range(namespace.memory)
    if memory.min_mib == memory.max_mib:
        raise UsageError("nothing to resize over", repr(namespace.memory), "give a range, as 256M:1G")
    return CalibrateOptions(
        namespace.image, int(namespace.guests), memory.min_mib, memory.max_mib, namespace.program, namespace.write
    )


COMMAND = Command(
    words=("plan", "calibrate"),
    summary="measure on a real host what guests cost, for the other plans",
    description="Boots one guest cold, then runs several clones of IMAGE and reads the sharing ledger, the start phases"
    " and how long a resize takes. The guests are removed again. Use an image and a program like your workload's.",
    configure=configure,
    parse=parse,
    act=act,
    examples=(
        "sandloom plan calibrate debian --write calibration.json",
        "sandloom plan calibrate debian --guests 4 --memory 256M:2G -- python3 -m http.server",
    ),
    takes_command=True,
    operand="image",
)
