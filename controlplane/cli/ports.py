"""Published ports whose number on the host was left to the host (0): which it chose, asked of it once they listen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from controlplane.api.services import parse_publish
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import lookup
from controlplane.cli.connection import Fabric
from controlplane.cli.errors import CliError
from controlplane.cli.servicecommands import usage_of

LAST_WORD_S = 5.0


def are_left_to_host(sandbox: sandboxes_pb2.Sandbox) -> bool:
    """Whether the host chooses one of its ports. Pure."""
    return any(parse_publish(text).host_port == 0 for text in sandbox.spec.services.publish)


async def chosen(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox) -> list[str]:
    """Its ports as they are listened for (`127.0.0.1:43210:8000/tcp`); none while it or its host does not answer."""
    try:
        usage = await usage_of(fabric, sandbox)
    except CliError:
        return []
    return list(usage.published) if usage is not None else []


async def by_uid(fabric: Fabric, sandboxes: Iterable[sandboxes_pb2.Sandbox]) -> dict[str, list[str]]:
    """The same of those whose ports their hosts chose, by uid."""
    asked = [sandbox for sandbox in sandboxes if are_left_to_host(sandbox)]
    found = await asyncio.gather(*(chosen(fabric, sandbox) for sandbox in asked))
    return {sandbox.uid: ports for sandbox, ports in zip(asked, found, strict=True)}


async def tell(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox, say: Callable[[str], None]) -> None:
    """Says which ports were chosen, if any were."""
    if are_left_to_host(sandbox) and (ports := await chosen(fabric, sandbox)):
        say(f"sandloom: {sandbox.name} is published at {', '.join(ports)}")


@asynccontextmanager
async def telling(fabric: Fabric, sandbox: sandboxes_pb2.Sandbox, say: Callable[[str], None]) -> AsyncIterator[None]:
    """While the block runs, says so as soon as it runs; what is being asked when it ends is waited for."""
    asking = False

    async def wait_and_tell() -> None:
        nonlocal asking
        now = await lookup.until(fabric, sandbox.uid, _has_begun, deadline_s=None)
        asking = True
        if now is not None:
            await tell(fabric, now, say)

    task = asyncio.create_task(wait_and_tell()) if are_left_to_host(sandbox) else None
    try:
        yield
    finally:
        if task is not None:
            if asking:
                await asyncio.wait({task}, timeout=LAST_WORD_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _has_begun(now: sandboxes_pb2.Sandbox | None) -> bool:
    return lookup.has_ended(now) or (now is not None and now.status.phase == sandboxes_pb2.RUNNING)
