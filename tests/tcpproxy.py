"""A TCP proxy on loopback that tests put between two parties: cut it, heal it, drop what is open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

CHUNK_BYTES = 1 << 16


class Proxy:
    """Forwards to `target` (HOST:PORT) while it is whole. Made by `proxied`."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._whole = asyncio.Event()
        self._whole.set()
        self._open: set[asyncio.StreamWriter] = set()
        self.address = ""
        self.connections = 0

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told: connections stay open."""
        self._whole.clear()

    def heal(self, *, forget: bool = False) -> None:
        """New data passes again; `forget`: but not over the connections that are open now, which stay mute."""
        if forget:
            self._open.clear()
            self._whole, mute = asyncio.Event(), self._whole
            assert not mute.is_set()
        self._whole.set()

    def drop(self) -> None:
        """Closes what is open."""
        for writer in self._open:
            writer.close()
        self._open.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        whole = self._whole
        await whole.wait()
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        self._open |= {writer, back}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back, whole))
                group.create_task(self._pump(there, writer, whole))
        finally:
            self._open -= {writer, back}
            writer.close()
            back.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, whole: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                await whole.wait()
                sink.write(data)
                await sink.drain()
        sink.close()


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    """A proxy that runs while the block does."""
    proxy = Proxy(target)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(proxy.serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
