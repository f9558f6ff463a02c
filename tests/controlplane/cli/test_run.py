"""`run` over a real connection: output, exit codes, input, broken streams, and what is left afterwards."""

from __future__ import annotations

import threading

import pytest

from controlplane.api.status import Condition, Failure, FieldProblem
from controlplane.api.v1 import sandboxes_pb2
from controlplane.cli.attachment import STRIKES
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric, FakeProcess, until


def three(process: FakeProcess) -> int:
    process.out(b"out\n")
    process.err(b"err\n")
    return 3


def test_output_comes_apart_and_the_exit_code_is_the_programs(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["three"] = three
    done = cli("run", "--name", "box", "debian", "--", "three")
    assert (done.code, done.out, done.err) == (3, "out\n", "err\n")
    assert [box.name for box in fabric.sandboxes.values()] == ["box"]


def test_rm_leaves_no_record(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["three"] = three
    assert cli("run", "--rm", "debian", "--", "three").code == 3
    assert fabric.sandboxes == {}


def test_one_that_went_with_its_host_is_not_said_to_be_removed(fabric: FakeFabric, cli: Cli) -> None:
    def program(process: FakeProcess) -> int:
        process.out(b"x\n")
        until(lambda: not fabric.sandboxes)
        return 0

    def lose(name: str) -> None:
        until(lambda: any(process.log for process in fabric.processes.values()))
        text = "host loom is LOST: its lease ran out and it did not return in 2 s"
        fabric.events.append(sandboxes_pb2.Event(kind="sandbox", subject=name, reason="HostLost", message=text))
        fabric.break_after, fabric.break_with = 1, (Condition.UNAVAILABLE, 99)
        fabric.sandboxes.clear()

    fabric.programs["p"] = program
    loser = threading.Thread(target=lose, args=("box",))
    loser.start()
    done = cli("run", "--rm", "--name", "box", "debian", "--", "p")
    loser.join()
    assert done.code == 125
    assert "box was lost with its host: host loom is LOST: its lease ran out" in done.err
    assert "was removed" not in done.err


def test_a_field_at_fault_is_named_as_its_option(fabric: FakeFabric, cli: Cli) -> None:
    problem = FieldProblem("spec.resources.cpu_milli", "1000 CPUs are above 64, the most there are")
    fabric.failing["CreateSandbox"] = Failure(
        Condition.INVALID, "InvalidArgument", f"{problem.field}: {problem.problem}", fields=(problem,)
    )
    done = cli("run", "--cpus", "1000", "debian", "--", "true")
    assert done.code == 125
    assert done.err.startswith("sandloom: cannot run debian: --cpus: 1000 CPUs are above 64, the most there are")


@pytest.mark.parametrize("detach", [(), ("-d",)], ids=["attached", "detached"])
def test_a_port_that_the_host_chose_is_told(fabric: FakeFabric, cli: Cli, detach: tuple[str, ...]) -> None:
    def program(process: FakeProcess) -> int:
        until(lambda: any(name == "GetServiceUsage" for name, _ in fabric.calls))
        over.wait(0 if not detach else 60)
        return 0

    over = threading.Event()
    fabric.programs["p"] = program
    fabric.service_usage = sandboxes_pb2.ServiceUsage(published=["127.0.0.1:43210:8000/tcp"])
    done = cli("run", *detach, "--name", "box", "-p", "127.0.0.1:0:8000", "debian", "--", "p")
    assert done.code == 0 and "box is published at 127.0.0.1:43210:8000/tcp" in done.err, done
    if detach:
        assert " 127.0.0.1:43210:8000/tcp " in cli.ok("ps", "-o", "wide")
        fabric.service_usage = None  # its host is away: what was asked for is what can be said
        assert " 127.0.0.1:0:8000/tcp " in cli.ok("ps", "-o", "wide")
    over.set()


def test_what_cannot_be_run_is_127_and_named(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("run", "debian", "--", "no-such-program")
    assert (done.code, done.out) == (127, "")
    assert done.err == "sandloom: cannot run it: no-such-program: not found\n"


def test_a_sandbox_that_fails_to_start_is_125_with_the_reason(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("run", "--rm", "--name", "box", "debian", "--", "never-starts")
    assert done.code == 125
    assert done.err == (
        "sandloom: box did not start: KernelPanic: the guest's kernel did not boot:"
        " `sandloom events --subject box` tells what led to it\n"
    )
    assert fabric.sandboxes == {}


def test_a_missing_image_is_125_in_one_line_that_says_what_to_do(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("run", "no-such", "--", "true")
    assert done.code == 125
    assert done.err.startswith("sandloom: cannot run no-such: there is no image no-such: bring it in with `sandloom")
    assert done.err.count("\n") == 1


def test_stdin_is_passed_on_byte_for_byte(fabric: FakeFabric, cli: Cli) -> None:
    def cat(process: FakeProcess) -> int:
        while data := process.stdin.get(timeout=10):
            process.out(data)
        return 0

    fabric.programs["cat"] = cat
    data = "".join(f"line {i}\n" for i in range(40_000))
    done = cli("run", "-i", "debian", "--", "cat", stdin=data.encode())
    assert done.code == 0
    assert done.out == data


def test_without_i_nothing_is_passed_on(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["three"] = lambda process: 0 if process.stdin.empty() else 1
    assert cli("run", "debian", "--", "three", stdin=b"text").code == 0
    started = next(request for name, request in fabric.calls if name == "AttachSandbox")
    assert (started.from_start, started.stdin) == (True, False)


def test_a_broken_stream_is_taken_up_where_it_was(fabric: FakeFabric, cli: Cli) -> None:
    def counts(process: FakeProcess) -> int:
        for i in range(20):
            process.out(b"%d\n" % i)
            process.err(b"e%d\n" % i)
        return 5

    fabric.programs["counts"] = counts
    fabric.break_after = 7
    done = cli("run", "--name", "box", "debian", "--", "counts")
    assert done.code == 5
    assert done.out.split() == [str(i) for i in range(20)]
    assert [line for line in done.err.split() if line.startswith("e")][:20] == [f"e{i}" for i in range(20)]


def test_a_defect_on_the_other_side_is_tried_a_few_times_only(fabric: FakeFabric, cli: Cli) -> None:
    def waits(process: FakeProcess) -> int:
        process.out(b"here")
        process.out(b"more")
        process.signals.get(timeout=10)
        return 0

    fabric.programs["waits"] = waits
    fabric.break_after, fabric.break_with = 1, (Condition.INTERNAL, 99)
    done = cli("run", "--name", "box", "debian", "--", "waits")
    assert (done.code, done.out) == (125, "here")
    assert "the connection to box is lost: the host's hostd went away" in done.err
    attaches = [name for name, _ in fabric.calls].count("AttachSandbox")
    assert attaches == 1 + STRIKES


def test_input_waits_until_the_process_is_there(fabric: FakeFabric, cli: Cli) -> None:
    """The first attach fails while the sandbox is not there yet; nothing of the pipe is lost with it."""
    fabric.programs["cat"] = lambda process: (process.stdin.get(timeout=10) != b"all of it") * 1
    fabric.failing["AttachSandbox"] = Failure(Condition.NOT_FOUND, "NotThere", "no sandbox here yet")
    done = cli("run", "-i", "debian", "--", "cat", stdin=b"all of it")
    assert (done.code, done.err) == (0, "")
    assert [name for name, _ in fabric.calls].count("AttachSandbox") == 2


def test_a_pipe_that_was_being_read_is_not_taken_up_again(fabric: FakeFabric, cli: Cli) -> None:
    def echo(process: FakeProcess) -> int:
        process.out(process.stdin.get(timeout=10))
        process.out(b"more")
        process.signals.get(timeout=10)
        return 0

    fabric.programs["echo"] = echo
    fabric.break_after = 1
    done = cli("run", "-i", "--name", "box", "debian", "--", "echo", stdin=b"some")
    assert done.code == 125
    assert "the connection to box is lost" in done.err
    assert "sandloom attach box" in done.err


def test_detached_prints_the_name(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["three"] = three
    assert cli.ok("run", "-d", "--name", "box", "debian", "--", "three") == "box\n"


def test_detached_returns_once_the_program_runs(fabric: FakeFabric, cli: Cli) -> None:
    """So that `run -d` and then `exec` works."""
    fabric.programs["waits"] = lambda process: process.signals.get(timeout=10)
    cli.ok("run", "-d", "--name", "box", "debian", "--", "waits")
    (sandbox,) = fabric.sandboxes.values()
    assert sandbox.status.phase == sandboxes_pb2.RUNNING


@pytest.mark.parametrize(
    ("program", "code", "words"), [("nothing", 127, "not found"), ("never-starts", 125, "KernelPanic")]
)
def test_detached_tells_what_did_not_start(fabric: FakeFabric, cli: Cli, program: str, code: int, words: str) -> None:
    done = cli("run", "-d", "--name", "box", "debian", "--", program)
    assert (done.code, done.out) == (code, "box\n")
    assert words in done.err


def test_the_spec_says_what_was_asked(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["three"] = lambda process: 0
    cli.ok(
        "run", "--name", "box", "--class", "user-kernel", "--memory", "128M:2G", "--cpus", "1.5", "--env", "A=b=c",
        "--workdir", "/srv", "--user", "nobody", "--hostname", "host", "--label", "k=v", "--request-id", "once",
        "debian", "--", "three", "-x", "--rm",
    )  # fmt: skip
    request = next(request for name, request in fabric.calls if name == "CreateSandbox")
    assert (request.name, request.request_id, request.spec.image) == ("box", "once", "debian")
    assert request.spec == sandboxes_pb2.SandboxSpec(
        image="debian",
        **{"class": sandboxes_pb2.USER_KERNEL},  # type: ignore[arg-type]
        resources=sandboxes_pb2.Resources(memory_min_mib=128, memory_max_mib=2048, cpu_milli=1500),
        process=sandboxes_pb2.Process(argv=["three", "-x", "--rm"], env={"A": "b=c"}, workdir="/srv", user="nobody"),
        labels={"k": "v"},
        hostname="host",
        restart=sandboxes_pb2.RESTART_NEVER,
        network=sandboxes_pb2.Network(),
        weight=100,
    )


def test_no_room_tells_the_numbers(fabric: FakeFabric, cli: Cli) -> None:
    fabric.failing["CreateSandbox"] = Failure(
        Condition.EXHAUSTED, "NoHostHasRoom", "no host has 900 MiB free", (("most_free_mib", "512"),)
    )
    done = cli("run", "debian", "--", "true")
    assert done.code == 125
    assert "no host has 900 MiB free (most_free_mib=512): ask for less --memory" in done.err


def test_what_is_detached_begins_anew_elsewhere_unless_told_otherwise(fabric: FakeFabric, cli: Cli) -> None:
    fabric.programs["three"] = lambda process: 0
    for options, policy in (
        ((), sandboxes_pb2.RESTART_ON_HOST_LOSS),
        (("--restart", "never"), sandboxes_pb2.RESTART_NEVER),
        (("--rm",), sandboxes_pb2.RESTART_NEVER),
    ):
        fabric.calls.clear()
        cli.ok("run", "-d", *options, "debian", "--", "three")
        request = next(request for name, request in fabric.calls if name == "CreateSandbox")
        assert request.spec.restart == policy


@pytest.mark.parametrize(("offset", "offset_ms"), [("-1d", -86_400_000), ("+3h", 10_800_000)])
def test_a_clock_is_asked_for_by_an_offset(fabric: FakeFabric, cli: Cli, offset: str, offset_ms: int) -> None:
    fabric.programs["three"] = three
    assert cli("run", "--name", "box", "--time-offset", offset, "debian", "--", "three", "-1d").code == 3
    (box,) = fabric.sandboxes.values()
    assert (box.spec.services.time, box.spec.services.time_offset_ms) == (sandboxes_pb2.ANSWER_TOOL, offset_ms)
    assert box.spec.process.argv[-1] == "-1d"


def test_a_clock_that_cannot_be_is_refused_before_anything_is_asked(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("run", "--time-offset", "soon", "debian", "--", "true")
    assert done.code == 125 and "--time-offset cannot be read" in done.err and "2027-01-01" in done.err
    assert fabric.sandboxes == {}
