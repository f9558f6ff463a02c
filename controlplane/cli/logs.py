"""`sandloom logs`: what a sandbox's program has printed, its two streams apart, and what it prints next."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.api.status import parse_error
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup
from controlplane.cli.attachment import EARLY, PASSING, RETRY_S
from controlplane.cli.command import Command, Shell
from controlplane.cli.connection import Fabric, translated
from controlplane.cli.errors import CliError, UsageError
from controlplane.cli.resume import Position
from controlplane.cli.terminal import write_all

SILENT_S = 15.0
"""Longer than a control plane tries to reach a host (10 s): a call that lasted this long had got through."""


@dataclass(frozen=True)
class LogsOptions:
    """`tail_lines` 0: all that is kept."""

    name: str
    follow: bool = False
    tail_lines: int | None = None
    timestamps: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a sandbox's name, or the beginning of its uid")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument("-n", "--tail", metavar="N", help="only the last N lines")
    parser.add_argument("--timestamps", action="store_true", help="when each line was printed, UTC")


def parse(namespace: argparse.Namespace) -> LogsOptions:
    tail = namespace.tail
    if tail is not None and not (tail.isascii() and tail.isdigit()):
        raise UsageError("--tail takes a number of lines", repr(tail), "write it as 10")
    return LogsOptions(namespace.name, namespace.follow, None if tail is None else int(tail), namespace.timestamps)


class Stamper:
    """Puts the time in front of each line of each stream; a line that comes in pieces has one. Pure."""

    def __init__(self) -> None:
        self._within = {"stdout": False, "stderr": False}

    def stamped(self, stream: str, data: bytes, time_ns: int) -> bytes:
        """`data` with `2026-01-02T03:04:05.678901234Z ` before each line that begins in it."""
        stamp = Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)
        mark = f"{stamp.ToDatetime():%Y-%m-%dT%H:%M:%S}.{stamp.nanos:09d}Z ".encode()
        parts: list[bytes] = []
        for piece in _lines(data):
            parts.append(piece if self._within[stream] else mark + piece)
            self._within[stream] = not piece.endswith(b"\n")
        return b"".join(parts)


def _lines(data: bytes) -> list[bytes]:
    """Lines that end with a newline only: a terminal's carriage returns are part of them."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def act(options: LogsOptions, shell: Shell) -> int:
    return shell.over(lambda fabric: _logs(fabric, options, shell))


async def _logs(fabric: Fabric, options: LogsOptions, shell: Shell) -> int:
    sandbox, _ = await lookup.find(fabric, options.name)
    if options.tail_lines == 0 and not options.follow:
        return 0
    early = lookup.waits_for(sandbox) if options.follow and sandbox.status.phase in EARLY else ""
    if early:
        shell.say(f"sandloom: {early}")
    position, stamper = Position(complete=options.tail_lines is None), Stamper()
    loop = asyncio.get_running_loop()
    heard_s = loop.time()
    tail_lines = options.tail_lines or 0
    while True:
        request = sandboxes_pb2.GetLogsRequest(name=sandbox.uid, follow=options.follow, tail_lines=tail_lines)
        begun_s = loop.time()
        try:
            async for output in fabric.sandboxes.GetLogs(request):
                heard_s = loop.time()
                await _show(output, position, stamper if options.timestamps else None, shell)
            return 0
        except grpc.aio.AioRpcError as error:
            heard_s = loop.time() if loop.time() - begun_s > SILENT_S else heard_s
            away_s = loop.time() - heard_s
            if not options.follow or away_s > lookup.PATIENCE_S or parse_error(error).condition not in PASSING:
                raise translated(f"cannot read what {sandbox.name} said", error, {}) from error
        now = await lookup.until(fabric, sandbox.uid, lambda _: True, deadline_s=None)
        if now is None:
            raise CliError(f"{sandbox.name} was removed", "what it said went with it")
        if now.status.phase in EARLY and lookup.waits_for(now) != early:
            early = lookup.waits_for(now)
            shell.say(f"sandloom: {early}")
        position.replayed()
        tail_lines = 0 if position.started else tail_lines
        await asyncio.sleep(RETRY_S)


async def _show(output: sandboxes_pb2.StreamOutput, position: Position, stamper: Stamper | None, shell: Shell) -> None:
    stream = output.WhichOneof("output")
    if stream not in ("stdout", "stderr"):
        return
    data = position.fresh(output)
    if data and stamper is not None:
        data = stamper.stamped(stream, data, output.time_unix_ns)
    if data:
        await write_all(shell.stdio.stdout if stream == "stdout" else shell.stdio.stderr, data)


COMMAND = Command(
    words=("logs",),
    summary="show what a sandbox's program has printed",
    configure=configure,
    parse=parse,
    act=act,
    examples=("sandloom logs web", "sandloom logs -f --tail 20 --timestamps web"),
    operand="sandbox",
)
