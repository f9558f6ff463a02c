"""The real agent's processes: what they are, what they may, how they end, what is said when they cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from guestagent.errors import GuestRefused
from guestagent.messages import OutputEnded, Prepare, Renew, StartProcess, Stream
from tests.guestagent.realagent import CONFIGURE, PATH, Link, RealAgent

DOCKER_LIKE = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 29, 31}  # linux/capability.h; 27 (MKNOD), 21 (SYS_ADMIN) … not


def refusal(link: Link, proc: int, *argv: bytes, **fields: object) -> GuestRefused:
    values: dict[str, object] = {"env": (PATH,), **fields}
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.start(StartProcess(proc, argv, **values)))  # type: ignore[arg-type]
    return caught.value


def test_hello_tells_the_boot_and_no_processes(agent: RealAgent) -> None:
    state = agent.connect().state
    assert state is not None
    assert state.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (state.version, state.configured, state.procs) == (1, False, ())


def test_nothing_starts_before_configure(agent: RealAgent) -> None:
    assert refusal(agent.connect(), 1, b"true").errno == errno.EAGAIN


IDENTITY = replace(CONFIGURE, hostname=b"nobody", machine_id=b"f" * 32)
TRIES = """
exec 2>/dev/null
for path in /sandloom-left /tmp/sandloom-left /dev/shm/sandloom-left /var/tmp/sandloom-left; do
    echo left > $path && echo wrote $path
done
mkfifo /tmp/sandloom-fifo && echo made a fifo
chmod 700 /tmp && echo changed a mode
mount -t tmpfs none /mnt && echo mounted
setsid sleep 86399.25 &
sleep 86399.25 &
kill -9 1 2>/dev/null
"""


def rehearsing(agent: RealAgent) -> Link:
    link = agent.connect()
    link.ask(link.session.prepare(Prepare(CONFIGURE.layers, 5000)))
    link.ask(link.session.rehearse(IDENTITY))
    return link


def running(argument: bytes) -> list[str]:
    """Processes of this machine with that argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


def test_a_rehearsal_needs_a_prepared_guest_with_an_identity_to_throw_away(agent: RealAgent) -> None:
    link = agent.connect()
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.rehearse(IDENTITY))
    assert caught.value.errno == errno.EINVAL
    link.ask(link.session.prepare(Prepare(CONFIGURE.layers, 5000)))
    assert refusal(link, 2, b"true").errno == errno.EAGAIN
    link.ask(link.session.rehearse(IDENTITY))
    assert refusal(link, 1, b"true").errno == errno.EINVAL  # there is no main process yet
    assert refusal(link, 2, b"no-such-program").errno == errno.ENOENT
    link.ask(link.session.rehearse(IDENTITY))  # waits for what failed to be gone
    link.ask(link.session.configure(CONFIGURE))
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.rehearse(IDENTITY))
    assert caught.value.errno == errno.EALREADY


def test_a_rehearsal_may_change_nothing_and_nothing_of_it_lives_on(agent: RealAgent) -> None:
    link = rehearsing(agent)
    link.start(2, "sh", "-c", TRIES)
    assert link.exited(2) == (0, 0)
    assert link.out(2) == b""
    link.ask(link.session.forget(2))
    assert running(b"86399.25") == []
    assert not any(Path(folder, "sandloom-left").exists() for folder in ("/", "/tmp", "/dev/shm", "/var/tmp"))
    link.ask(link.session.rehearse(IDENTITY))
    link.ask(link.session.configure(CONFIGURE))
    link.shell(3, "echo $$; id -u; cat /proc/self/personality; test -w /tmp && echo writable")
    assert link.exited(3) == (0, 0)
    pid, uid, personality, writable = link.out(3).split()
    assert (pid, uid, personality, writable) == (b"2", b"0", b"00000000", b"writable")


def test_a_rehearsed_program_is_powerless(agent: RealAgent) -> None:
    link = rehearsing(agent)
    link.start(2, "sleep", "86399.75")
    (pid,) = running(b"86399.75")
    told = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert told["Uid"].split() == told["Gid"].split() == ["2147483646"] * 4
    assert told["Groups"].strip() == ""
    assert {told[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert told["NoNewPrivs"] == "1"
    assert told["NSpid"].split()[-1] == "1"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    for kind in ("pid", "mnt", "ipc"):
        assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    assert mounts and all("ro" in line.split()[5].split(",") for line in mounts)
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.configure(CONFIGURE))
    assert caught.value.errno == errno.EBUSY  # nobody comes to live beside it
    link.ask(link.session.signal(2, signal.SIGKILL))
    assert link.exited(2) == (-1, signal.SIGKILL)
    link.ask(link.session.forget(2))
    link.ask(link.session.configure(CONFIGURE))


def test_outside_of_a_guest_nothing_is_frozen_and_nobody_renewed(link: Link) -> None:
    for request, code in (
        (link.session.freeze(1000), errno.EOPNOTSUPP),
        (link.session.renew(Renew(b"web-2", b"e" * 32, b"0" * 32, 1)), errno.EINVAL),
    ):
        with pytest.raises(GuestRefused) as caught:
            link.ask(request)
        assert caught.value.errno == code
    assert link.ask(link.session.thaw()) is None


def test_a_second_configure_is_refused(link: Link) -> None:
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.configure(CONFIGURE))
    assert caught.value.errno == errno.EALREADY


def test_output_comes_whole_and_before_the_exit(link: Link) -> None:
    link.shell(2, "echo out; echo err >&2; exit 3")
    assert link.exited(2) == (3, 0)
    assert link.out(2) == b"out\n"
    assert link.out(2, Stream.STDERR) == b"err\n"
    ends = {event for event in link.events if isinstance(event, OutputEnded)}
    assert ends == {OutputEnded(2, Stream.STDOUT, 4), OutputEnded(2, Stream.STDERR, 4)}
    assert link.events[-1] == link.exits[2]


@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_exit_codes(link: Link, code: int) -> None:
    link.shell(2, f"exit {code}")
    assert link.exited(2) == (code, 0)


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMAX])
def test_signals_end_a_process_and_are_told(link: Link, signo: int) -> None:
    link.start(2, "sleep", "1000")
    link.ask(link.session.signal(2, signo))
    assert link.exited(2) == (-1, signo)
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.signal(2, signo))
    assert caught.value.errno == errno.ESRCH


def test_arguments_and_environment_are_bytes(link: Link) -> None:
    odd = b"\xff\xfe '\""
    link.start(2, "/bin/sh", b"-c", b'printf "%s|" "$0" "$ODD"; env | sort', odd, env=(PATH, b"ODD=" + odd, b"HOME=/h"))
    assert link.exited(2) == (0, 0)
    assert link.out(2).startswith(odd + b"|" + odd + b"|HOME=/h\n")


def test_many_and_long_arguments(link: Link) -> None:
    words = [b"x" * 20] * 3000
    link.start(2, "/bin/sh", "-c", 'echo $# "$1"', "sh", *words)
    assert link.exited(2) == (0, 0)
    assert link.out(2) == b"3000 " + words[0] + b"\n"


@pytest.mark.parametrize("path_variable", [(PATH,), (), (b"PATH=",), (b"PATH=/nowhere:/etc/passwd",)])
def test_a_command_that_is_nowhere(link: Link, path_variable: tuple[bytes, ...]) -> None:
    refused = refusal(link, 2, b"no-such-command", env=path_variable)
    assert refused.errno == errno.ENOENT
    assert refused.message == "not found in PATH: no-such-command: No such file or directory"
    assert refusal(link, 2, b"/no/such/command").errno == errno.ENOENT


def test_path_is_searched_in_order(link: Link, tmp_path: Path) -> None:
    for name, mode, text in (("a", 0o644, "no"), ("b", 0o755, "first"), ("c", 0o755, "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thing").write_text(f"#!/bin/sh\necho {text}\n")
        (tmp_path / name / "thing").chmod(mode)
    link.start(2, "thing", env=(b"PATH=" + b":".join(bytes(tmp_path / name) for name in "abc"),))
    assert link.exited(2) == (0, 0)
    assert link.out(2) == b"first\n"
    assert refusal(link, 3, b"thing", env=(b"PATH=" + bytes(tmp_path / "a"),)).errno == errno.EACCES


def test_a_file_that_cannot_be_run(link: Link, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x01\x02\x03")
    garbage.chmod(0o755)
    assert refusal(link, 2, bytes(garbage)).errno == errno.ENOEXEC
    garbage.chmod(0o644)
    assert refusal(link, 2, bytes(garbage)).errno == errno.EACCES
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/no/such/interpreter\n")
    orphan.chmod(0o755)
    refused = refusal(link, 2, bytes(orphan))
    assert (refused.errno, refused.message.startswith("its interpreter is missing: ")) == (errno.ENOENT, True)


def test_a_refused_number_is_free_again(link: Link) -> None:
    refusal(link, 2, b"no-such-command")
    assert link.result(2, "echo here") == "here"


def test_a_number_is_taken_until_forgotten(agent: RealAgent, link: Link) -> None:
    link.start(2, "sleep", "1000")
    with pytest.raises(GuestRefused) as caught:
        link.ask(link.session.forget(2))
    assert caught.value.errno == errno.EBUSY
    carry = link.hang_up()
    again = agent.connect(carry)
    assert again.state is not None and [proc.proc for proc in again.state.procs] == [2]
    again.send(again.session.follow(2))
    again.ask(again.session.signal(2, signal.SIGKILL))
    again.exited(2)
    again.ask(again.session.forget(2))
    assert again.result(2, "echo anew") == "anew"


def test_cwd(link: Link) -> None:
    assert link.result(2, "pwd", cwd=b"/usr/bin") == "/usr/bin"
    refused = refusal(link, 3, b"true", cwd=b"/no/such/folder")
    assert (refused.errno, "/no/such/folder" in refused.message) == (errno.EINVAL, True)
    assert refusal(link, 3, b"true", cwd=b"/etc/passwd").errno == errno.EINVAL


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (b"", "0 0 /root"),
        (b"12345", "12345 0 /"),
        (b"12345:777", "12345 777 /"),
        (b"daemon", "1 1 /usr/sbin"),
        (b"1", "1 1 /usr/sbin"),
        (b"daemon:tty", "1 5 /usr/sbin"),
        (b"4294967294", "4294967294 0 /"),
    ],
)
def test_user(link: Link, user: bytes, expected: str) -> None:
    assert link.result(2, 'echo "$(id -u) $(id -g) $HOME"', user=user) == expected


@pytest.mark.parametrize("user", [b"no-such-user", b"0:no-such-group", b"4294967295", b"-1", b":", b"0:", b"a" * 200])
def test_a_user_the_image_does_not_know(link: Link, user: bytes) -> None:
    refused = refusal(link, 2, b"true", user=user)
    assert (refused.errno, "user" in refused.message or "group" in refused.message) == (errno.EINVAL, True)


def test_capabilities_are_dockers_without_mknod(link: Link) -> None:
    status = link.result(2, "cat /proc/self/status")
    sets = {name: int(value, 16) for name, value in re.findall(r"^Cap(\w+):\s+(\w+)$", status, re.M)}
    held = {bit for bit in range(64) if sets["Eff"] >> bit & 1}
    assert held == DOCKER_LIKE
    assert sets["Prm"] == sets["Bnd"] == sets["Eff"]
    assert sets["Inh"] == sets["Amb"] == 0
    assert "NoNewPrivs:\t0" in status
    nobody = link.result(3, "cat /proc/self/status", user=b"65534:65534")
    assert re.findall(r"^Cap(?:Eff|Prm):\s+(\w+)$", nobody, re.M) == ["0" * 16] * 2
    assert link.result(4, "mknod /tmp/agent-node c 1 3 2>&1 || echo no").endswith("no")
    assert link.result(5, "umount /proc 2>&1 || echo no").endswith("no")


def test_a_process_starts_clean(link: Link) -> None:
    """Its own session, default signals, nothing of the agent's open, killable by the OOM killer."""
    # No pipeline of ls: the shell that makes one has an end of it open for a moment.
    seen = link.result(2, "cat /proc/self/status; cat /proc/$$/stat; ls -m /proc/$$/fd; cat /proc/self/oom_score_adj")
    assert re.findall(r"^Sig(?:Blk|Ign|Cgt):\s+(\w+)$", seen, re.M) == ["0" * 16] * 3
    stat = next(line for line in seen.splitlines() if "(sh)" in line).rsplit(")", 1)[1].split()
    assert stat[2] == stat[3]  # process group and session: its own
    assert stat[1] == "0"  # its parent, the agent, is not in its namespace
    assert seen.endswith("0, 1, 2\n0")


def test_the_namespaces_are_its_own(link: Link) -> None:
    pid = link.shell(2, "echo $$; cat /proc/1/comm; ls /proc | grep -c '^[0-9]'; readlink /proc/self/ns/ipc")
    assert link.exited(2) == (0, 0)
    own_pid, init, count, ipc = link.out(2).decode().split()
    assert int(own_pid) == pid
    assert init == "init"
    assert int(count) <= 4
    assert ipc != str(Path("/proc/self/ns/ipc").readlink())


def test_dev_is_minimal_and_proc_is_covered(link: Link) -> None:
    names = link.result(2, "ls /dev").split()
    assert names == [
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "tty",
        "urandom",
        "zero",
    ]
    for number, path in enumerate(("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/power/state"), 3):
        assert link.result(number, f"echo x 2>&1 > {path} || echo refused").endswith("refused"), path
    assert link.result(9, "cat /proc/keys /proc/timer_list; echo deep > /dev/shm/x && cat /dev/shm/x") == "deep"


def test_zombies_are_reaped_by_the_init(link: Link) -> None:
    link.result(2, "(sh -c 'sleep 0.05 & exec true' &) ; true")
    link.shell(3, "while ps -e -o stat= | grep -q Z; do :; done; ps -e -o comm= | sort | tr '\\n' ' '")
    assert link.exited(3) == (0, 0)


def test_main_ends_everything(link: Link) -> None:
    link.shell(2, "trap '' TERM; echo ready; while :; do sleep 1000; done")
    link.start(3, "cat", stdin=True)
    link.start(1, "cat", stdin=True)
    link.wait(lambda: link.out(2) == b"ready\n")
    link.send(link.session.stdin(1, b"bye", eof=True))
    assert link.exited(1) == (0, 0)
    assert link.out(1) == b"bye"
    assert link.exited(2) == (-1, signal.SIGKILL)
    assert link.exited(3) == (-1, signal.SIGKILL)
    assert refusal(link, 4, b"true").errno == errno.ESHUTDOWN
    link.wait(lambda: link.stats().procs == 0)  # what a killed shell leaves is reaped a moment later


def test_a_daemon_left_behind_does_not_hold_up_the_exit(link: Link) -> None:
    link.shell(2, "(trap '' PIPE; echo $$ first; exec sleep 1000) & echo second")
    assert link.exited(2, 8.0) == (0, 0)
    assert sorted(link.out(2).split()[-1:]) and b"second" in link.out(2) and b"first" in link.out(2)
    assert link.result(3, "ps -e -o args= | grep -c '^sleep 1000'") == "1"


def test_a_late_writer_is_heard(link: Link) -> None:
    """What a child of the process writes just after it is gone still comes, as from a pipeline's last part."""
    link.shell(2, "(sleep 0.3; echo late) & true")
    assert link.exited(2) == (0, 0)
    assert link.out(2) == b"late\n"


def test_a_hundred_at_once(link: Link) -> None:
    for proc in range(2, 102):
        link.send(link.session.start(StartProcess(proc, (b"/bin/sh", b"-c", b"echo $0; exit $0", b"%d" % proc)))[1])
    link.wait(lambda: len(link.exits) == 100, 60)
    for proc in range(2, 102):
        assert (link.out(proc), link.exits[proc].code) == (b"%d\n" % proc, proc)


def test_records_are_bounded(link: Link) -> None:
    """The 513th record is refused until another is forgotten."""
    for first in range(2, 514, 128):
        for proc in range(first, first + 128):
            link.send(link.session.start(StartProcess(proc, (b"/bin/true",)))[1])
        so_far = first + 126
        link.wait(lambda: len(link.exits) == so_far, 60)  # noqa: B023 (waited for at once)
    refused = refusal(link, 1000, b"/bin/true")
    assert (refused.errno, "FORGET" in refused.message) == (errno.EMFILE, True)
    link.ask(link.session.forget(2))
    link.start(1000, "/bin/true")
    assert link.exited(1000) == (0, 0)


def test_stats_are_this_machines(link: Link) -> None:
    link.start(2, "sleep", "1000")
    stats = link.stats()
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    assert stats.mem_total_kib == total
    assert 0 < stats.mem_free_kib <= total and 0 < stats.cached_kib <= total
    assert stats.cpus_online == os.cpu_count()
    assert stats.procs == 1
    assert stats.uptime_ms > 0 and stats.pgfault > 0 and stats.cpu_user_us > 0 and stats.agent_rss_kib > 0


def test_shutdown_asks_main_first(agent: RealAgent, link: Link) -> None:
    link.shell(1, "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.02; done")
    link.wait(lambda: link.out(1) == b"ready\n")
    link.ask(link.session.shutdown(10_000))
    assert link.exited(1) == (7, 0)
    assert link.out(1) == b"ready\nasked\n"
    assert agent.process.wait(10) == 0


def test_shutdown_kills_after_the_grace(agent: RealAgent, link: Link) -> None:
    link.shell(1, "trap '' TERM; echo ready; while :; do sleep 0.02; done")
    link.wait(lambda: link.out(1) == b"ready\n")
    link.ask(link.session.shutdown(200))
    assert link.exited(1) == (-1, signal.SIGKILL)
    assert agent.process.wait(10) == 0
