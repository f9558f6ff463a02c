"""`dev up`, `status` and `down` with tiny daemons in place of the real ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli import daemons, devdown, devfiles, devup, lookup
from controlplane.cli.errors import CliError
from controlplane.cli.home import Home
from controlplane.cli.main import main, shell_for
from tests.controlplane.cli.conftest import Done
from tests.controlplane.cli.fakefabric import until

FAKES = (sys.executable, "-m", "tests.controlplane.cli.fakedaemons")
NAMES = (devup.CONTROLPLANE, devup.HOSTD)


@dataclass
class Dev:
    """`sandloom dev ...` on a HOME of its own."""

    home: Home
    hostd: str = "hostd"

    def __call__(self, *argv: str) -> Done:
        argvs = {"controlplane": (*FAKES, "controlplane"), "hostd": (*FAKES, self.hostd)}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            ended = main([*argv, "--home", str(self.home.root)], {}, lambda g, e: replace(shell_for(g, e), argvs=argvs))
        return Done(ended.code, out.getvalue(), err.getvalue())

    def pids(self) -> Mapping[str, int]:
        return {name: daemon.pid for name in NAMES if (daemon := daemons.running(self.home, name))}

    def kill(self, name: str) -> None:
        daemon = daemons.running(self.home, name)
        assert daemon is not None
        os.kill(daemon.pid, signal.SIGKILL)
        until(lambda: not daemons.is_alive(daemon))


@pytest.fixture
def dev() -> Iterator[Dev]:
    if os.geteuid() != 0:
        pytest.skip("needs root: `dev up` refuses to begin without it")
    folder = Path(tempfile.mkdtemp(prefix="sl-dev-"))  # short: unix sockets live below it
    dev = Dev(Home(folder / "h"))
    yield dev
    for name in NAMES:
        daemon = daemons.recorded(dev.home, name)
        if daemon is not None:
            daemons.stop(daemon, grace_s=1.0)
    shutil.rmtree(folder)


def test_up_status_and_down(dev: Dev) -> None:
    first = dev("dev", "up", "--host-name", "loom", "--accel", "tcg")
    assert first.code == 0, first
    assert first.out.startswith("the fabric is up: control plane 127.0.0.1:")
    assert first.out.endswith(", host loom READY (tcg)\n")
    pids = dev.pids()
    second = dev("dev", "up")
    assert (second.code, second.out) == (0, first.out.replace("is up", "runs already"))
    assert dev.pids() == pids
    status = dev("dev", "status", "-o", "json")
    rows = json.loads(status.out)
    assert (status.code, [row["state"] for row in rows], rows[1]["detail"]) == (0, ["running"] * 2, "loom READY")
    assert dev("ps", "-o", "name").out == "left-over\n"
    down = dev("dev", "down")
    assert (down.code, down.out) == (0, "the fabric is down\n"), down
    assert down.err.startswith("stopping sandboxes: 2\nstopping sandboxes: 1\n")  # acme's, and those of default
    assert (dev.pids(), dev.home.context.exists()) == ({}, False)
    assert dev("dev", "down").out == "nothing runs here\n"
    assert dev("dev", "status").code == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_half_dead_fabric_is_repaired(dev: Dev, name: str) -> None:
    assert dev("dev", "up", "--host-name", "loom", "--accel", "tcg").code == 0
    before, config = dev.pids(), devfiles.hostd_config(dev.home).read_text()
    dev.kill(name)
    assert dev("dev", "status").code == 1
    if name == devup.CONTROLPLANE:  # the fake keeps no records: the real hostd reports itself again
        dev.kill(devup.HOSTD)
    done = dev("dev", "up")
    assert (done.code, "loom READY (tcg)" in done.out) == (0, True), done
    assert devfiles.hostd_config(dev.home).read_text() == config  # same port, same settings
    if name == devup.HOSTD:
        assert dev.pids()["controlplane"] == before["controlplane"]
    assert dev("dev", "down").code == 0


def test_down_of_a_half_dead_fabric_still_removes_its_sandboxes(dev: Dev) -> None:
    assert dev("dev", "up", "--host-name", "loom").code == 0
    dev.kill(devup.HOSTD)
    done = dev("dev", "down", "--purge")
    assert done.code == 0, done
    assert "starting it to clean up" in done.err
    assert (dev.pids(), dev.home.root.exists()) == ({}, False)


def test_down_that_is_stuck_tells_the_way_out(dev: Dev, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dev("dev", "up", "--host-name", "loom").code == 0

    async def never_less(*_: object, **__: object) -> list[sandboxes_pb2.Sandbox]:
        return [sandboxes_pb2.Sandbox(name="stuck", status=sandboxes_pb2.SandboxStatus(phase=sandboxes_pb2.FAILED))]

    with monkeypatch.context() as patched:
        patched.setattr(lookup, "list_sandboxes", never_less)
        patched.setattr(devdown, "LET_GO_S", 0.1)
        done = dev("dev", "down")
    assert done.code == 1
    assert "sandboxes are not let go of: stuck" in done.err
    assert "`sandloom dev down --keep`, then `sandloom dev down`" in done.err
    assert dev("dev", "down", "--keep").code == 0
    down = dev("dev", "down")
    assert (down.code, dev.pids()) == (0, {}), down


def test_down_that_left_something_is_tried_again_by_the_next_one(dev: Dev, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dev("dev", "up", "--host-name", "loom").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(devdown, "leftovers", lambda _: ["process 7 (qemu)"])
        done = dev("dev", "down")
    assert (done.code, "left: process 7 (qemu)" in done.err, dev.pids()) == (1, True, {}), done
    again = dev("dev", "down")
    assert (again.code, again.out, dev.home.context.exists()) == (0, "the fabric is down\n", False), again


def test_down_keep_leaves_the_context_for_the_next_up(dev: Dev) -> None:
    assert dev("dev", "up", "--host-name", "loom").code == 0
    address = json.loads(dev.home.context.read_text())["address"]
    assert "run on" in dev("dev", "down", "--keep").out
    assert (dev.pids(), dev.home.context.exists()) == ({}, True)
    assert address in dev("dev", "up").out
    assert dev("dev", "down").code == 0


def test_a_hostd_that_does_not_come_up_leaves_nothing_behind(dev: Dev) -> None:
    dev.hostd = "broken"
    done = dev("dev", "up", "--host-name", "loom")
    assert done.code == 1
    steps, first, *rest = done.err.partition("sandloom: ")[0], *done.err[done.err.index("sandloom: ") :].splitlines()
    assert "starting hostd" in steps
    assert first.startswith("sandloom: hostd ended before it was ready: exit code 1: its log is ")
    assert rest == ["  | hostd: no cgroups here: mount them"]
    assert (dev.pids(), dev.home.context.exists()) == ({}, False)


def test_a_host_is_not_renamed_and_a_running_one_not_changed(dev: Dev) -> None:
    assert dev("dev", "up", "--host-name", "loom", "--accel", "tcg").code == 0
    assert "it is named loom" in dev("dev", "up", "--host-name", "other").err
    assert "accel tcg" in dev("dev", "up", "--accel", "kvm").err
    assert dev("dev", "down").code == 0


def test_what_is_added_to_the_hosts_configuration_stays_and_counts(dev: Dev) -> None:
    assert dev("dev", "up", "--host-name", "loom", "--registry", "r.example").code == 0
    path = devfiles.hostd_config(dev.home)
    before = dev.pids()
    assert dev("dev", "up", "--registry", "r.example").code == 0  # nothing new
    assert dev.pids() == before
    assert dev("dev", "up", "--plain-registry", "127.0.0.1:5000").code == 0
    named = {"registries": ["r.example", "127.0.0.1:5000"], "plain_registries": ["127.0.0.1:5000"]}
    assert tomllib.loads(path.read_text()).items() >= named.items()
    after = dev.pids()
    assert (after["controlplane"], after["hostd"] != before["hostd"]) == (before["controlplane"], True)
    added: dict[str, devfiles.Value] = {
        "labels": ["zone=eu"],
        "network_nat": True,
        "memory_sense_s": 1.5,
        "registry_auth_dir": "/etc/x",
    }
    path.write_text(path.read_text() + devfiles.toml(added))
    late_s = time.time() + 60  # as if it was written later
    os.utime(path, (late_s, late_s))
    assert dev("dev", "up").code == 0
    assert dev.pids()["hostd"] != after["hostd"]
    assert tomllib.loads(path.read_text()).items() >= {**named, **added}.items()
    assert dev("dev", "down").code == 0


def test_a_configuration_that_cannot_be_kept_is_not_thrown_away(dev: Dev) -> None:
    path = devfiles.hostd_config(dev.home)
    path.parent.mkdir(mode=0o711)
    for text, told in (("registries = [", "cannot be kept"), ("[odd]\na = 1\n", "odd is neither")):
        path.write_text(text)
        done = dev("dev", "up", "--host-name", "loom")
        assert (done.code, told in done.err, path.read_text()) == (1, True, text), done
    assert "is no registry" in dev("dev", "up", "--registry", "https://r.example").err


def test_a_path_too_long_for_sockets_is_refused_before_anything_starts(dev: Dev) -> None:
    long = Dev(Home(dev.home.root / ("x" * 60)))
    done = long("dev", "up")
    assert (done.code, "67 are the most" in done.err, long.home.root.exists()) == (1, True, False)


def test_names_and_toml() -> None:
    assert devfiles.default_host_name("Büro_PC.example.org") == "b-ro-pc"
    assert devfiles.default_host_name("...") == "local"
    assert devfiles.toml({"a": 'q"\\ü\x7f', "n": 3}) == 'a = "q\\"\\\\ü\\u007F"\nn = 3\n'


def test_where_records_are_is_said_once(dev: Dev) -> None:
    home = dev.home
    home.prepare()
    file = f"sqlite:{home.store / 'sandloom.db'}"
    assert devfiles.store_for(home, None) == file
    assert devfiles.store_for(home, "etcd:a:1") == "etcd:a:1"
    devfiles.write_config(devfiles.controlplane_config(home), devfiles.controlplane_toml(home, "x:1", "etcd:a:1"))
    assert devfiles.store_for(home, None) == devfiles.store_for(home, "etcd:a:1") == "etcd:a:1"
    with pytest.raises(CliError, match="cannot move to etcd:b:1"):
        devfiles.store_for(home, "etcd:b:1")
    refused = dev("dev", "up", "--store", "sqlite:x")
    assert (refused.code, "is no etcd" in refused.err) == (2, True)


def test_two_at_once_wait_for_each_other(dev: Dev) -> None:
    dev.home.prepare()
    waited: list[int] = []
    with (
        devfiles.locked(dev.home),
        pytest.raises(CliError, match="another `dev up`"),
        devfiles.locked(dev.home, waiting=lambda: waited.append(1), deadline_s=0.0),
    ):
        pass
    assert waited
    with devfiles.locked(dev.home, deadline_s=0.0):
        pass


def test_what_is_left_of_a_home_is_found(dev: Dev, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "7").mkdir(parents=True)
    (proc / "self").mkdir()
    (proc / "net").mkdir()
    home = Home(Path("/h"))
    (proc / "7/cmdline").write_bytes(b"qemu\0-chardev\0path=/h/run/u/agent.sock\0")
    (proc / "self/mountinfo").write_text("1 1 0:1 / / rw - ext4 x rw\n2 1 0:2 / /h/state/m rw - erofs x rw\n")
    (proc / "net/unix").write_text("Num RefCount\n0: 2 0 1 1 1 99 /h/run/u/agent.sock\n0: 2 0 1 1 1 98 /other\n")
    assert devdown.leftovers(home, proc) == ["mount /h/state/m", "process 7 (qemu)", "socket /h/run/u/agent.sock"]
