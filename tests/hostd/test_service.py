"""HostRuntime over real gRPC and TLS: streams, uploads, who may call, and errors with reason and details."""

from __future__ import annotations

import asyncio
import io
import tarfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc.aio
import pytest
import pytest_asyncio

from controlplane.api.channel import TlsFiles, connect, server_credentials, server_options
from controlplane.api.identity import Role, host_server_name
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, images_pb2, sandboxes_pb2
from hostd.authority import OnlyControlPlane
from hostd.errors import AgentLost, HostdError, ShortOfResources
from hostd.failures import failure_of
from hostd.lifecycle import ENDED, Phase
from hostd.peers import Offers
from hostd.service import Runtime
from hostd.spec import DesiredState, ProcessSpec
from sharedcache.errors import BadArchive, LimitExceeded
from tests.hostd.fakecontrolplane import Certificates, certificates
from tests.hostd.hostkit import Host, running_host, until

Input: TypeAlias = sandboxes_pb2.StreamInput
Output: TypeAlias = sandboxes_pb2.StreamOutput
Start: TypeAlias = sandboxes_pb2.StreamStart
Request: TypeAlias = images_pb2.ImportImageRequest


@dataclass
class Served:
    """A host whose HostRuntime is served, and a control plane's stub to it."""

    host: Host
    address: str
    certs: Certificates
    stub: hosts_pb2_grpc.HostRuntimeAsyncStub
    changes: list[None] = field(default_factory=list)


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    certs = certificates(tmp_path)
    async with running_host(tmp_path) as host:
        changes: list[None] = []
        server = grpc.aio.server(interceptors=[OnlyControlPlane()], options=server_options())
        hosts_pb2_grpc.add_HostRuntimeServicer_to_server(
            Runtime(host.sandboxes, "host-1", lambda: changes.append(None), Offers(host.store, time.monotonic)), server
        )
        port = server.add_secure_port("127.0.0.1:0", server_credentials(certs.of(Role.HOST, "host-1")))
        await server.start()
        address = f"127.0.0.1:{port}"
        async with channel_of(address, certs.of(Role.CONTROLPLANE, "cp-1")) as channel:
            yield Served(host, address, certs, hosts_pb2_grpc.HostRuntimeStub(channel), changes)
        await server.stop(None)


def channel_of(address: str, tls: TlsFiles) -> grpc.aio.Channel:
    return connect(address, tls, server_name=host_server_name("host-1"))


async def inputs(*messages: Input, then: asyncio.Event | None = None) -> AsyncIterator[Input]:
    for message in messages:
        yield message
    if then is not None:
        await then.wait()


def exec_start(*argv: str, **changes: object) -> Input:
    process = sandboxes_pb2.Process(argv=argv, **changes)  # type: ignore[arg-type]
    return Input(start=Start(name="one", exec=process))


def out_of(outputs: Sequence[Output]) -> bytes:
    return b"".join(output.stdout for output in outputs)


async def failure_from(call: object) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:  # type: ignore[attr-defined]
            pass
    return parse_error(error.value)


async def running(served: Served, *argv: str, **changes: object) -> None:
    sandbox = served.host.assign("one", *argv, **changes)
    await until(lambda: sandbox.live is not None or sandbox.record.phase in ENDED)


# Who may call.


@pytest.mark.parametrize(("role", "name"), [(Role.OPERATOR, "root"), (Role.TENANT, "acme"), (Role.HOST, "host-1")])
async def test_only_the_control_plane_may_call(served: Served, role: Role, name: str) -> None:
    async with channel_of(served.address, served.certs.of(role, name)) as channel:
        stub = hosts_pb2_grpc.HostRuntimeStub(channel)
        calls = [
            stub.Attach(inputs()), stub.Exec(inputs()), stub.Logs(sandboxes_pb2.GetLogsRequest(name="one")),
            stub.Import(iter([Request()])),
        ]  # fmt: skip
        for call in calls:
            failure = await failure_from(call)
            assert (failure.condition, failure.reason) == (Condition.DENIED, "NotControlPlane")
            assert f"{role.value} {name}" in failure.message
        for single in (
            stub.ForgetImage(hosts_pb2.ForgetImageRequest()),
            stub.Ledger(sandboxes_pb2.GetSharingLedgerRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await single
            assert parse_error(error.value).reason == "NotControlPlane"


async def test_another_fabrics_control_plane_is_nobody(served: Served, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = certificates(tmp_path / "other").of(Role.CONTROLPLANE, "cp-1")
    async with channel_of(served.address, stranger) as channel:
        failure = await failure_from(
            hosts_pb2_grpc.HostRuntimeStub(channel).Logs(sandboxes_pb2.GetLogsRequest(name="x"))
        )
    assert failure.condition is Condition.UNAVAILABLE  # TLS itself refuses


# Exec.


async def test_exec_with_input_output_and_exit(served: Served) -> None:
    await running(served, "sleep")
    call = served.stub.Exec(
        inputs(exec_start("cat", stdin=True), Input(stdin=b"hel"), Input(stdin=b"lo"), Input(stdin_eof=True))
    )
    outputs = [output async for output in call]
    assert outputs[0].started
    assert out_of(outputs) == b"hello"
    assert (outputs[-1].exit.code, outputs[-1].exit.signal) == (0, 0)
    assert all(output.time_unix_ns > 0 for output in outputs if output.stdout)
    assert list(served.host.fake.machines["one"].processes) == [1]  # its record in the guest is freed


async def test_exec_takes_environment_from_main_and_signals_and_windows(served: Served) -> None:
    await running(served, process=ProcessSpec(argv=("sleep",), env=(("A", "main"),)))
    outputs = [output async for output in served.stub.Exec(inputs(exec_start("env", env={"B": "exec"})))]
    assert b"A=main\n" in out_of(outputs)
    assert b"B=exec\n" in out_of(outputs)
    sized = served.stub.Exec(
        inputs(
            exec_start("size", tty=True, stdin=True, tty_rows=3, tty_cols=4),
            Input(window=sandboxes_pb2.WindowSize(rows=50, cols=70)),
            Input(signal=0), Input(signal=999),  # none that there is: passed over
            Input(stdin=b"x"),
        )
    )  # fmt: skip
    assert b"50 70" in out_of([output async for output in sized])
    killed = served.stub.Exec(inputs(exec_start("sleep"), Input(signal=9)))
    assert [output.exit.code async for output in killed][-1] == 137


@pytest.mark.parametrize(("argv", "code"), [("no-such", 127), ("/etc/passwd", 126)])
async def test_exec_of_what_cannot_run_is_an_exit_not_an_error(served: Served, argv: str, code: int) -> None:
    await running(served, "sleep")
    outputs = [output async for output in served.stub.Exec(inputs(exec_start(argv)))]
    assert [output.exit.code for output in outputs] == [code]
    assert argv in outputs[0].exit.message


async def test_a_client_that_goes_away_takes_its_exec_with_it(served: Served) -> None:
    await running(served, "sleep")
    machine = served.host.fake.machines["one"]
    forever = asyncio.Event()
    for argv in ("sleep", "flood"):  # one that waits, one that is in the middle of its output
        call = served.stub.Exec(inputs(exec_start(argv, "100000000"), then=forever))
        assert (await anext(aiter(call))).started
        await until(lambda: len(machine.processes) == 2)
        call.cancel()
        await until(lambda: list(machine.processes) == [1])


async def test_exec_needs_something_to_run_in_a_sandbox_that_runs(served: Served) -> None:
    assert (await failure_from(served.stub.Exec(inputs(exec_start("true"))))).condition is Condition.NOT_FOUND
    await running(served, "true")
    await until(lambda: served.host.sandboxes.find("one").record.phase is Phase.EXITED)
    failure = await failure_from(served.stub.Exec(inputs(exec_start("true"))))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "NotRunning")
    assert "exited" in failure.message


async def test_a_stream_must_begin_with_its_start(served: Served) -> None:
    for messages in ((), (Input(stdin=b"x"),)):
        failure = await failure_from(served.stub.Exec(inputs(*messages)))
        assert (failure.condition, failure.reason) == (Condition.INVALID, "InvalidSpec")
    await running(served, "sleep")
    assert (await failure_from(served.stub.Exec(inputs(exec_start())))).reason == "NoCommand"


async def test_a_lost_agent_is_unavailable_and_may_be_tried_again(served: Served) -> None:
    await running(served, "sleep")
    served.host.fake.faults.spawn = AgentLost("it does not answer")
    failure = await failure_from(served.stub.Exec(inputs(exec_start("true"))))
    assert (failure.condition, failure.reason, failure.retry_after_s) == (Condition.UNAVAILABLE, "AgentLost", 1.0)


# Attach and logs.


async def test_attach_waits_for_the_start_and_ends_with_the_exit(served: Served) -> None:
    served.host.fake.faults.boot_s = 0.05
    served.host.assign("one", process=ProcessSpec(argv=("cat",), stdin=True))
    start = Input(start=Start(name="one", from_start=True, stdin=True))
    outputs = [output async for output in served.stub.Attach(inputs(start, Input(stdin=b"hi"), Input(stdin_eof=True)))]
    assert outputs[0].started
    assert out_of(outputs) == b"hi"
    assert outputs[-1].WhichOneof("output") == "exit"
    assert outputs[-1].exit.code == 0


async def test_attach_to_a_command_that_is_not_there_gives_127_and_its_words(served: Served) -> None:
    served.host.assign("one", "no-such")
    outputs = [output async for output in served.stub.Attach(inputs(Input(start=Start(name="one", from_start=True))))]
    assert [output.exit.code for output in outputs] == [127]
    assert "no-such" in outputs[0].exit.message


async def test_attach_to_one_that_failed_relays_its_reason(served: Served) -> None:
    served.host.assign("one", image_digest="sha256:" + "e" * 64)
    failure = await failure_from(served.stub.Attach(inputs(Input(start=Start(name="one", from_start=True)))))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "ImageMissing")
    assert "import it" in failure.message


async def test_detaching_leaves_it_running_and_remove_on_exit_waits_for_who_is_there(served: Served) -> None:
    await running(served, process=ProcessSpec(argv=("cat",), stdin=True), remove_on_exit=True)
    sandbox = served.host.sandboxes.find("one")
    forever = asyncio.Event()
    call = served.stub.Attach(inputs(Input(start=Start(name="one", stdin=True)), then=forever))
    assert (await anext(aiter(call))).started
    await until(lambda: sandbox.followers == 1)
    call.cancel()
    await until(lambda: sandbox.followers == 0)
    assert sandbox.record.phase is Phase.RUNNING
    again = served.stub.Attach(
        inputs(Input(start=Start(name="one", from_start=True, stdin=True)), Input(stdin_eof=True))
    )
    assert [output async for output in again][-1].exit.code == 0
    await until(lambda: not served.host.sandboxes.knows("one"))


async def test_logs_with_tail_and_follow(served: Served) -> None:
    await running(served, process=ProcessSpec(argv=("cat",), stdin=True))
    sandbox = served.host.sandboxes.find("one")
    await sandbox.running().main.write(b"1\n2\n3\n")
    await until(lambda: bool(sandbox.log.kept()))

    async def logs(**how: int) -> bytes:
        request = sandboxes_pb2.GetLogsRequest(name="one", **how)  # type: ignore[arg-type]
        return out_of([output async for output in served.stub.Logs(request)])

    assert await logs() == b"1\n2\n3\n"
    assert await logs(tail_lines=1) == b"3\n"
    following = asyncio.create_task(logs(follow=True, tail_lines=2))
    await until(lambda: sandbox.followers == 1)
    await sandbox.running().main.write(b"4\n")
    await sandbox.running().main.close_stdin()
    assert await following == b"2\n3\n4\n"
    assert await logs() == b"1\n2\n3\n4\n"  # after its end, too
    assert (
        await failure_from(served.stub.Logs(sandboxes_pb2.GetLogsRequest(name="two")))
    ).condition is Condition.NOT_FOUND


# Images.


def rootfs(size_bytes: int = 1000) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("etc/motd")
        member.size = size_bytes
        tar.addfile(member, io.BytesIO(b"m" * size_bytes))
    return out.getvalue()


async def upload(archive: bytes, **start: object) -> AsyncIterator[Request]:
    yield Request(start=Request.Start(name="motd", tenant="acme", **start))  # type: ignore[arg-type]
    for at in range(0, len(archive), 1 << 16):
        yield Request(chunk=archive[at : at + (1 << 16)])


async def test_an_upload_becomes_an_image_with_progress(served: Served) -> None:
    archive = rootfs(500_000)
    responses = [each async for each in served.stub.Import(upload(archive, total_bytes=len(archive), cmd=["sleep"]))]
    image = responses[-1].image
    assert image.digest in {record.digest for record in served.host.store.images()}
    assert (list(image.config.cmd), list(image.hosts), image.tenant, image.format) == (
        ["sleep"],
        ["host-1"],
        "acme",
        "rootfs",
    )
    steps = [each.progress.step for each in responses[:-1]]
    assert steps[0] == "receive"
    assert {"receive", "convert", "publish"} <= set(steps)
    assert served.changes == [None]
    assert spooled(served) == []
    again = [each async for each in served.stub.Import(upload(archive, cmd=["sleep"]))]
    assert again[-1].image.digest == image.digest  # idempotent
    sandbox = served.host.assign("one", image_digest=image.digest)
    await until(lambda: sandbox.live is not None)


def spooled(served: Served) -> list[Path]:
    return list(served.host.config.state_dir.glob(".import-*"))


@pytest.mark.parametrize(
    ("archive", "start", "reason"),
    [
        (b"no archive at all" * 100, {}, "BadArchive"),
        (rootfs()[:700], {}, "BadArchive"),
        (rootfs(), {"total_bytes": 99_999}, "InvalidSpec"),
        (rootfs(), {"total_bytes": 1 << 60}, "OutOfSpace"),
    ],
    ids=["garbage", "torn", "short", "huge"],
)
async def test_a_bad_upload_leaves_nothing(
    served: Served, archive: bytes, start: dict[str, object], reason: str
) -> None:
    before = len(served.host.store.objects())
    failure = await failure_from(served.stub.Import(upload(archive, **start)))
    assert failure.reason == reason
    assert len(served.host.store.objects()) == before
    assert spooled(served) == []


async def test_an_upload_by_a_strange_tenant_is_refused(served: Served) -> None:
    async def bad() -> AsyncIterator[Request]:
        yield Request(start=Request.Start(name="x", tenant="../../etc"))

    assert (await failure_from(served.stub.Import(bad()))).condition is Condition.INVALID


async def test_an_upload_whose_client_goes_away_leaves_nothing(served: Served) -> None:
    forever = asyncio.Event()

    async def stalls() -> AsyncIterator[Request]:
        yield Request(start=Request.Start(name="x", tenant="acme"))
        yield Request(chunk=b"x" * 1000)
        await forever.wait()

    call = served.stub.Import(stalls())
    reading = asyncio.ensure_future(anext(aiter(call)))
    await until(lambda: bool(spooled(served)))
    call.cancel()
    await asyncio.wait({reading})
    await until(lambda: spooled(served) == [])


async def test_forgetting_an_image_is_idempotent_and_keeps_what_runs(served: Served) -> None:
    await running(served, "sleep")
    for _ in range(2):
        await served.stub.ForgetImage(hosts_pb2.ForgetImageRequest(digest=served.host.image, tenant="acme"))
    assert served.host.store.images() == []
    assert served.host.sandboxes.find("one").live is not None
    assert any("one" in owner for owner in served.host.store.pins())  # its layers are still held


async def test_the_ledger_names_the_host_and_its_memory(served: Served) -> None:
    await running(served, "sleep")
    ledger = await served.stub.Ledger(sandboxes_pb2.GetSharingLedgerRequest())
    assert [host.host for host in ledger.hosts] == ["host-1"]
    assert ledger.hosts[0].mem_total_bytes > ledger.hosts[0].mem_available_bytes > 0


async def test_a_stopping_sandbox_can_still_be_attached_to(served: Served) -> None:
    await running(served, "polite", "4")
    sandbox = served.host.sandboxes.find("one")
    await until(lambda: bool(sandbox.log.kept()))
    attached = served.stub.Attach(inputs(Input(start=Start(name="one", from_start=True))))
    first = await anext(aiter(attached))
    served.host.want(sandbox, DesiredState.STOPPED)
    outputs = [first, *[output async for output in attached]]
    assert out_of(outputs) == b"ready\nbye\n"
    assert outputs[-1].exit.code == 4


# Failures.


@pytest.mark.parametrize(
    ("error", "condition", "reason", "detail"),
    [
        (ShortOfResources("x", reason="ShortOfMemory"), Condition.EXHAUSTED, "ShortOfMemory", ()),
        (HostdError("x"), Condition.INTERNAL, "HostError", ()),
        (BadArchive("x", where="etc/passwd"), Condition.INVALID, "BadArchive", ("where", "etc/passwd")),
        (LimitExceeded("files", allowed=7), Condition.INVALID, "LimitExceeded", ("allowed", "7")),
        (TimeoutError("late"), Condition.DEADLINE, "TimeoutError", ()),
        (KeyError("bug"), Condition.INTERNAL, "KeyError", ()),
    ],
)
def test_every_error_has_a_condition_a_reason_and_its_numbers(
    error: Exception, condition: Condition, reason: str, detail: tuple[str, str]
) -> None:
    failure = failure_of(error)
    assert (failure.condition, failure.reason) == (condition, reason)
    assert failure.message
    if detail:
        assert failure.detail(detail[0]) == detail[1]
