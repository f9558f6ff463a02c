"""Streams through the control plane: real gRPC and mTLS on both sides, a fake host behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane.api.calls import keep_status
from controlplane.api.identity import Role
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import sandboxes_pb2
from tests.controlplane.conftest import Client, Configured, Plane, planed
from tests.controlplane.fakehost import FakeHost, Inputs, Outputs

Input, Output = sandboxes_pb2.StreamInput, sandboxes_pb2.StreamOutput
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
CHUNK = bytes(32 << 10)


def start(name: str, *argv: str) -> sandboxes_pb2.StreamInput:
    process = sandboxes_pb2.Process(argv=argv or ("cat",), stdin=True)
    return Input(start=sandboxes_pb2.StreamStart(name=name, exec=process, from_start=True))


def opened(method: Any, first: sandboxes_pb2.StreamInput | None = None, timeout_s: float = 20.0) -> Any:
    """A call that is written by hand, or only `first` and then the end of input."""
    return keep_status(method(timeout=timeout_s) if first is None else method(iter([first]), timeout=timeout_s))


async def running_box(plane: Plane) -> tuple[Client, FakeHost, sandboxes_pb2.Sandbox]:
    """A sandbox that its host says runs."""
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box")
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, sandboxes_pb2.RUNNING)
    return client, host, box


async def failure_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return parse_error(caught.value)


async def test_exec_carries_both_directions_the_half_close_and_the_exit(plane: Plane) -> None:
    client, _, box = await running_box(plane)
    call = opened(client.sandboxes.ExecSandbox)
    await call.write(start("box", "cat"))
    seen = [await call.read(), await call.read()]
    assert seen[0].started
    assert seen[1].stderr == box.uid.encode()  # the host is addressed by uid
    for word in (b"one", b"two"):
        await call.write(Input(stdin=word))
        assert (await call.read()).stdout == word
    await call.done_writing()  # no stdin_eof: the half-close alone has to reach the host
    assert (await call.read()).exit.code == 0
    assert await call.read() is EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_every_kind_of_input_reaches_the_host_as_it_is(plane: Plane) -> None:
    client, host, _ = await running_box(plane)
    got: list[sandboxes_pb2.StreamInput] = []

    async def collect(inputs: Inputs, context: Any) -> Outputs:
        async for message in inputs:
            got.append(message)
        yield Output(exit=sandboxes_pb2.ExitStatus(code=7, signal=3, message="so"))

    host.exec = collect
    sent = [
        start("box", "sh"),
        Input(window=sandboxes_pb2.WindowSize(rows=33, cols=101)),
        Input(signal=15),
        Input(stdin=b"\x00\xff"),
        Input(stdin_eof=True),
    ]
    call: Any = client.sandboxes.ExecSandbox(iter(sent), timeout=20)
    outputs = [output async for output in call]
    assert got[1:] == sent[1:]
    assert got[0].start.exec == sent[0].start.exec
    assert outputs == [Output(exit=sandboxes_pb2.ExitStatus(code=7, signal=3, message="so"))]


async def test_a_client_that_does_not_read_stops_the_host_from_writing(plane: Plane) -> None:
    client, host, _ = await running_box(plane)
    sent: list[int] = []

    async def flood(inputs: Inputs, context: Any) -> Outputs:
        while True:
            yield Output(stdout=CHUNK)
            sent.append(len(CHUNK))

    host.exec = flood
    call = opened(client.sandboxes.ExecSandbox, start("box"), 60)
    assert (await call.read()).stdout == CHUNK
    before = -1
    async with asyncio.timeout(20):
        while before != len(sent):  # until nothing more is taken
            before = len(sent)
            await asyncio.sleep(0.3)
    assert sum(sent) < 16 << 20, "the relay buffers without bound"
    for _ in range(before + 50):  # and it goes on as soon as the client reads
        assert (await call.read()).stdout == CHUNK
    call.cancel()


async def test_a_host_that_does_not_read_stops_the_client_from_writing(plane: Plane) -> None:
    client, host, _ = await running_box(plane)
    go_on = asyncio.Event()
    got: list[int] = []

    async def deaf(inputs: Inputs, context: Any) -> Outputs:
        yield Output(started=True)
        await go_on.wait()
        async for message in inputs:
            got.append(len(message.stdin))
        yield Output(exit=sandboxes_pb2.ExitStatus())

    host.exec = deaf
    call = opened(client.sandboxes.ExecSandbox, timeout_s=60)
    await call.write(start("box"))
    assert (await call.read()).started
    written = 0
    with pytest.raises(TimeoutError):
        while written < 1000:
            await asyncio.wait_for(asyncio.shield(writing := asyncio.ensure_future(call.write(Input(stdin=CHUNK)))), 1)
            written += 1
    assert written * len(CHUNK) < 16 << 20
    go_on.set()
    await writing
    await call.done_writing()
    assert (await call.read()).exit.code == 0
    assert sum(got) == (written + 1) * len(CHUNK)  # nothing lost on the way


async def test_a_client_that_goes_away_ends_the_hosts_call(plane: Plane) -> None:
    client, host, _ = await running_box(plane)
    ended = asyncio.Event()

    async def endless(inputs: Inputs, context: Any) -> Outputs:
        try:
            yield Output(started=True)
            await asyncio.Event().wait()
        finally:
            ended.set()

    host.exec = host.attach = endless
    for method in (client.sandboxes.ExecSandbox, client.sandboxes.AttachSandbox):
        ended.clear()
        call = opened(method)
        await call.write(start("box"))
        assert (await call.read()).started
        call.cancel()
        async with asyncio.timeout(5):
            await ended.wait()


async def test_a_client_that_goes_away_while_it_is_flooded_ends_the_hosts_call(plane: Plane) -> None:
    client, host, _ = await running_box(plane)
    ended = asyncio.Event()

    async def flood(inputs: Inputs, context: Any) -> Outputs:
        try:
            while True:
                yield Output(stdout=CHUNK)
        finally:
            ended.set()

    host.exec = flood
    call = opened(client.sandboxes.ExecSandbox, start("box"))
    assert (await call.read()).stdout
    await asyncio.sleep(0)
    call.cancel()
    async with asyncio.timeout(5):
        await ended.wait()


async def test_what_a_host_refuses_comes_back_as_it_is(plane: Plane) -> None:
    client, host, _ = await running_box(plane)

    async def refuse(inputs: Inputs, context: Any) -> Outputs:
        yield Output(started=True)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many processes: 64 of 64")

    host.exec = refuse
    failure = await failure_of(opened(client.sandboxes.ExecSandbox, start("box")))
    assert (failure.condition, failure.message) == (Condition.EXHAUSTED, "too many processes: 64 of 64")
    assert failure.reason


async def test_a_refusal_in_the_middle_of_a_flood_of_input_comes_back_as_it_is(plane: Plane) -> None:
    """grpc.aio alone would tell INTERNAL in many of these, see api/calls.py."""
    client, host, _ = await running_box(plane)

    async def refuse(inputs: Inputs, context: Any) -> Outputs:
        await anext(aiter(inputs))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room: 7 MiB")
        yield Output()

    async def flood() -> AsyncIterator[sandboxes_pb2.StreamInput]:
        yield start("box")
        while True:
            yield Input(stdin=CHUNK[:100])

    host.exec = refuse
    for _ in range(40):
        call: Any = keep_status(client.sandboxes.ExecSandbox(flood(), timeout=20))
        failure = await failure_of(call)
        assert (failure.condition, failure.message) == (Condition.EXHAUSTED, "no room: 7 MiB")


async def test_a_host_that_is_gone_is_named(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client, host, _ = await running_box(plane)
    monkeypatch.setattr("controlplane.relay.CONNECT_DEADLINE_S", 0.3)
    host.address = "127.0.0.1:9"
    await host.report()
    failure = await failure_of(opened(client.sandboxes.ExecSandbox, start("box")))
    assert (failure.condition, failure.reason) == (Condition.UNAVAILABLE, "HostUnreachable")
    assert "h1" in failure.message
    assert failure.retry_after_s


async def test_another_machine_with_the_address_of_a_host_is_not_talked_to(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, host, _ = await running_box(plane)
    monkeypatch.setattr("controlplane.relay.CONNECT_DEADLINE_S", 0.3)
    other = await plane.host("h2")
    host.address = other.address  # h1's name, h2's certificate
    await host.report()
    failure = await failure_of(opened(client.sandboxes.ExecSandbox, start("box")))
    assert failure.reason == "HostUnreachable"


@pytest.mark.parametrize(
    ("messages", "reason", "field"),
    [
        ([Input(stdin=b"x")], "InvalidArgument", "start"),
        ([], "InvalidArgument", "start"),
        ([Input(start=sandboxes_pb2.StreamStart(name="box"))], "NoCommand", "start.exec.argv"),
        ([start("Not A Name")], "InvalidArgument", "start.name"),
        ([start("box"), Input(stdin=bytes((64 << 10) + 1))], "InvalidArgument", "stdin"),
        ([start("box"), start("box")], "InvalidArgument", "start"),
    ],
)
async def test_input_that_is_wrong_is_told_with_its_field(
    plane: Plane, messages: list[sandboxes_pb2.StreamInput], reason: str, field: str
) -> None:
    client, _, _ = await running_box(plane)
    call: Any = keep_status(client.sandboxes.ExecSandbox(iter(messages), timeout=10))
    failure = await failure_of(call)
    assert (failure.condition, failure.reason) == (Condition.INVALID, reason)
    assert [problem.field for problem in failure.fields] == [field]


async def test_exec_in_what_does_not_run_is_refused_with_its_phase(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box")
    failure = await failure_of(opened(client.sandboxes.ExecSandbox, start("box")))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "SandboxNotRunning")
    assert failure.detail("phase") == "scheduled"
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, sandboxes_pb2.EXITED, exit_code=3, reason="Completed")
    failure = await failure_of(opened(client.sandboxes.ExecSandbox, start("box")))
    assert "EXITED" in failure.message
    failure = await failure_of(opened(client.sandboxes.ExecSandbox, start("nobody")))
    assert failure.condition is Condition.NOT_FOUND


async def test_attach_and_logs_wait_until_a_host_has_begun(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box")
    attached = opened(client.sandboxes.AttachSandbox, start("box"))
    logs: Any = client.sandboxes.GetLogs(
        sandboxes_pb2.GetLogsRequest(name="box", follow=True, tail_lines=5), timeout=20
    )
    reading = [asyncio.ensure_future(call.read()) for call in (attached, logs)]
    await host.until(lambda: box.uid in host.assigned)
    assert not any(read.done() for read in reading)
    await host.tell(box.uid, sandboxes_pb2.STARTING)
    first, line = await asyncio.gather(*reading)
    assert first.started
    assert line.stdout == b"line\n"
    assert host.logs_asked == [sandboxes_pb2.GetLogsRequest(name=box.uid, follow=True, tail_lines=5)]


async def test_waiting_for_a_host_has_an_end(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client = (await running_box(plane))[0]
    await client.create("slow")
    monkeypatch.setattr(plane.parts.locator, "_begin_deadline_s", 0.2)
    failure = await failure_of(opened(client.sandboxes.AttachSandbox, start("slow")))
    assert (failure.condition, failure.reason) == (Condition.DEADLINE, "NotBegun")
    assert "SCHEDULED" in failure.message


async def test_logs_that_are_not_followed_do_not_wait_for_a_host(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    plane.parts.view.alive.discard(host.name)  # as if its lease had run out: the sandbox waits for a host
    await client.create("box")
    logs: Any = client.sandboxes.GetLogs(sandboxes_pb2.GetLogsRequest(name="box"), timeout=60)
    failure = await failure_of(logs)
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "NotBegun")
    assert "waiting for a host" in failure.message


async def test_waiting_ends_when_the_sandbox_is_removed(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    box = await client.create("box")
    call = opened(client.sandboxes.AttachSandbox, start("box"))
    reading = asyncio.ensure_future(call.read())
    await host.until(lambda: box.uid in host.assigned)
    await client.sandboxes.DeleteSandbox(sandboxes_pb2.DeleteSandboxRequest(name="box", force=True))
    await host.until(lambda: host.assigned[box.uid].desired_state == sandboxes_pb2.DESIRED_REMOVED)
    await host.tell(box.uid, sandboxes_pb2.EXITED, removed=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reading
    assert parse_error(caught.value).reason == "SandboxRemoved"


async def test_attach_to_what_was_stopped_before_it_ran_tells_how_it_ended(
    plane: Plane, configured: Configured
) -> None:
    client = await plane.client()
    host = await plane.host()
    await client.import_image()
    plane.parts.view.alive.discard(host.name)  # as if its lease had run out: the sandbox waits for a host
    box = await client.create("box")
    assert box.status.phase == sandboxes_pb2.PENDING
    await client.sandboxes.StopSandbox(sandboxes_pb2.StopSandboxRequest(name="box"))
    outputs = [output async for output in opened(client.sandboxes.AttachSandbox, start("box"))]
    assert [output.exit.code for output in outputs] == [137]
    logs: Any = client.sandboxes.GetLogs(sandboxes_pb2.GetLogsRequest(name="box"), timeout=10)
    assert [output async for output in logs] == []


async def test_a_tenant_reaches_only_its_own_sandboxes(plane: Plane) -> None:
    _, _, box = await running_box(plane)
    acme = await plane.client(Role.TENANT, "acme")
    for name in ("box", box.uid):
        for method in (acme.sandboxes.ExecSandbox, acme.sandboxes.AttachSandbox):
            assert (await failure_of(opened(method, start(name)))).condition is Condition.NOT_FOUND
        logs: Any = acme.sandboxes.GetLogs(sandboxes_pb2.GetLogsRequest(name=name), timeout=10)
        assert (await failure_of(logs)).condition is Condition.NOT_FOUND


async def test_stopping_the_control_plane_tells_open_streams_so(configured: Configured, certificates: Any) -> None:
    stopping = asyncio.Event()

    async def serve(ready: asyncio.Future[tuple[Any, Any]]) -> None:
        async with planed(configured(), certificates) as plane:
            client, host, _ = await running_box(plane)

            async def endless(inputs: Inputs, context: Any) -> AsyncIterator[sandboxes_pb2.StreamOutput]:
                yield Output(started=True)
                await asyncio.Event().wait()

            host.exec = endless
            exec_call = opened(client.sandboxes.ExecSandbox)
            await exec_call.write(start("box"))
            assert (await exec_call.read()).started
            watch: Any = client.sandboxes.WatchSandboxes(sandboxes_pb2.WatchSandboxesRequest(), timeout=30)
            await watch.read()
            plane.keep_clients()
            ready.set_result((exec_call, watch))
            await stopping.wait()

    ready: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(ready))
    calls = await ready
    stopping.set()
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not EOF:
                pass
        failure = parse_error(caught.value)
        assert (failure.condition, failure.reason) == (Condition.UNAVAILABLE, "ServerStopping")
    async with asyncio.timeout(10):
        await serving


async def test_the_ledger_joins_all_hosts_and_hides_what_is_not_ones_own(plane: Plane) -> None:
    client, host, box = await running_box(plane)
    other = await plane.host("h2")
    for one, uid in ((host, box.uid), (other, "ffff")):
        one.ledger = sandboxes_pb2.SharingLedger(
            sandboxes=[sandboxes_pb2.SandboxMemory(uid=uid, host=one.name, resident_bytes=10)],
            hosts=[sandboxes_pb2.HostMemory(host=one.name, distinct_bytes=7)],
        )
    asked = sandboxes_pb2.GetSharingLedgerRequest()
    ledger = await client.sandboxes.GetSharingLedger(asked)
    assert [(row.uid, row.host) for row in ledger.sandboxes] == [(box.uid, "h1"), ("ffff", "h2")]
    assert [row.host for row in ledger.hosts] == ["h1", "h2"]
    one_host = await client.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(host="h2"))
    assert [row.uid for row in one_host.sandboxes] == ["ffff"]
    acme = await plane.client(Role.TENANT, "acme")
    assert await acme.sandboxes.GetSharingLedger(asked) == sandboxes_pb2.SharingLedger()
    mine = await (await plane.client(Role.TENANT, "default")).sandboxes.GetSharingLedger(asked)
    assert [row.uid for row in mine.sandboxes] == [box.uid]
    assert list(mine.hosts) == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(host="h9"))
    assert parse_error(caught.value).reason == "HostNotFound"


async def test_what_a_lost_host_holds_is_said_to_be_missing(plane: Plane) -> None:
    client = (await running_box(plane))[0]
    plane.parts.view.alive.discard("h1")
    ledger = await client.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(), timeout=60)
    assert list(ledger.lost_hosts) == ["h1"] and not ledger.hosts
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(host="h1"), timeout=60)
    failure = parse_error(caught.value)
    assert (failure.condition, failure.reason) == (Condition.UNAVAILABLE, "HostLost")


async def test_a_ledger_names_the_host_that_does_not_answer_to_those_who_may_know_it(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = (await running_box(plane))[0]
    other = await plane.host("h2")
    monkeypatch.setattr("controlplane.relay.CONNECT_DEADLINE_S", 0.3)
    other.address = "127.0.0.1:9"
    await other.report()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(), timeout=20)
    failure = parse_error(caught.value)
    assert (failure.condition, failure.reason) == (Condition.UNAVAILABLE, "HostUnreachable")
    assert "h2" in failure.message
    mine = await plane.client(Role.TENANT, "default")  # nothing of its own is on h2: it is not asked
    await mine.sandboxes.GetSharingLedger(sandboxes_pb2.GetSharingLedgerRequest(), timeout=20)
