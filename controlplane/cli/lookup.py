"""Sandboxes by what users type: a name, a uid, or a prefix of a uid that fits one sandbox only."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable, Sequence

from controlplane.api.status import Condition
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.connection import CALL_S, PAGE_SIZE, Fabric, calling, every_page
from controlplane.cli.errors import CallFailed, CliError, Unreachable

ENDED = (sandboxes_pb2.EXITED, sandboxes_pb2.FAILED)
PATIENCE_S = 60.0  # how long a control plane may be away while something is waited for
POLL_S = 0.15
NOT_FOUND = "NOT_FOUND"
HOST_ENDS = ("HostLost", "HostRemoved", "HostLetGo")  # events that end a sandbox for its host's sake


async def list_sandboxes(fabric: Fabric, *, ended: bool) -> list[sandboxes_pb2.Sandbox]:
    """Every sandbox, by name; those that ended only when asked for."""

    async def page(token: str) -> sandboxes_pb2.ListSandboxesResponse:
        request = sandboxes_pb2.ListSandboxesRequest(page_size=PAGE_SIZE, page_token=token, ended=ended)
        with calling("cannot list the sandboxes"):
            return await fabric.sandboxes.ListSandboxes(request, timeout=CALL_S)

    return await every_page(page, lambda answer: list(answer.sandboxes))


async def get(fabric: Fabric, reference: str) -> sandboxes_pb2.Sandbox:
    """The sandbox with exactly this name or uid. CallFailed (NOT_FOUND) when there is none."""
    remedies = {Condition.NOT_FOUND: "`sandloom ps -a` lists those there are"}
    with calling(f"no sandbox {reference}", remedies):
        return await fabric.sandboxes.GetSandbox(sandboxes_pb2.GetSandboxRequest(name=reference), timeout=CALL_S)


async def find(fabric: Fabric, typed: str) -> tuple[sandboxes_pb2.Sandbox, str]:
    """The sandbox meant, and what to call it in further requests: what was typed, or its uid for a prefix."""
    try:
        return await get(fabric, typed), typed
    except CallFailed as error:
        if error.code != NOT_FOUND:
            raise
        present = await list_sandboxes(fabric, ended=True)
        sandbox = by_prefix(typed, present, error)
        return sandbox, sandbox.uid


def by_prefix(typed: str, present: Sequence[sandboxes_pb2.Sandbox], missing: CliError) -> sandboxes_pb2.Sandbox:
    """The one whose uid begins with `typed`. CliError names the several it fits, else the name that is nearest."""
    fits = [sandbox for sandbox in present if typed and sandbox.uid.startswith(typed)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(f"{sandbox.uid} ({sandbox.name})" for sandbox in fits[:5])
        raise CliError(f"several sandboxes' uids begin with {typed}", names, "type more of the uid")
    near = difflib.get_close_matches(typed, [sandbox.name for sandbox in present], 1)
    if near:
        raise CliError(f"no sandbox {typed}", "no name or uid is like it", f"did you mean {near[0]}?") from missing
    raise missing


async def until(
    fabric: Fabric, uid: str, reached: Callable[[sandboxes_pb2.Sandbox | None], bool], *, deadline_s: float | None
) -> sandboxes_pb2.Sandbox | None:
    """The sandbox as soon as `reached` holds of it (None: its record is gone), or as it is at the deadline.

    A control plane that does not answer is waited for, PATIENCE_S at most; then Unreachable.
    """
    loop = asyncio.get_running_loop()
    give_up_s = None if deadline_s is None else loop.time() + deadline_s
    heard_s = loop.time()
    while True:
        try:
            sandbox = await _get_or_none(fabric, uid)
            heard_s = loop.time()
            if reached(sandbox) or (give_up_s is not None and loop.time() >= give_up_s):
                return sandbox
        except Unreachable:
            if loop.time() - heard_s > PATIENCE_S or (give_up_s is not None and loop.time() >= give_up_s):
                raise
        await asyncio.sleep(POLL_S)


async def _get_or_none(fabric: Fabric, uid: str) -> sandboxes_pb2.Sandbox | None:
    try:
        return await get(fabric, uid)
    except CallFailed as error:
        if error.code == NOT_FOUND:
            return None
        raise


def waits_for(sandbox: sandboxes_pb2.Sandbox) -> str:
    """What one that has not begun waits for, as a line."""
    phase = sandboxes_pb2.Phase.Name(sandbox.status.phase).lower()
    return f"{sandbox.name} is {phase}: {sandbox.status.message or 'waiting for its host'}"


async def lost_with(fabric: Fabric, name: str) -> str:
    """What became of the host of a sandbox whose record is gone; "" when it did not go because of its host."""
    request = sandboxes_pb2.WatchEventsRequest(subject=name)
    with calling(f"cannot read what became of {name}"):
        events = [event async for event in fabric.sandboxes.WatchEvents(request, timeout=CALL_S)]
    last = next((event for event in reversed(events) if event.kind == "sandbox"), None)
    return last.message if last is not None and last.reason in HOST_ENDS else ""


def has_ended(sandbox: sandboxes_pb2.Sandbox | None) -> bool:
    """EXITED, FAILED, or gone altogether."""
    return sandbox is None or sandbox.status.phase in ENDED


def failure_of(sandbox: sandboxes_pb2.Sandbox) -> CliError:
    """Why a FAILED sandbox failed, as an error."""
    status = sandbox.status
    what = "did not start" if not status.HasField("started_at") else "failed"
    why = ": ".join(part for part in (status.reason, status.message) if part)
    return CliError(f"{sandbox.name} {what}", why, f"`sandloom events --subject {sandbox.name}` tells what led to it")
