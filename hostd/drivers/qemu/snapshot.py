"""A stopped guest's device state out of one QEMU and into another. Guest RAM stays where it is: in shared files.

`x-ignore-shared` leaves out RAM that is mapped share=on; what remains is devices, about 0.3 MB. (There is no
`-global` for that capability in QEMU 7.2, so both ends set it by QMP.)
"""

from __future__ import annotations

import asyncio
import os

from hostd.drivers.qemu.control import Control
from hostd.errors import ControlLost, StartFailed

STATE_DEADLINE_S = 60.0
_FD_NAME = "sandloom-state"
_UNBOUNDED = 1 << 40
"""Bytes a second: QEMU's own 128 MiB/s are for networks, this goes to memory while the guest stands still."""


async def _prepare(control: Control) -> None:
    wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
    await control.execute("migrate-set-capabilities", capabilities=wanted)


async def save_state(control: Control, *, deadline_s: float = STATE_DEADLINE_S) -> bytes:
    """Stops the guest and returns its device state. It stays stopped. StartFailed when QEMU cannot."""
    descriptor = os.memfd_create("sandloom-state", os.MFD_CLOEXEC)
    try:
        await control.execute("stop")
        await save_stream(control, descriptor, deadline_s=deadline_s)
        return await asyncio.to_thread(os.pread, descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


async def save_stream(control: Control, descriptor: int, *, deadline_s: float = STATE_DEADLINE_S) -> None:
    """Writes a stopped guest's state, and what of its RAM is mapped privately, to `descriptor`. StartFailed.

    QEMU may not open or exec anything (its seccomp filter, its uid), so it is handed the descriptor."""
    await _prepare(control)
    await control.execute("migrate-set-parameters", **{"max-bandwidth": _UNBOUNDED})
    await control.give_descriptor(_FD_NAME, descriptor)
    status = await control.migration("migrate", f"fd:{_FD_NAME}", deadline_s=deadline_s)
    if status != "completed":
        info = await control.execute("query-migrate")
        raise StartFailed(f"the guest's state could not be saved: {info.get('error-desc', status)}")


async def load_state(
    control: Control, inherited_fd: int, *, gone: asyncio.Future[str], deadline_s: float = STATE_DEADLINE_S
) -> None:
    """Lets a QEMU that waits with `-incoming defer` take the state in a descriptor it inherited. Afterwards the
    guest is stopped, as it was when it was saved. StartFailed when the state does not fit: QEMU ends then (`gone`)."""
    loading = asyncio.create_task(_load(control, inherited_fd, deadline_s))
    try:
        await asyncio.wait({loading, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            raise StartFailed(f"QEMU refused the saved state: {gone.result()}", reason="TemplateUnusable")
        status = loading.result()
    except ControlLost as error:
        raise StartFailed(f"the saved state could not be loaded: {error}", reason="TemplateUnusable") from error
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    if status != "completed":
        raise StartFailed(f"the saved state could not be loaded: it {status}", reason="TemplateUnusable")


async def _load(control: Control, inherited_fd: int, deadline_s: float) -> str:
    await _prepare(control)
    return await control.migration("migrate-incoming", f"fd:{inherited_fd}", deadline_s=deadline_s)
