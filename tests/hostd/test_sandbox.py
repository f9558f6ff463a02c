"""One sandbox's walk through its life, on the fake driver: every end, every race, every restart."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest

from hostd.drivers.contract import Loss
from hostd.errors import ControlLost, HostdError, NotRunning, ShortOfResources, StartFailed
from hostd.journal import Journal, Outcome, Record
from hostd.lifecycle import ENDED, Phase
from hostd.resize import ResizeProgress, ResizeState
from hostd.sandbox import Sandbox
from hostd.spec import DesiredState, ProcessSpec, Resources
from tests.hostd.hostkit import DEADLINE_S, Host, until


async def reach(sandbox: Sandbox, *phases: Phase) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await sandbox.wait_for(lambda record: record.phase in phases)


async def gone(host: Host, uid: str = "one") -> None:
    await until(lambda: not host.sandboxes.knows(uid))
    assert not host.sandboxes.journal.folder(uid).exists()
    assert not [owner for owner in host.store.pins() if uid in owner]
    assert uid not in host.fake.machines


def logged(sandbox: Sandbox, stream: int = 1) -> bytes:
    return b"".join(entry.data for entry in sandbox.log.kept() if entry.stream == stream)


async def test_a_command_runs_to_its_end(host: Host) -> None:
    sandbox = host.assign("one", "say", "out", "err", "7")
    await reach(sandbox, *ENDED)
    record = sandbox.record
    assert (record.phase, record.reason, record.exit_code) == (Phase.EXITED, "Completed", 7)
    assert (logged(sandbox), logged(sandbox, 2)) == (b"out", b"err")
    assert [name for name, _ in record.start_phases] == ["vmm", "kernel", "agent", "workload"]
    assert record.handle is None and host.fake.machines == {}
    phases = [report.record.phase for report in host.reports]
    assert [phase for n, phase in enumerate(phases) if phases.index(phase) == n] == [
        Phase.STARTING, Phase.RUNNING, Phase.EXITED,
    ]  # fmt: skip
    assert host.reasons() == ["Started", "Completed"]
    host.want(sandbox, DesiredState.REMOVED)
    await gone(host)
    assert host.reports[-1].removed


@pytest.mark.parametrize(("argv", "code"), [(("no-such",), 127), (("/etc/passwd",), 126)])
async def test_a_command_that_cannot_be_run(host: Host, argv: tuple[str, ...], code: int) -> None:
    sandbox = host.assign("one", *argv)
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.exit_code) == (Phase.EXITED, code)
    assert argv[0] in sandbox.record.message
    assert host.fake.machines == {}


async def test_a_missing_image_fails_with_its_reason(host: Host) -> None:
    sandbox = host.assign("one", image_digest="sha256:" + "e" * 64)
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.FAILED, "ImageMissing")


async def test_an_assignment_that_comes_while_its_record_is_removed_brings_nothing_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = host.assign("one", image_digest="sha256:" + "e" * 64)
    await reach(sandbox, *ENDED)
    loop, unlink = asyncio.get_running_loop(), Path.unlink

    def unlink_and_hear(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.name == "record.json":  # the thread that removes stands between the record and its folder

            async def hear() -> None:
                host.want(sandbox, DesiredState.REMOVED, stop_grace_s=1.0)

            asyncio.run_coroutine_threadsafe(hear(), loop).result(DEADLINE_S)

    monkeypatch.setattr(Path, "unlink", unlink_and_hear)
    host.want(sandbox, DesiredState.REMOVED)
    await gone(host)
    assert host.reports[-1].removed and "Abandoned" not in host.reasons()


async def test_a_failed_start_leaves_nothing(host: Host) -> None:
    host.fake.faults.start = StartFailed("no kernel", reason="BootTimeout")
    sandbox = host.assign()
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.FAILED, "BootTimeout")
    assert host.fake.machines == {}
    host.fake.faults.start = None
    await reach(host.assign("two"), Phase.RUNNING)  # the host itself is fine


async def test_a_bug_in_a_driver_fails_that_sandbox_only(host: Host) -> None:
    other = host.assign("other")
    await reach(other, Phase.RUNNING)
    host.fake.faults.start = ZeroDivisionError("a bug")  # type: ignore[assignment]
    sandbox = host.assign()
    await reach(sandbox, *ENDED)
    assert sandbox.record.reason == "InternalError"
    assert other.record.phase is Phase.RUNNING
    host.want(sandbox, DesiredState.REMOVED)
    await gone(host)


async def test_short_of_memory_is_told_with_numbers(host: Host) -> None:
    sandbox = host.assign(resources=Resources(900_000, 900_000, 900_000, 1000))
    await reach(sandbox, *ENDED)
    assert sandbox.record.reason == "ShortOfMemory"
    assert "900064 MiB needed" in sandbox.record.message


async def test_stop_asks_then_takes_the_exit_code(host: Host) -> None:
    sandbox = host.assign("one", "polite", "3")
    await until(lambda: logged(sandbox) == b"ready\n")
    host.want(sandbox, DesiredState.STOPPED)
    await reach(sandbox, *ENDED)
    assert (sandbox.record.reason, sandbox.record.exit_code) == ("Stopped", 3)
    assert logged(sandbox) == b"ready\nbye\n"


async def test_stop_kills_what_does_not_listen(host: Host) -> None:
    sandbox = host.assign("one", "deaf")
    await until(lambda: logged(sandbox) == b"ready\n")
    host.want(sandbox, DesiredState.STOPPED, stop_grace_s=0.05)
    await reach(sandbox, *ENDED)
    assert (sandbox.record.reason, sandbox.record.exit_code) == ("Stopped", 137)


async def test_removal_does_not_wait_for_a_long_grace(host: Host) -> None:
    sandbox = host.assign("one", "deaf")
    await until(lambda: logged(sandbox) == b"ready\n")
    host.want(sandbox, DesiredState.STOPPED, stop_grace_s=1000.0)
    await reach(sandbox, Phase.STOPPING)
    host.want(sandbox, DesiredState.REMOVED)
    await gone(host)


@pytest.mark.parametrize("desired", [DesiredState.STOPPED, DesiredState.REMOVED])
async def test_unwanted_while_starting(host: Host, desired: DesiredState) -> None:
    host.fake.faults.boot_s = 1000.0
    sandbox = host.assign()
    await until(lambda: sandbox.record.handle is not None)
    host.want(sandbox, desired)
    await reach(sandbox, *ENDED, Phase.GONE)
    assert host.fake.machines == {}
    if desired is DesiredState.REMOVED:
        await gone(host)
    else:
        assert (sandbox.record.phase, sandbox.record.reason) == (Phase.EXITED, "Stopped")


async def test_unwanted_in_every_turn_of_a_start(host: Host) -> None:
    """Whenever it comes, nothing is left and the sandbox ends."""
    for turns in range(40):
        uid = f"box-{turns}"
        sandbox = host.assign(uid)
        for _ in range(turns):
            await asyncio.sleep(0)
        host.want(sandbox, DesiredState.REMOVED)
        await gone(host, uid)


async def test_unwanted_before_it_began(host: Host) -> None:
    sandbox = host.assign(desired=DesiredState.STOPPED)
    await reach(sandbox, *ENDED)
    assert (sandbox.record.reason, sandbox.record.exit_code) == ("Stopped", 137)
    assert host.fake.starts == 0


@pytest.mark.parametrize("befalls", ["crash", "lose_agent"])
async def test_a_broken_engine_ends_its_sandbox_and_no_other(host: Host, befalls: str) -> None:
    other, sandbox = host.assign("other"), host.assign()
    await reach(sandbox, Phase.RUNNING)
    await reach(other, Phase.RUNNING)
    getattr(host.fake, befalls)("one")
    await reach(sandbox, *ENDED)
    wanted = "VmmExited" if befalls == "crash" else "AgentLost"
    assert (sandbox.record.phase, sandbox.record.reason, sandbox.record.exit_code) == (Phase.FAILED, wanted, None)
    assert sandbox.record.message
    assert other.record.phase is Phase.RUNNING
    with pytest.raises(NotRunning, match="failed"):
        sandbox.running()


async def test_an_older_epoch_is_not_obeyed(host: Host) -> None:
    sandbox = host.assign(epoch=5)
    await reach(sandbox, Phase.RUNNING)
    host.want(sandbox, DesiredState.REMOVED, epoch=4)
    assert sandbox.spec.desired is DesiredState.RUNNING
    host.want(sandbox, DesiredState.STOPPED)
    await reach(sandbox, *ENDED)
    assert sandbox.spec.epoch == 5


async def test_a_later_epoch_begins_anew_once_nothing_of_the_older_one_is_left(host: Host) -> None:
    sandbox = host.assign(epoch=5)
    await reach(sandbox, Phase.RUNNING)
    old = host.fake.machines["one"]
    host.sandboxes.assign(replace(sandbox.spec, epoch=7))
    assert sandbox.spec.epoch == 5 and sandbox.spec.desired is DesiredState.REMOVED
    await until(lambda: host.sandboxes.find("one").spec.epoch == 7)
    assert sandbox.record.phase is Phase.GONE
    again = host.sandboxes.find("one")
    await reach(again, Phase.RUNNING)
    assert host.fake.machines["one"] is not old
    assert not [report for report in host.reports if report.removed], "it was never gone from here"
    host.sandboxes.unassign("one", 6)  # a late answer about the older epoch
    assert again.spec.desired is DesiredState.RUNNING
    host.sandboxes.unassign("one", 7)
    await reach(again, Phase.GONE)
    assert [report.record.spec.epoch for report in host.reports if report.removed] == [7]


async def test_a_later_epoch_that_is_wanted_no_more_never_begins(host: Host) -> None:
    sandbox = host.assign(epoch=5)
    await reach(sandbox, Phase.RUNNING)
    host.sandboxes.assign(replace(sandbox.spec, epoch=7))
    host.sandboxes.unassign("one")
    await reach(sandbox, Phase.GONE)
    assert not host.sandboxes.knows("one")


async def test_a_running_sandbox_keeps_the_process_it_was_started_with(host: Host) -> None:
    sandbox = host.assign("one", "sleep")
    await reach(sandbox, Phase.RUNNING)
    host.sandboxes.assign(host.spec("one", process=ProcessSpec(argv=("other",)), image_digest="sha256:" + "9" * 64))
    assert sandbox.spec.process.argv == ("sleep",)
    assert sandbox.spec.image_digest == host.image


# Restarts of hostd.


async def test_a_restart_takes_over_and_loses_no_output(host: Host) -> None:
    sandbox = host.assign("one", process=ProcessSpec(argv=("cat",), stdin=True))
    await reach(sandbox, Phase.RUNNING)
    await sandbox.running().main.write(b"before ")
    await until(lambda: logged(sandbox) == b"before ")
    machine = host.fake.machines["one"]
    await host.down()
    machine.processes[1].terminal.give(b"while away ")
    await host.up()
    again = host.sandboxes.find("one")
    assert again is not sandbox
    await until(lambda: again.live is not None)
    await again.running().main.write(b"after")
    await until(lambda: logged(again) == b"before while away after")
    assert again.record.phase is Phase.RUNNING
    assert again.record.adoptions == 1
    assert host.fake.machines["one"] is machine
    assert "Adopted" in host.reasons()


async def test_exec_after_a_restart_knows_the_mains_environment(host: Host) -> None:
    sandbox = host.assign("one", process=ProcessSpec(argv=("sleep",), env=(("A", "b"),)))
    await reach(sandbox, Phase.RUNNING)
    command = sandbox.running().command
    host.store.forget_image(host.store.images()[0].domain, host.image)  # it may be gone by then
    await host.restart()
    again = host.sandboxes.find("one")
    await until(lambda: again.live is not None)
    assert again.running().command == command
    assert ("A", "b") in command.env


async def test_an_end_while_hostd_was_away_is_found(host: Host) -> None:
    sandbox = host.assign("one", process=ProcessSpec(argv=("cat",), stdin=True))
    await reach(sandbox, Phase.RUNNING)
    machine = host.fake.machines["one"]
    await host.down()
    machine.processes[1].terminal.give(b"last words", eof=True)
    await until(machine.processes[1].ended.done)
    await host.up()
    again = host.sandboxes.find("one")
    await reach(again, *ENDED)
    assert (again.record.phase, again.record.exit_code) == (Phase.EXITED, 0)
    assert logged(again) == b"last words"


async def test_a_vmm_that_ended_while_hostd_was_away(host: Host) -> None:
    await reach(host.assign(), Phase.RUNNING)
    await host.down()
    host.fake.crash("one")
    await host.up()
    again = host.sandboxes.find("one")
    await reach(again, *ENDED)
    assert (again.record.phase, again.record.reason) == (Phase.FAILED, "VmmExited")
    assert host.fake.machines == {}


async def test_an_agent_that_does_not_answer_the_next_hostd(host: Host) -> None:
    await reach(host.assign(), Phase.RUNNING)
    await host.down()
    host.fake.faults.adopt = ControlLost("no answer")
    await host.up()
    again = host.sandboxes.find("one")
    await reach(again, *ENDED)
    assert again.record.reason == "ControlLost"
    assert host.fake.machines == {}


async def test_a_hostd_that_was_killed_while_starting(host: Host) -> None:
    """kill -9 leaves the record and the machine as they are; a stop in order would have cleaned up."""
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    record = replace(sandbox.record, phase=Phase.STARTING, handle=None, command=None)
    await host.down()
    Journal(host.config.state_dir).write(record)
    await host.up()
    again = host.sandboxes.find("one")
    await reach(again, *ENDED)
    assert again.record.reason == "StartInterrupted"
    assert host.fake.machines == {}  # although its handle was never journaled


async def test_a_hostd_that_was_killed_right_after_the_command_started(host: Host) -> None:
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    record = replace(sandbox.record, phase=Phase.STARTING, started_at_s=None)
    await host.down()
    Journal(host.config.state_dir).write(record)
    await host.up()
    again = host.sandboxes.find("one")
    await until(lambda: again.live is not None)
    assert again.record.phase is Phase.RUNNING


async def test_a_hostd_that_was_killed_while_it_cleaned_up_still_tells_how_it_ended(host: Host) -> None:
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    record = replace(sandbox.record, outcome=Outcome(Phase.EXITED, "Completed", "", 42))
    await host.down()
    Journal(host.config.state_dir).write(record)
    await host.up()
    again = host.sandboxes.find("one")
    await reach(again, *ENDED)
    assert (again.record.phase, again.record.exit_code) == (Phase.EXITED, 42)
    assert host.fake.machines == {}


async def test_ended_sandboxes_are_still_there_after_a_restart(host: Host) -> None:
    sandbox = host.assign("one", "say", "out", "err", "7")
    await reach(sandbox, *ENDED)
    await host.restart()
    again = host.sandboxes.find("one")
    assert (again.record.exit_code, logged(again)) == (7, b"out")
    host.want(again, DesiredState.REMOVED)
    await gone(host)


async def test_what_belongs_to_no_record_is_ended_at_the_next_start(host: Host, tmp_path: Path) -> None:
    await reach(host.assign(), Phase.RUNNING)
    await host.down()
    (tmp_path / "run" / "one").mkdir()
    record = host.config.state_dir / "sandboxes" / "one" / "record.json"
    record.rename(tmp_path / "moved-away.json")
    left = host.config.state_dir / ".import-left"
    left.mkdir()
    await host.up()
    assert host.fake.machines == {}
    assert not left.exists()


# Removal.


async def test_cleaning_up_is_tried_until_it_works(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.ending.CLEAN_UP_RETRY_S", 0.01)
    sandbox = host.assign("one", "polite", "0")
    await until(lambda: logged(sandbox) == b"ready\n")
    host.fake.faults.destroy = HostdError("a process stays in its cgroup")
    host.want(sandbox, DesiredState.STOPPED)
    await until(lambda: "CleanUpStuck" in host.reasons())
    assert sandbox.record.phase is Phase.STOPPING  # not told to have ended while something of it may run
    host.fake.faults.destroy = None
    await reach(sandbox, *ENDED)
    assert sandbox.record.exit_code == 0
    assert host.reasons().count("CleanUpStuck") == 1


async def test_remove_on_exit_waits_for_its_followers(host: Host) -> None:
    sandbox = host.assign("one", "true", remove_on_exit=True)
    sandbox.follow_begins()
    await reach(sandbox, *ENDED)
    for _ in range(20):
        await asyncio.sleep(0)
    assert host.sandboxes.knows("one")
    sandbox.follow_ends()
    await gone(host)


async def test_remove_on_exit_does_not_wait_for_ever(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.ending.LINGER_FIRST_S", 0.01)
    monkeypatch.setattr("hostd.ending.LINGER_LAST_S", 0.02)
    host.assign("one", "true", remove_on_exit=True)
    await gone(host)
    forgotten = host.assign("two", "true", remove_on_exit=True)
    forgotten.follow_begins()  # and never ends
    await gone(host, "two")


# Resize.


async def test_resize_goes_through_its_states(host: Host) -> None:
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    host.fake.faults.follow_s = 0.1
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 768, 500))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.IN_PROGRESS)
    assert sandbox.resize is not None
    assert (sandbox.resize.desired_mib, sandbox.resize.allocated_mib, sandbox.resize.actual_mib) == (768, 768, 256)
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)
    assert (sandbox.resize.actual_mib, sandbox.resize.cpu_milli) == (768, 500)
    assert "ResizeDone" in host.reasons()


async def test_a_guest_that_does_not_follow_is_deferred_and_may_yet(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostd.resize.RESIZE_DEADLINE_S", 0.05)
    monkeypatch.setattr("hostd.resizing.DEFERRED_PAUSE_S", 0.01)
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    host.fake.faults.most_mib = 400
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 768, 1000))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DEFERRED)
    assert sandbox.resize is not None
    assert sandbox.resize.actual_mib == 400
    assert "368 MiB are missing" in sandbox.resize.message
    host.fake.faults.most_mib = None
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)


async def test_above_the_ceiling_is_infeasible_and_the_next_one_is_judged_by_the_start(host: Host) -> None:
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    for wanted in (Resources(256, 4096, 2048, 1000), Resources(256, 4096, 1500, 1000)):
        host.want(sandbox, DesiredState.RUNNING, resources=wanted)
        await until(lambda: sandbox.resize is not None and sandbox.resize.desired_mib == wanted.memory_mib)  # noqa: B023
        assert sandbox.resize is not None
        assert sandbox.resize.state is ResizeState.INFEASIBLE
        assert "1024 MiB" in sandbox.resize.message
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 256, 4001))
    await until(lambda: sandbox.resize is not None and "vCPU" in sandbox.resize.message)
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 512, 1000))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)


async def test_an_engine_that_refuses_a_resize_is_an_error_that_says_why(host: Host) -> None:
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    await until(lambda: sandbox.resize is not None)
    host.fake.faults.control = ControlLost("QEMU did not answer qom-set")
    host.want(sandbox, DesiredState.RUNNING, resources=Resources(256, 1024, 512, 1000))
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.ERROR)
    assert sandbox.resize is not None
    assert "qom-set" in sandbox.resize.message
    assert sandbox.record.phase is Phase.RUNNING


async def test_a_resize_that_a_dead_hostd_had_taken_is_done_by_the_next(host: Host) -> None:
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    wanted = Resources(256, 1024, 768, 1000)
    record = replace(sandbox.record, spec=replace(sandbox.spec, resources=wanted))
    await host.down()
    Journal(host.config.state_dir).write(record)
    await host.up()
    again = host.sandboxes.find("one")
    await until(lambda: again.resize is not None and again.resize.state is ResizeState.DONE)
    assert again.resize is not None
    assert again.resize.actual_mib == 768


# The log.


async def test_a_full_disk_holds_the_output_back_and_loses_none(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.supervision.LOG_RETRY_S", 0.01)
    sandbox = host.assign("one", process=ProcessSpec(argv=("cat",), stdin=True))
    await reach(sandbox, Phase.RUNNING)
    append = sandbox.log.append

    def full(time_ns: int, stream: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sandbox.log, "append", full)
    await sandbox.running().main.write(b"held back")
    await until(lambda: "LogStalled" in host.reasons())
    assert logged(sandbox) == b""
    monkeypatch.setattr(sandbox.log, "append", append)
    await until(lambda: logged(sandbox) == b"held back")


# Many.


async def test_starts_wait_for_a_slot_and_admission_counts_those_that_are_starting(host: Host) -> None:
    host.fake.faults.boot_s = 1000.0
    boxes = [host.assign(f"box-{n}") for n in range(40)]
    await until(lambda: len(host.fake.machines) > 1)
    for _ in range(200):
        await asyncio.sleep(0)
    starting = [box for box in boxes if box.record.phase is Phase.STARTING]
    assert 1 < len(starting) < 40
    assert len(host.sandboxes.live_resources()) == len(starting)
    assert len({box.record.vm_uid for box in starting}) == len(starting)
    for box in boxes:
        host.want(box, DesiredState.REMOVED)
    await until(lambda: host.sandboxes.all() == [])


async def test_vm_uids_are_given_back(host: Host) -> None:
    for n in range(3):
        sandbox = host.assign(f"box-{n}", "true")
        await reach(sandbox, *ENDED)
        assert sandbox.record.vm_uid == 200_000
        host.want(sandbox, DesiredState.REMOVED)
        await gone(host, f"box-{n}")
    short = host.assign("short", resources=Resources(900_000, 900_000, 900_000, 1000))
    await reach(short, *ENDED)
    assert host.sandboxes.claim_vm_uid() == 200_000  # what was not admitted has none


async def test_not_admitted_is_an_error_of_that_kind(host: Host) -> None:
    with pytest.raises(ShortOfResources):
        host.sandboxes.admit(host.spec(resources=Resources(900_000, 900_000, 900_000, 1000)))


async def test_a_bug_while_cleaning_up_is_told_and_tried_until_it_works(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostd.sandboxes.retry_s", lambda attempts: 0.001)
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    host.fake.faults.destroy = ZeroDivisionError("a bug")  # type: ignore[assignment]
    host.want(sandbox, DesiredState.STOPPED)
    await until(lambda: "InternalError" in host.reasons())
    assert sandbox.record.phase not in ENDED and "one" in host.fake.machines
    host.fake.faults.destroy = None
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.EXITED, "Stopped")  # how it had ended already
    assert host.reasons().count("InternalError") == 1
    host.want(sandbox, DesiredState.REMOVED)
    await gone(host)


async def test_a_disk_that_takes_no_record_delays_an_end_and_loses_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostd.sandboxes.retry_s", lambda attempts: 0.001)
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)

    def full(journal: Journal, record: Record) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", full)
        host.fake.machines["one"].lose(Loss("VmmExited", "killed"))
        await until(lambda: "InternalError" in host.reasons())
        assert sandbox.record.phase is Phase.RUNNING
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.FAILED, "VmmExited")


async def test_output_that_cannot_be_recorded_for_a_bug_ends_the_sandbox_with_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the log's pump it would stand still for ever, at a window that nobody opens."""
    sandbox = host.assign("one", "cat", process=ProcessSpec(argv=("cat",), stdin=True))
    await reach(sandbox, Phase.RUNNING)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sandbox.log, "append", broken)
    await sandbox.running().main.write(b"hello\n")
    await reach(sandbox, *ENDED)
    assert (sandbox.record.phase, sandbox.record.reason) == (Phase.FAILED, "InternalError")
    assert "ZeroDivisionError: a bug" in sandbox.record.message and host.fake.machines == {}


@pytest.mark.parametrize("error", [ValueError("a bug"), HostdError("a resize cannot go from here to there")])
async def test_a_resize_that_a_bug_ended_is_begun_again(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("hostd.supervision.retry_s", lambda attempts: 0.001)
    sandbox = host.assign()
    await reach(sandbox, Phase.RUNNING)
    await until(lambda: sandbox.resize is not None and sandbox.resize.state is ResizeState.DONE)
    tell, failures = sandbox.tell_resize, [error]

    def fails_once(progress: ResizeProgress) -> None:
        if failures:
            raise failures.pop()
        tell(progress)

    monkeypatch.setattr(sandbox, "tell_resize", fails_once)
    host.want(sandbox, DesiredState.RUNNING, resources=replace(sandbox.spec.resources, memory_mib=512))
    await until(lambda: host.fake.machines["one"].actual_mib == 512)
    await until(lambda: sandbox.resize is not None and sandbox.resize.desired_mib == 512)
    assert host.reasons().count("InternalError") == 1
