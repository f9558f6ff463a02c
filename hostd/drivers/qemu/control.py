"""QEMU's control socket: connect, ask, tell; every wait has a deadline. `ControlLost` when QEMU does not answer."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from hostd.errors import ControlLost

# qemu.qmp logs each lost connection as critical; a VMM that goes away is ordinary here and reported by its owner.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

COMMAND_DEADLINE_S = 20.0
POLL_S = 0.003  # QEMU makes its sockets some 50 ms after exec


class Control:
    """One QMP session. Use as an async context manager or call close()."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, *, deadline_s: float, alive: asyncio.Future[str]) -> Control:
        """Connects as soon as QEMU listens. ControlLost after the deadline, or at once when `alive` resolves."""
        give_up = asyncio.get_running_loop().time() + deadline_s
        while True:
            await _until_bound(path, alive, give_up)
            client = QMPClient("sandloom")
            try:
                async with asyncio.timeout(max(0.1, give_up - asyncio.get_running_loop().time())):
                    await client.connect(str(path))
                return cls(client)
            except (QMPError, OSError, TimeoutError) as error:
                await _quietly_disconnect(client)
                if alive.done():
                    raise ControlLost(f"QEMU is gone before it could be asked: {_future_text(alive)}") from error
                if asyncio.get_running_loop().time() > give_up:
                    raise ControlLost(f"{path}: no answer from QEMU within {deadline_s:.0f} s: {error}") from error
            await asyncio.wait({alive}, timeout=POLL_S)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """A command's return value. ControlLost when the session or QEMU fails, with QEMU's own words."""
        try:
            async with asyncio.timeout(COMMAND_DEADLINE_S):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise ControlLost(f"QEMU refused {command}: {error}", reason="VmmRefused") from error
        except (QMPError, OSError, TimeoutError) as error:
            raise ControlLost(f"QEMU did not answer {command}: {error or type(error).__name__}") from error

    async def give_descriptor(self, name: str, descriptor: int) -> None:
        """Hands QEMU a copy of an open descriptor under `name`, for commands that take `fd:<name>`."""
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            raise ControlLost(f"QEMU took no descriptor: {error or type(error).__name__}") from error
        await self.execute("getfd", fdname=name)

    async def migration(self, command: str, uri: str, *, deadline_s: float) -> str:
        """Runs migrate or migrate-incoming to its end; the status it ended with, "completed" when all is well.

        Needs the capability `events`. ControlLost also when QEMU ended, as it does on a state that does not fit."""
        with self._client.listener("MIGRATION") as events:
            await self.execute(command, uri=uri)
            try:
                async with asyncio.timeout(deadline_s):
                    async for event in events:
                        status = str(event["data"]["status"])  # type: ignore[index]
                        if status in ("completed", "failed", "cancelled"):
                            return status
            except TimeoutError:
                raise ControlLost(f"{command} did not end within {deadline_s:.0f} s") from None
        raise ControlLost(f"QEMU ended during {command}", reason="VmmExited")

    async def elastic_mib(self) -> int:
        """How much of the virtio-mem region the guest has plugged now, in MiB."""
        return int(await self.execute("qom-get", path="/machine/peripheral/vmem0", property="size")) >> 20

    async def request_elastic_mib(self, size_mib: int) -> None:
        """Asks the guest to plug or unplug up to `size_mib`; it follows in its own time."""
        await self.execute("qom-set", path="/machine/peripheral/vmem0", property="requested-size", value=size_mib << 20)

    async def console_tail(self) -> str:
        """The guest's last console output, at most 64 KiB, control characters taken out."""
        try:
            text = await self.execute("ringbuf-read", device="console0", size=65536, format="utf8")
        except ControlLost:
            return ""
        return "".join(c for c in str(text) if c.isprintable() or c == "\n")

    async def quit(self) -> None:
        """Ends QEMU at once; ignores one that is already gone."""
        try:
            await self.execute("quit")
        except ControlLost:
            pass

    async def close(self) -> None:
        """Lets go of the session. QEMU keeps running and listens again."""
        await _quietly_disconnect(self._client)


async def _until_bound(path: Path, alive: asyncio.Future[str], give_up: float) -> None:
    """Returns when the socket is there, or need not be waited for. A failed connect costs 50 times this look."""
    loop = asyncio.get_running_loop()
    while not _exists(path) and not alive.done() and loop.time() <= give_up:
        await asyncio.wait({alive}, timeout=POLL_S)


def _exists(path: Path) -> bool:
    return path.exists()


async def _quietly_disconnect(client: QMPClient) -> None:
    try:
        async with asyncio.timeout(2.0):
            await client.disconnect()
    except (QMPError, OSError, EOFError, TimeoutError):
        pass


def _future_text(future: asyncio.Future[str]) -> str:
    return "cancelled" if future.cancelled() else str(future.result())
