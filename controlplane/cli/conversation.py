"""One connection to a process: input forward, output back, until it ends, breaks or the user leaves.

Nothing is read from the user before the other side said that the process is there: a connection that breaks before
that has lost no input, and another one may be made.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.console import Console
from controlplane.cli.resume import Position

Call = Any  # grpc.aio.StreamStreamCall[StreamInput, StreamOutput]; the stubs' type has no usable name


@dataclass(frozen=True)
class Exited:
    """The process ended. `message` says why it could not be run, if so."""

    code: int
    message: str


@dataclass(frozen=True)
class Left:
    """The user left; `signalled` is the signal that did it, 0 when the detach keys did."""

    signalled: int


@dataclass(frozen=True)
class Broken:
    """The connection ended without an exit status; `heard`: the process had been there."""

    failure: Failure
    heard: bool = False


Outcome = Exited | Left | Broken
NO_STATUS = Failure(Condition.UNAVAILABLE, "StreamEnded", "the stream ended without an exit status")


async def converse(call: Call, start: sandboxes_pb2.StreamStart, console: Console, position: Position) -> Outcome:
    """Runs one connection to its end. BrokenPipeError when the user's output is closed; the call is cancelled."""
    there = asyncio.Event()
    reader = asyncio.create_task(_read(call, console, position, there))
    writer = asyncio.create_task(_write(call, start, console, there))
    leaving = asyncio.create_task(console.left.wait())
    try:
        await asyncio.wait({reader, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return reader.result() if reader.done() else Left(console.signalled)
    finally:
        console.connected = False
        call.cancel()
        for task in (reader, writer, leaving):
            task.cancel()
        await asyncio.gather(reader, writer, leaving, return_exceptions=True)


async def _write(call: Call, start: sandboxes_pb2.StreamStart, console: Console, there: asyncio.Event) -> None:
    """Sends until cancelled. A failed write is no news: the reader learns why the call ended."""
    try:
        await call.write(sandboxes_pb2.StreamInput(start=start))
        await there.wait()
        while True:
            await call.write(await console.next_input())
    except (grpc.RpcError, asyncio.InvalidStateError):
        return


async def _read(call: Call, console: Console, position: Position, there: asyncio.Event) -> Outcome:
    try:
        async for output in call:
            kind = output.WhichOneof("output")
            console.begun()
            console.connected = True
            there.set()
            if kind == "exit":
                return Exited(output.exit.code, output.exit.message)
            if kind in ("stdout", "stderr"):
                data = position.fresh(output)
                if data:
                    await console.show(kind, data)
    except grpc.RpcError as error:
        return Broken(parse_error(error), there.is_set())
    return Broken(NO_STATUS, there.is_set())
