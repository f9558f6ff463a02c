"""Checkpoints of user-kernel sandboxes: their kernel saves itself, ends, and goes on in another process.

    RUN/<uid>/checkpoint/   checkpoint.img (by `runsc checkpoint`), upper.tar: while one is taken
    RUN/<uid>/restore/      checkpoint.img: while a sandbox goes on from one
    RUN/<uid>/again         the command with which the monitor goes on, its words ending in NUL
    RUN/<uid>/lapsed        by the monitor: how much main had printed when its kernel had ended (src/hold.c)

What is in the workload's pipes stays there; a sandbox that hostd died over goes on when the next one adopts it. What
the kernel cannot carry is refused by name before anything is done: a terminal, and processes that exec started, whose
streams belong to somebody. What differs from a guest's fork: its host name is in the kernel's state, so a fork keeps
its source's in uname and /etc; machine id and, by the host's clock and randomness, time and entropy are its own. A
kernel that fails to save itself has ended: the sandbox fails, and its owner is told why.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from guestagent.messages import MAIN_PROC, StartProcess
from hostd.agentlink import AgentLink
from hostd.drivers.contract import Engine, StartPlan, TakenCheckpoint
from hostd.drivers.oci import checkpointfile
from hostd.drivers.oci.bundle import moved_config
from hostd.drivers.oci.checkpointfile import SavedKernel
from hostd.drivers.oci.engine import LOG_TAIL_CHARS, RUNTIME_ENV, OciEngine
from hostd.drivers.oci.identity import machine_id
from hostd.drivers.oci.runtime import Runtime, last_words
from hostd.drivers.oci.users import open_in_root
from hostd.errors import CannotCheckpoint, CheckpointFailed, CheckpointUnusable, CommandFailed, HostdError
from hostd.journal import Handle
from hostd.process import WatchedProcess
from hostd.removal import remove_folder
from hostd.spec import SandboxClass
from hostd.tasks import to_its_end

SAVE_DEADLINE_S = 180.0
FORGET_DEADLINE_S = 30.0
LAPSE_DEADLINE_S = 30.0
LAPSE_POLL_S = 0.01
REFUSED_S = 3.0
MACHINE_ID_BYTES = 33
TAR = ("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse")


@dataclass(frozen=True)
class Beginning:
    """What a sandbox begins with when it goes on from a checkpoint. `offsets`: what main had printed."""

    offsets: tuple[int, int] = (0, 0)
    fill: Callable[[Path, list[Path]], None] | None = None  # (upper, the cgroup.procs of who writes to it)


class Starting(Protocol):
    """What is needed of the driver (hostd/drivers/oci/driver.py)."""

    runtime: Runtime

    async def launch(self, plan: StartPlan, beginning: Beginning, made: Callable[[Handle], None]) -> Handle: ...
    async def reach(
        self, plan: StartPlan, handle: Handle, stack: AsyncExitStack
    ) -> tuple[AgentLink, WatchedProcess]: ...
    async def adopt(self, plan: StartPlan, handle: Handle, offsets: dict[int, int]) -> Engine | None: ...
    async def destroy(self, uid: str, folder: Path, handle: Handle | None) -> None: ...


class OciCheckpointing:
    """Implements hostd.drivers.contract.Checkpointing for runsc. Stateless."""

    classes = (SandboxClass.USER_KERNEL,)

    def __init__(self, driver: Starting, version: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._driver, self._version, self._clock = driver, version, clock

    # Taking.

    async def checkpoint(
        self, engine: Engine, offsets: Callable[[], dict[int, int]], *, go_on: bool = True
    ) -> TakenCheckpoint:
        """See Checkpointing.checkpoint."""
        if not isinstance(engine, OciEngine):
            raise CannotCheckpoint("only sandboxes of class user-kernel can be checkpointed by runsc")
        config = json.loads((engine.place.folder / "config.json").read_text())
        if engine.place.netns is not None:
            raise CannotCheckpoint("it has a network, whose connections a user-space kernel cannot carry over")
        if config["process"]["terminal"]:
            raise CannotCheckpoint("its main process has a terminal, which a user-space kernel cannot carry over")
        if engine.others():
            raise CannotCheckpoint(
                f"{engine.others()} process(es) started by exec run in it, and a user-space kernel cannot carry their"
                " streams over: end them and try again",
                reason="ExecRunning",
            )
        return await to_its_end(self._take(engine, config, offsets, stay=not go_on))

    async def _take(
        self, engine: OciEngine, config: dict[str, object], offsets: Callable[[], dict[int, int]], *, stay: bool
    ) -> TakenCheckpoint:
        place, begin_s = engine.place, self._clock()
        folder = place.folder / "checkpoint"
        await engine.link.freeze(LAPSE_DEADLINE_S)
        try:
            await asyncio.to_thread(_made_anew, folder)
            problem = await call(place.runtime.checkpoint_argv(place.folder, place.uid, folder), SAVE_DEADLINE_S)
            if problem:
                raise CheckpointFailed(f"its kernel did not save itself, and ended: {problem}")
            printed = await self._lapsed(place.folder, offsets)
            await asyncio.to_thread(_pack, place.folder / "upper" / "upper", folder / "upper.tar")
        except BaseException:
            await self._let_go_on(engine)  # with what was saved, if it was
            raise
        if not stay:
            await self._let_go_on(engine)
        taken = await asyncio.to_thread(checkpointfile.taken_from, folder, keep=stay)  # kept for go_on()
        form = {"runtime": self._version, "platform": place.runtime.platform, "config": config}
        return TakenCheckpoint(taken, form, printed, self._clock() - begin_s)

    async def go_on(self, engine: Engine) -> None:
        """See Checkpointing.go_on."""
        if isinstance(engine, OciEngine):
            await self._let_go_on(engine)

    async def _lapsed(self, folder: Path, offsets: Callable[[], dict[int, int]]) -> dict[int, int]:
        """Waits for the kernel's end, and for all that main had printed to be recorded by this host."""
        try:
            async with asyncio.timeout(LAPSE_DEADLINE_S):
                await _until((folder / "lapsed").exists)
                words = (folder / "lapsed").read_text().split()
                printed = {1: int(words[0]), 2: int(words[1])}
                await _until(lambda: all(offsets()[stream] >= printed[stream] for stream in printed))
        except TimeoutError:
            raise CheckpointFailed(
                f"its kernel saved itself, but what it had printed was not recorded within {LAPSE_DEADLINE_S:.0f} s"
            ) from None
        return printed

    async def _let_go_on(self, engine: OciEngine) -> None:
        place = engine.place
        if (place.folder / "checkpoint" / "checkpoint.img").exists():
            argv = place.runtime.restore_argv(place.folder, place.uid, MAIN_PROC, place.folder / "checkpoint")
            (place.folder / "again").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in argv))
        else:
            with contextlib.suppress(TimeoutError):  # whether it is going to end, it shows soon
                async with asyncio.timeout(REFUSED_S):
                    await _until((place.folder / "lapsed").exists)
        await go_on(engine)

    def recognises(self, path: Path) -> bool:
        """See Checkpointing.recognises."""
        return checkpointfile.recognises(path)

    def read_about(self, path: Path) -> bytes:
        """See Checkpointing.read_about."""
        return checkpointfile.read_about(path)

    def load(self, path: Path) -> SavedKernel:
        """See Checkpointing.load."""
        return checkpointfile.load(path)

    def load_of(self, path: Path, pid: int) -> SavedKernel:
        """See Checkpointing.load_of. Restored kernels share no memory, so it is the file's."""
        return checkpointfile.load(path)

    # Restoring.

    async def restore(
        self,
        plan: StartPlan,
        memory: SavedKernel,
        form: Mapping[str, object],
        offsets: Mapping[int, int],
        made: Callable[[Handle], None],
    ) -> Engine:
        """See Checkpointing.restore."""
        runtime, begin_s = self._driver.runtime, self._clock()
        if (form.get("runtime"), form.get("platform")) != (self._version, runtime.platform):
            raise CheckpointUnusable(
                f"the checkpoint is of runsc {form.get('runtime')!r} on {form.get('platform')}, and this host has"
                f" {self._version!r} on {runtime.platform}; make it anew"
            )

        def fill(upper: Path, procs: list[Path]) -> None:
            _unpack(memory, upper, procs)
            own_machine_id(upper, plan.spec.uid)

        beginning = Beginning((offsets.get(1, 0), offsets.get(2, 0)), fill)
        handle = await self._driver.launch(plan, beginning, made)
        try:
            vmm_s = self._clock()
            await asyncio.to_thread(self._write_bundle, plan, memory, form)
            await self._start(plan, handle)
            restored_s = self._clock()
            engine = await self._driver.adopt(plan, handle, dict(offsets))
            if engine is None:
                raise CheckpointUnusable("what was restored ended at once")
        except BaseException:
            await to_its_end(self._driver.destroy(plan.spec.uid, plan.folder, handle))
            raise
        engine.origin = f"restored from checkpoint {plan.spec.checkpoint[:12]}".rstrip()
        engine.start_phases = (
            ("vmm", vmm_s - begin_s), ("restore", restored_s - vmm_s), ("renew", self._clock() - restored_s)
        )  # fmt: skip
        return engine

    def _write_bundle(self, plan: StartPlan, memory: SavedKernel, form: Mapping[str, object]) -> None:
        config = moved_config(cast(Mapping[str, Any], form["config"]), plan.folder / "rootfs")
        (plan.folder / "config.json").write_text(json.dumps(config))
        (plan.folder / "restore").mkdir(mode=0o700)
        memory.image.copy_to(plan.folder / "restore" / "checkpoint.img")

    async def _start(self, plan: StartPlan, handle: Handle) -> None:
        """Has the monitor start the runtime. The link that goes on comes afterwards, with what main had printed."""
        argv = self._driver.runtime.restore_argv(plan.folder, plan.spec.uid, MAIN_PROC, plan.folder / "restore")
        start = StartProcess(
            proc=MAIN_PROC, argv=tuple(map(os.fsencode, argv)), env=RUNTIME_ENV, cwd=b"/", tty=False, rows=24, cols=80,
            stdin=plan.spec.process.stdin,
        )  # fmt: skip
        async with AsyncExitStack() as stack:
            link, _ = await self._driver.reach(plan, handle, stack)
            try:
                await link.spawn(start)
            except CommandFailed as error:
                log = (plan.folder / "runtime.log").read_text(errors="replace")[-LOG_TAIL_CHARS:]
                raise CheckpointUnusable(f"runsc does not go on from it: {last_words(log) or error}") from error
        await asyncio.to_thread(remove_folder, plan.folder / "restore")


async def go_on(engine: OciEngine) -> None:
    """Lets a held sandbox go on, in another kernel when its own has ended. Also after a hostd that died meanwhile.
    CheckpointFailed when it does not; then it has ended."""
    place = engine.place
    again = place.folder / "again"
    try:
        if again.exists():
            await call(place.runtime.delete_argv(place.folder, place.uid), FORGET_DEADLINE_S)
        await engine.link.thaw()
    except HostdError as error:
        engine.kernel_ended(f"it did not go on after a checkpoint: {error}")
        raise CheckpointFailed(f"the sandbox did not go on, and has ended: {error}") from error
    finally:
        again.unlink(missing_ok=True)
        (place.folder / "lapsed").unlink(missing_ok=True)


async def _until(condition: Callable[[], bool]) -> None:
    """Bound it with a timeout."""
    while True:
        if condition():
            return
        await asyncio.sleep(LAPSE_POLL_S)


async def call(argv: list[str], deadline_s: float) -> str:
    """Runs a runtime's command. "" when it worked, else its last words."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(deadline_s):
            _, said = await process.communicate()
    except TimeoutError:
        return f"{argv[0]} did not end within {deadline_s:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    words = said.decode(errors="replace").strip()[-400:]
    return "" if process.returncode == 0 else words or f"status {process.returncode}"


def _made_anew(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        remove_folder(folder)
    folder.mkdir(mode=0o700)


def _pack(upper: Path, archive: Path) -> None:
    done = subprocess.run([*TAR, "-C", str(upper), "-cf", str(archive), "."], capture_output=True, text=True)
    if done.returncode:
        raise CheckpointFailed(f"what it wrote cannot be packed: {done.stderr.strip()[-400:]}")


def _unpack(memory: SavedKernel, upper: Path, procs: list[Path]) -> None:
    """What was written counts as the sandbox's own memory, so who writes it is in its cgroup."""
    join = "".join(f'echo $$ > "{path}"; ' for path in procs)
    archive = upper.parent / "upper.tar"
    memory.upper.copy_to(archive)
    argv = ["/bin/sh", "-ec", f'{join}exec "$@"', "sh", *TAR, "-p", "-C", str(upper), "-xf", str(archive)]
    done = subprocess.run(argv, capture_output=True, text=True)
    archive.unlink()
    if done.returncode:
        raise CheckpointUnusable(f"what it had written cannot be unpacked: {done.stderr.strip()[-400:]}")


def own_machine_id(upper: Path, uid: str) -> None:
    """Writes the sandbox's own machine id over its source's, with its time: the kernel looks whether a file that it
    knows has changed, by size and time. An image without a usable /etc has none."""
    root = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = open_in_root(root, "etc/machine-id", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    finally:
        os.close(root)
    with os.fdopen(descriptor, "r+b") as file:
        info = os.fstat(file.fileno())
        if stat.S_ISREG(info.st_mode) and info.st_size == MACHINE_ID_BYTES:
            file.write(f"{machine_id(uid)}\n".encode())
            file.flush()
            os.utime(file.fileno(), ns=(info.st_atime_ns, info.st_mtime_ns))
