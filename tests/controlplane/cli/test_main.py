"""How the whole program ends: one line, a status, and by which signal. Some of it in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.api.status import Condition, Failure
from controlplane.cli import connection
from controlplane.cli.connection import Target
from controlplane.cli.errors import CliError
from controlplane.cli.home import Context, Home, load_context, save_context
from controlplane.cli.main import main, shell_for
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric, FakeProcess, issue_tls, until


def program(cli: Cli, *argv: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [sys.executable, "-m", "controlplane.cli.main", "--home", str(cli.home), *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip


def test_a_closed_pipe_ends_it_as_sigpipe_would(fabric: FakeFabric, cli: Cli) -> None:
    for _ in range(2):
        fabric.add(f"box-{_}")
    process = program(cli, "ps", "-o", "json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == -signal.SIGPIPE
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_it_as_sigint_does(fabric: FakeFabric, cli: Cli) -> None:
    process = program(cli, "events", "-w")
    until(lambda: any(name == "WatchEvents" for name, _ in fabric.calls))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


def test_a_program_that_died_of_a_signal_is_only_a_number(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["p"] = lambda process: 130
    process = program(cli, "run", "debian", "--", "p")
    assert (process.communicate(timeout=20), process.returncode) == ((b"", b""), 130)


def test_a_run_whose_reader_went_away_is_stopped(fabric: FakeFabric, cli: Cli) -> None:
    def yes(process: FakeProcess) -> int:
        while process.signals.empty():
            process.out(b"y\n" * 1000)
            fabric.closing.wait(0.01)
        return 0

    fabric.programs["yes"] = yes
    process = program(cli, "run", "--name", "box", "debian", "--", "yes")
    assert process.stdout is not None
    process.stdout.read(2)
    process.stdout.close()
    assert process.wait(20) == -signal.SIGPIPE
    assert "StopSandbox" in [name for name, _ in fabric.calls]


def test_nobody_there_is_one_line_that_says_what_to_do(cli: Cli) -> None:
    done = cli("ps")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"sandloom: no fabric is running here: {cli.home}/context.json is not there: start one with `sandloom dev up`\n"
    )


def test_a_control_plane_that_is_away(fabric: FakeFabric, cli: Cli) -> None:
    fabric.stop()
    done = cli("ps")
    assert done.code == 1
    assert done.err.startswith("sandloom: the control plane does not answer: ")
    assert done.err.endswith("see `sandloom dev status`; `sandloom dev up` starts it\n")
    assert done.err.count("\n") == 1
    assert cli("run", "debian", "--", "true").code == 125


def test_wrong_lines_are_2_and_125_for_run(cli: Cli) -> None:
    assert (cli("pss").code, cli("ps", "--al").code) == (2, 2)
    assert (cli("run").code, cli("run", "--no", "x").code) == (125, 125)
    assert cli().code == cli("--help").code == 0


def test_a_defect_is_one_line_and_a_traceback_only_when_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("oops")

    monkeypatch.setattr("controlplane.cli.connection.load_context", broken)
    done = cli("ps")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "a defect of sandloom: RuntimeError('oops'): set SANDLOOM_DEBUG=1" in done.err
    with pytest.raises(RuntimeError):
        cli("ps", environ={"SANDLOOM_DEBUG": "1"})


def test_debug_shows_where_a_failure_came_from(cli: Cli) -> None:
    assert "Traceback" in cli("ps", environ={"SANDLOOM_DEBUG": "1"}).err


def test_another_control_plane_by_flags(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    home = Home(cli.home)
    address = load_context(home).address
    home.context.unlink()
    fabric.add("box")
    assert cli.ok("ps", "-o", "name", "--address", address, "--tls-dir", str(home.tls)) == "box\n"
    done = cli("ps", "--address", address, "--tls-dir", str(tmp_path / "none"))
    assert done.err == (f"sandloom: a TLS file cannot be read: {tmp_path}/none/ca.crt: be root, or give --tls-dir\n")


def test_another_fabrics_certificate_is_refused(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:

    issue_tls(tmp_path / "other")
    done = cli("ps", "--tls-dir", str(tmp_path / "other"))
    assert done.code == 1
    assert done.err.startswith("sandloom: another fabric answers, or its certificate has run out: ")
    shutil.copy(Home(cli.home).tls / "ca.crt", tmp_path / "other" / "ca.crt")  # now only our own is of another CA
    done = cli("ps", "--tls-dir", str(tmp_path / "other"))
    assert done.err.startswith("sandloom: the control plane closes the connection: ")
    assert "use a certificate of this fabric's own CA" in done.err


def test_version_is_an_option_too(cli: Cli) -> None:
    assert cli.ok("--version") == cli.ok("version")
    assert "--version" in cli.ok("--help")
    assert json.loads(cli.ok("--version", "-o", "json"))["api"] == "sandloom.v1"


def test_a_tenants_certificate_is_found_too(tmp_path: Path) -> None:
    for name in ("ca.crt", "tenant.crt", "tenant.key"):
        (tmp_path / name).touch()
    assert connection.resolve(Target(Home(tmp_path), "a:1", tmp_path)).tls_cert == tmp_path / "tenant.crt"


def test_a_context_that_is_not_right_is_named(cli: Cli) -> None:
    home = Home(cli.home)
    home.prepare()
    home.context.write_text("{}")
    assert "must have exactly address, tls_ca, tls_cert, tls_key" in cli("ps").err
    home.context.write_text("no")
    assert "it is not JSON" in cli("ps").err
    save_context(home, Context("a:1", tmp := cli.home / "x", tmp, tmp))
    with pytest.raises(CliError, match="a TLS file cannot be read"):
        connection.resolve(Target(home))


def test_details_that_the_message_does_not_tell_are_added() -> None:
    failure = Failure(Condition.EXHAUSTED, "R", "needs 900 MiB", (("asked", "900"), ("free_mib", "512"), ("empty", "")))
    assert connection.explained(failure) == "needs 900 MiB (free_mib=512)"


def test_doctor_passes_output_and_status_on(cli: Cli, tmp_path: Path) -> None:
    report = '{"checks": [{"name": "root", "status": "fail"}]}'
    fake = tmp_path / "hostd.py"
    fake.write_text(f"import sys\nprint('{report}' if '--json' in sys.argv else sys.argv[1:])\nsys.exit(1)\n")

    for argv, expected in (
        (["doctor", "--probe"], "['doctor', '--probe']\n"),
        (["doctor", "-o", "json"], report + "\n"),
        (["doctor", "-o", "name"], "root\n"),
        (["doctor", "-o", "yaml"], "checks:\n- name: root\n  status: fail\n"),
    ):
        read, write = os.pipe()
        with os.fdopen(write, "w") as sink:
            ended = main(
                [*argv, "-q"], dict(os.environ),
                lambda g, e, sink=sink: replace(  # type: ignore[misc]
                    shell_for(g, e), argvs={"hostd": (sys.executable, str(fake))},
                    printer=replace(shell_for(g, e).printer, out=sink),
                ),
            )  # fmt: skip
        with os.fdopen(read) as source:
            assert (ended.code, source.read()) == (1, expected)


def test_version(cli: Cli) -> None:
    assert "api sandloom.v1" in cli.ok("version")
