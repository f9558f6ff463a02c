"""Checkpoints of a host's sandboxes, on the fake driver: made, kept over a restart, restored, refused, removed."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.api.v1 import sandboxes_pb2
from hostd import streams
from hostd.checkpoint import CheckpointAbout, Wanted
from hostd.checkpoints import LINGER_S, PIN_PREFIX, StoredCheckpoint
from hostd.errors import (
    CannotCheckpoint,
    CheckpointFailed,
    CheckpointUnusable,
    HostdError,
    InvalidSpec,
    NotRunning,
    StartFailed,
)
from hostd.lifecycle import ENDED, Phase
from hostd.sandbox import Sandbox
from hostd.spec import DesiredState, ProcessSpec, Resources, SandboxClass
from sharedcache.objects import ObjectKind
from tests.hostd.hostkit import DEADLINE_S, MODEST, Host, until


async def reach(sandbox: Sandbox, *phases: Phase) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await sandbox.wait_for(lambda record: record.phase in phases)


async def running(host: Host, uid: str = "one", *argv: str, **changes: object) -> Sandbox:
    sandbox = host.assign(uid, *(argv or ("deaf",)), **changes)
    await reach(sandbox, Phase.RUNNING, *ENDED)
    assert sandbox.record.phase is Phase.RUNNING, sandbox.record.message
    if not changes:
        await until(lambda: sandbox.log.offsets[1] > 0)
    return sandbox


async def made(host: Host, key: str = "c-1", name: str = "first") -> StoredCheckpoint:
    return await (await running(host)).checkpoint(Wanted(key, name))


def kinds(host: Host) -> list[ObjectKind]:
    return sorted({stored.kind for stored in host.store.objects()})


def open_now(host: Host) -> int:
    assert host.fake.checkpointing is not None
    return len(host.fake.checkpointing.open_now)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.fixture(autouse=True)
async def nothing_stays_open(host: Host) -> AsyncIterator[None]:
    yield
    if host._task is not None:
        await host.down()
    assert open_now(host) == 0
    host._task = asyncio.create_task(asyncio.sleep(0))


async def test_a_checkpoint_is_kept_pinned_and_told(host: Host) -> None:
    stored = await made(host)
    about = stored.about
    assert (about.name, about.spec.uid, about.command.argv) == ("first", "one", ("deaf",))
    assert about.offsets == host.sandboxes.find("one").log.offsets
    assert CheckpointAbout.decode(about.encode(), "x") == about
    assert ObjectKind.CHECKPOINT in kinds(host)
    layer = host.store.images()[0].layers[0]
    assert host.store.pins()[f"{PIN_PREFIX}c-1"] == {stored.stored.key, layer.key}
    assert str(stored.stored.domain) == "tenant/acme"
    assert host.reasons()[-1] == "Checkpointed"
    assert host.sandboxes.find("one").record.phase is Phase.RUNNING


async def test_it_is_made_once_however_often_it_is_asked_for(host: Host) -> None:
    sandbox = await running(host)
    first, again = await asyncio.gather(
        sandbox.checkpoint(Wanted("c-1", "first")), sandbox.checkpoint(Wanted("c-1", "first"))
    )
    assert first is again
    with pytest.raises(InvalidSpec, match="first already"):
        await sandbox.checkpoint(Wanted("c-2", "first"))
    await sandbox.checkpoint(Wanted("c-2", "second"))
    assert [each.about.name for each in host.sandboxes.checkpoints.all()] == ["first", "second"]


async def test_a_restored_sandbox_goes_on_in_a_log_of_its_own(host: Host) -> None:
    about = (await made(host)).about
    fork = await running(host, "two", checkpoint="c-1")
    await until(lambda: fork.log.offsets[1] > about.offsets[1])
    assert [(entry.offset, entry.data) for entry in fork.log.kept()] == [(about.offsets[1], b"ready\n")]
    assert fork.record.origin == "restored from checkpoint c-1"
    assert fork.spec.process.argv == ("deaf",) and fork.record.command == about.command
    assert host.sandboxes.find("one").record.phase is Phase.RUNNING
    assert open_now(host) == 1
    await running(host, "three", checkpoint="c-1")
    assert open_now(host) == 1  # one memory for both


async def test_memory_is_closed_when_nobody_has_used_it_for_a_while(host: Host) -> None:
    await made(host)
    now_s = [1000.0]
    checkpoints = host.sandboxes.checkpoints
    checkpoints._now_s = lambda: now_s[0]
    fork = await running(host, "two", checkpoint="c-1")
    now_s[0] += 10 * LINGER_S
    checkpoints.tend()
    assert open_now(host) == 1
    host.want(fork, DesiredState.REMOVED)
    await until(lambda: not host.sandboxes.knows("two"))
    checkpoints.tend()
    assert open_now(host) == 1
    now_s[0] += LINGER_S
    checkpoints.tend()
    assert open_now(host) == 0
    await running(host, "three", checkpoint="c-1")  # loaded again
    assert open_now(host) == 1


async def test_a_removed_one_is_gone_at_once_and_its_forks_live_on(host: Host) -> None:
    await made(host)
    fork = await running(host, "two", checkpoint="c-1")
    await host.sandboxes.checkpoints.remove("c-1")
    await host.sandboxes.checkpoints.remove("c-1")
    assert ObjectKind.CHECKPOINT not in kinds(host)
    assert f"{PIN_PREFIX}c-1" not in host.store.pins()
    assert fork.record.phase is Phase.RUNNING
    late = host.assign("three", checkpoint="c-1")
    await reach(late, *ENDED)
    assert (late.record.phase, late.record.reason) == (Phase.FAILED, "CheckpointMissing")


async def test_the_image_may_go_before_its_checkpoint(host: Host) -> None:
    await made(host)
    host.store.forget_image(host.store.images()[0].domain, host.image)
    await running(host, "two", checkpoint="c-1")


async def test_a_restart_finds_checkpoints_and_what_was_restored(host: Host) -> None:
    await made(host)
    await running(host, "two", checkpoint="c-1")
    await host.restart()
    assert [each.about.id for each in host.sandboxes.checkpoints.all()] == ["c-1"]
    fork = host.sandboxes.find("two")
    await until(lambda: fork.live is not None)
    assert open_now(host) == 1  # taken over from the running one
    await running(host, "three", checkpoint="c-1")
    assert open_now(host) == 1


async def test_of_a_crash_before_the_pin_nothing_is_left(host: Host) -> None:
    await made(host)
    host.store.unpin(f"{PIN_PREFIX}c-1")
    await host.restart()
    assert host.sandboxes.checkpoints.all() == []
    assert ObjectKind.CHECKPOINT not in kinds(host)


async def test_of_a_crash_while_restoring_nothing_is_left(host: Host) -> None:
    """Its engine may run, but as whom is not known: it is ended, not adopted."""
    await made(host)
    host.fake.faults.boot_s = 60.0
    fork = host.assign("two", checkpoint="c-1")
    await until(lambda: fork.record.handle is not None)
    record = fork.record
    await host.down()
    host.sandboxes.journal.write(record)
    host.fake.faults.boot_s = 0.0
    await host.up()
    fork = host.sandboxes.find("two")
    await reach(fork, *ENDED)
    assert (fork.record.phase, fork.record.reason) == (Phase.FAILED, "StartInterrupted")
    assert "two" not in host.fake.machines


async def test_a_damaged_blob_is_refused(host: Host) -> None:
    stored = await made(host)
    host.sandboxes.checkpoints._close("c-1")
    await asyncio.to_thread(damage, stored.stored.path)
    fork = host.assign("two", checkpoint="c-1")
    await reach(fork, *ENDED)
    assert (fork.record.phase, fork.record.reason) == (Phase.FAILED, "CheckpointDamaged")
    assert "corrupt" in fork.record.message


@pytest.mark.parametrize("error", [CheckpointUnusable("other QEMU"), StartFailed("no", reason="VmmExited")])
async def test_a_restore_that_fails_says_why_and_leaves_nothing(host: Host, error: HostdError) -> None:
    await made(host)
    host.fake.faults.restore = error
    fork = host.assign("two", checkpoint="c-1")
    await reach(fork, *ENDED)
    assert (fork.record.phase, fork.record.reason) == (Phase.FAILED, error.reason)
    assert list(host.fake.machines) == ["one"]
    assert host.sandboxes.checkpoints._open["c-1"].users == set()


async def test_a_checkpoint_that_fails_leaves_nothing_and_the_sandbox_running(host: Host) -> None:
    sandbox = await running(host)
    host.fake.faults.checkpoint = CheckpointFailed("no")
    with pytest.raises(CheckpointFailed):
        await sandbox.checkpoint(Wanted("c-1", "first"))
    host.fake.faults.checkpoint = None
    host.store._min_free_bytes = 1 << 60  # the disk is full
    with pytest.raises(Exception, match="must stay free"):
        await sandbox.checkpoint(Wanted("c-1", "first"))
    assert ObjectKind.CHECKPOINT not in kinds(host)
    assert sandbox.record.phase is Phase.RUNNING


async def test_a_forks_checkpoint_goes_by_itself_once_its_forks_run(host: Host) -> None:
    sandbox, checkpoints, now_s = await running(host), host.sandboxes.checkpoints, [1000.0]
    checkpoints._now_s = lambda: now_s[0]
    await sandbox.checkpoint(Wanted("c-1", "fork", ephemeral=True))
    await sandbox.checkpoint(Wanted("c-2", "kept"))
    host.fake.faults.boot_s = 0.2
    fork = host.assign("two", checkpoint="c-1")
    now_s[0] += LINGER_S
    await checkpoints.drop_ephemeral()
    assert len(checkpoints.all()) == 2  # somebody is about to start from it
    await reach(fork, Phase.RUNNING)
    await checkpoints.drop_ephemeral()
    assert [each.about.name for each in checkpoints.all()] == ["kept"]
    assert fork.record.phase is Phase.RUNNING


async def test_one_that_could_not_be_removed_stays_known_and_goes_next_time(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its blob would be nobody's until hostd is restarted; and hostd's own task for that would end."""
    sandbox, checkpoints = await running(host), host.sandboxes.checkpoints
    await sandbox.checkpoint(Wanted("c-1", "fork", ephemeral=True))
    checkpoints._now_s = lambda: 1e12
    monkeypatch.setattr("hostd.checkpoints.TEND_S", 0.001)
    tries, remove = 0, host.store.remove

    def fails_twice(key: str) -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.EIO, "input/output error")
        return remove(key)

    monkeypatch.setattr(host.store, "remove", fails_twice)
    with pytest.raises(OSError):
        await checkpoints.remove("c-1")
    assert [each.about.id for each in checkpoints.all()] == ["c-1"]
    tending = asyncio.create_task(checkpoints.run())
    await until(lambda: checkpoints.all() == [])
    assert tries == 3 and ObjectKind.CHECKPOINT not in kinds(host)
    tending.cancel()


async def test_removing_one_waits_for_who_is_being_restored_from_it(host: Host) -> None:
    await made(host)
    checkpoints = host.sandboxes.checkpoints
    async with checkpoints.memory("c-1", "two"):
        await checkpoints.remove("c-1")
        assert open_now(host) == 1
    assert open_now(host) == 0


async def test_a_client_that_gives_up_late_leaves_a_whole_checkpoint(host: Host) -> None:
    sandbox = await running(host)
    taking = asyncio.create_task(sandbox.checkpoint(Wanted("c-1", "first")))
    await until(lambda: open_now(host) == 1)
    taking.cancel()
    await asyncio.wait({taking})
    assert taking.cancelled()
    assert [each.about.id for each in host.sandboxes.checkpoints.all()] == ["c-1"]
    await running(host, "two", checkpoint="c-1")


# What is refused.


async def test_only_a_running_sandbox_has_one(host: Host) -> None:
    sandbox = host.assign("one", "true")
    await reach(sandbox, *ENDED)
    with pytest.raises(NotRunning, match="one is exited"):
        await sandbox.checkpoint(Wanted("c-1", "first"))


async def test_a_class_without_checkpoints_is_refused_with_those_that_have_them(host: Host) -> None:
    sandbox = await running(host, "one", "deaf", sandbox_class=SandboxClass.USER_KERNEL)
    with pytest.raises(InvalidSpec, match="user-kernel has no checkpoints; classes that have it: guest-kernel"):
        await sandbox.checkpoint(Wanted("c-1", "first"))
    host.fake.checkpointing, kept = None, host.fake.checkpointing
    with pytest.raises(InvalidSpec, match="none on this host"):
        await (await running(host, "two")).checkpoint(Wanted("c-1", "first"))
    host.fake.checkpointing = kept


@pytest.mark.parametrize(
    ("process", "words"),
    [
        (sandboxes_pb2.Process(argv=["cat"], tty=True), "exec of cat on a terminal"),
        (sandboxes_pb2.Process(argv=["cat"], stdin=True), "exec of cat with standard input"),
        (None, "attach with standard input"),
    ],
)
async def test_a_session_that_is_typed_into_is_refused_by_name(
    host: Host, process: sandboxes_pb2.Process | None, words: str
) -> None:
    sandbox = await running(host, "one", "deaf", process=ProcessSpec(argv=("deaf",), stdin=True))
    hung_up = asyncio.Event()

    async def inputs() -> streams.Inputs:
        await hung_up.wait()
        yield sandboxes_pb2.StreamInput(stdin_eof=True)

    if process is None:
        session = streams.attach(sandbox, sandboxes_pb2.StreamStart(stdin=True), inputs())
    else:
        session = streams.execute(sandbox, sandboxes_pb2.StreamStart(exec=process), inputs(), lambda: 1)
    assert (await anext(session)).started
    with pytest.raises(CannotCheckpoint, match=words):
        await sandbox.checkpoint(Wanted("c-1", "first"))
    await session.aclose()  # type: ignore[attr-defined]
    await sandbox.checkpoint(Wanted("c-1", "first"))


async def test_a_session_that_only_listens_is_carried_over(host: Host) -> None:
    sandbox = await running(host)
    process = sandboxes_pb2.Process(argv=["deaf"])

    async def inputs() -> streams.Inputs:
        yield sandboxes_pb2.StreamInput(stdin_eof=True)

    session = streams.execute(sandbox, sandboxes_pb2.StreamStart(exec=process), inputs(), lambda: 1)
    await anext(session)
    await sandbox.checkpoint(Wanted("c-1", "first"))
    await session.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resources": replace(MODEST, memory_max_mib=2048)}, "ceiling of 1024 MiB"),
        ({"resources": Resources(256, 1024, 256, 2000)}, "1024 MiB and 1 vCPU"),
        ({"tenant": "other"}, "another tenant's"),
        ({"sandbox_class": SandboxClass.USER_KERNEL}, "another tenant's or class's"),
    ],
)
async def test_what_a_copy_cannot_be_is_refused(host: Host, changes: dict[str, object], words: str) -> None:
    await made(host)
    fork = host.assign("two", checkpoint="c-1", **changes)
    await reach(fork, *ENDED)
    assert (fork.record.phase, fork.record.reason) == (Phase.FAILED, "InvalidSpec")
    assert words in fork.record.message


@pytest.mark.parametrize("name", ["", "-a", "A", "a" * 64, "a/b"])
async def test_a_bad_name_is_refused(host: Host, name: str) -> None:
    sandbox = await running(host)
    with pytest.raises(InvalidSpec, match="name"):
        await sandbox.checkpoint(Wanted("c-1", name))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"schema": 2}', b'{"schema": 1, "record": 3}'])
def test_what_does_not_say_what_it_is_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointUnusable, match="blob-1: does not say"):
        CheckpointAbout.decode(data, "blob-1")
