"""Image archives from a client into this host's store: spooled beside the store, then converted.

    STATE/.import-<random>/archive      gone when the import ends; a crash's remains go at the next start

The upload's bound is the disk's, not memory's. Afterwards every layer is published and verified, or nothing is.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from controlplane.api.v1 import images_pb2
from hostd import edge
from hostd.errors import InvalidSpec
from hostd.images import domain_of
from hostd.sandboxes import IMPORT_PREFIX
from sharedcache import oci
from sharedcache.errors import LimitExceeded
from sharedcache.store import Store

Chunks = AsyncIterator[images_pb2.ImportImageRequest]
Responses = AsyncIterator[images_pb2.ImportImageResponse]
Start = images_pb2.ImportImageRequest.Start

MAX_UPLOAD_BYTES = 64 << 30
TOLD_EVERY_BYTES = 16 << 20
CHUNK_DEADLINE_S = 60.0


async def import_image(chunks: Chunks, store: Store, state_dir: Path, host: str) -> Responses:
    """Progress, then the image. InvalidSpec, CacheError, TimeoutError when the client falls silent."""
    first = await _next(chunks)
    if first is None or first.WhichOneof("input") != "start":
        raise InvalidSpec("the first message of an import must be `start`")
    start = first.start
    domain_of(start.tenant)  # a bad tenant is refused before the upload, not after
    with tempfile.TemporaryDirectory(dir=state_dir, prefix=IMPORT_PREFIX) as folder:
        path = Path(folder) / "archive"
        async for progress in _receive(chunks, store, path, start.total_bytes):
            yield progress
        async for response in convert(store, path, start, host):
            yield response


async def _receive(chunks: Chunks, store: Store, path: Path, total_bytes: int) -> Responses:
    received_bytes, told_bytes = 0, 0
    await asyncio.to_thread(store.require_space, total_bytes)
    with path.open("wb") as file:
        while (message := await _next(chunks)) is not None:
            received_bytes += len(message.chunk)
            if received_bytes > MAX_UPLOAD_BYTES:
                raise LimitExceeded("upload_bytes", allowed=MAX_UPLOAD_BYTES, remedy="import a smaller image")
            await asyncio.to_thread(file.write, message.chunk)
            if received_bytes - told_bytes >= TOLD_EVERY_BYTES:
                told_bytes = received_bytes
                await asyncio.to_thread(store.require_space, max(0, total_bytes - received_bytes))
                yield progress_of("receive", received_bytes, total_bytes)
    if total_bytes and received_bytes != total_bytes:
        raise InvalidSpec(f"the upload ended after {received_bytes} of {total_bytes} bytes: send it again")
    yield progress_of("receive", received_bytes, received_bytes)


async def convert(store: Store, path: Path, start: Start, host: str) -> Responses:
    """Imports the archive at `path`: progress, then the image."""
    loop = asyncio.get_running_loop()
    steps: asyncio.Queue[images_pb2.ImportImageResponse | None] = asyncio.Queue()

    def tell(step: str, done_bytes: int, total_bytes: int) -> None:
        loop.call_soon_threadsafe(steps.put_nowait, progress_of(step, done_bytes, total_bytes))

    work = asyncio.ensure_future(
        asyncio.to_thread(
            oci.import_archive, store, path, domain=domain_of(start.tenant), cmd=tuple(start.cmd), progress=tell
        )
    )
    work.add_done_callback(lambda _: steps.put_nowait(None))
    try:
        while (step := await steps.get()) is not None:
            yield step
    except BaseException:
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # the thread goes on; nobody asks
        raise
    yield images_pb2.ImportImageResponse(image=edge.render_image(await work, start.tenant or "default", host))


async def _next(chunks: Chunks) -> images_pb2.ImportImageRequest | None:
    try:
        async with asyncio.timeout(CHUNK_DEADLINE_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise TimeoutError(f"nothing came of the upload for {CHUNK_DEADLINE_S:.0f} s: send it again") from None


def progress_of(step: str, done_bytes: int, total_bytes: int) -> images_pb2.ImportImageResponse:
    """How far a step is, as the API says it."""
    progress = images_pb2.ImportImageResponse.Progress(step=step, done_bytes=done_bytes, total_bytes=total_bytes)
    return images_pb2.ImportImageResponse(progress=progress)
