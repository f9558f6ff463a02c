"""A fake agent on a unix socket, as QEMU shows a guest's port, however it misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from guestagent.fake import FakeAgent

Speak = Callable[[bytes], bytes]


@dataclass
class Port:
    """The guest's end. `speak` is what it says to what it hears."""

    path: Path
    agent: FakeAgent
    dribbles: bool = False
    heard_bytes: int = 0
    _writer: asyncio.StreamWriter | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            while data := await reader.read(65536):
                self.heard_bytes += len(data)
                writer.write(self.agent.receive(data))
                while piece := self.agent.more(1) if self.dribbles else b"":
                    writer.write(piece)
                    await writer.drain()
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.agent.hang_up()
            writer.close()

    def say(self, data: bytes) -> None:
        """The agent speaks of its own accord."""
        assert self._writer is not None
        self._writer.write(data)

    def hang_up(self) -> None:
        """The guest's end of the port closes."""
        assert self._writer is not None
        self._writer.close()


@contextlib.asynccontextmanager
async def port_of(folder: Path, agent: FakeAgent, *, dribbles: bool = False) -> AsyncIterator[Port]:
    """A port that listens as long as the block runs."""
    port = Port(folder / "agent.sock", agent, dribbles)
    server = await asyncio.start_unix_server(port.serve, str(port.path))
    try:
        yield port
    finally:
        server.close()
