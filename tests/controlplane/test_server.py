"""The server as a process, and its door: the ready line, a clean stop, health and reflection, and who is let in."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from controlplane import server
from controlplane.api.channel import TlsFiles, connect
from controlplane.api.identity import Identity, Role
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import sandboxes_pb2, sandboxes_pb2_grpc
from controlplane.ca import Authority
from tests.controlplane.conftest import Certificates, Plane


def written(folder: Path, tls: TlsFiles, **extra: object) -> Path:
    values = {"listen": "127.0.0.1:0", "store": "sqlite:store.db", "tls_ca": str(tls.ca), "tls_cert": str(tls.cert)}
    values |= {"tls_key": str(tls.key)} | {key: str(value) for key, value in extra.items()}
    path = folder / "controlplane.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


@asynccontextmanager
async def process(config: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A control plane of its own, and the address that its ready line names."""
    command = [sys.executable, "-m", "controlplane.server", "--config", str(config)]
    pipe = asyncio.subprocess.PIPE
    running = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        assert running.stdout is not None
        async with asyncio.timeout(20):
            line = json.loads(await running.stdout.readline())
        assert line == {"ready": True, "address": line["address"]}
        yield running, line["address"]
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def test_the_process_says_when_it_is_ready_and_stops_cleanly(tmp_path: Path, certificates: Certificates) -> None:
    config = written(tmp_path, certificates.of(Role.CONTROLPLANE, "cp"))
    for signo in (signal.SIGTERM, signal.SIGINT):
        async with process(config) as (running, address), connect(address, certificates.of(Role.OPERATOR, "op")) as way:
            stub: Any = sandboxes_pb2_grpc.SandboxesStub(way)
            watch = stub.WatchSandboxes(sandboxes_pb2.WatchSandboxesRequest(), timeout=20)
            assert (await watch.read()).kind == sandboxes_pb2.SandboxEvent.BOOKMARK
            running.send_signal(signo)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
            assert parse_error(caught.value).reason == "ServerStopping", caught.value
            async with asyncio.timeout(10):
                assert await running.wait() == 0
    assert (tmp_path / "store.db").exists()  # relative to the configuration file


def test_what_it_cannot_start_on_is_one_line(
    tmp_path: Path, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    tls = certificates.of(Role.CONTROLPLANE, "cp")
    cases: list[tuple[Callable[[], Path], str]] = [
        (lambda: written(tmp_path, tls, colour="blue"), "unknown key 'colour'"),
        (lambda: written(tmp_path, tls, listen="127.0.0.1:1:2"), "HOST:PORT"),
        (lambda: written(tmp_path, tls, tls_key=tmp_path / "none.key"), "none.key"),
        (lambda: tmp_path / "missing.toml", "missing.toml"),
    ]
    for make, text in cases:
        assert server.main(["--config", str(make())]) == 1
        error = capsys.readouterr().err
        assert text in error
        assert len(error.strip().splitlines()) == 1


def test_a_taken_address_is_told(
    tmp_path: Path, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        config = written(tmp_path, certificates.of(Role.CONTROLPLANE, "cp"), listen=listen)
        assert server.main(["--config", str(config)]) == 1
    assert f"cannot listen on {listen}" in capsys.readouterr().err


async def test_health_and_reflection_are_served(plane: Plane) -> None:
    client = await plane.client()
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "sandloom.v1.Sandboxes", "sandloom.v1.HostSync"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflected: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in reflected.ServerReflectionInfo(iter([asked]), timeout=10)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"sandloom.v1.Sandboxes", "sandloom.v1.Images", "sandloom.v1.Hosts", "grpc.health.v1.Health"} <= names


async def test_nobody_without_a_certificate_of_this_fabric_is_let_in(
    plane: Plane, certificates: Certificates, tmp_path: Path
) -> None:
    ours = certificates.of(Role.OPERATOR, "op")
    theirs = Authority.create(tmp_path / "ca").issue_files(Identity(Role.OPERATOR, "op"), tmp_path)
    strangers = [
        grpc.ssl_channel_credentials(ours.ca.read_bytes()),
        grpc.ssl_channel_credentials(ours.ca.read_bytes(), theirs.key.read_bytes(), theirs.cert.read_bytes()),
    ]
    options = [("grpc.ssl_target_name_override", "controlplane.sandloom")]
    for credentials in strangers:
        async with grpc.aio.secure_channel(plane.address, credentials, options=options) as channel:
            stub: Any = sandboxes_pb2_grpc.SandboxesStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListSandboxes(sandboxes_pb2.ListSandboxesRequest(), timeout=5)
            assert parse_error(caught.value).condition in (Condition.UNAVAILABLE, Condition.DEADLINE)
    async with grpc.aio.insecure_channel(plane.address) as channel:
        stub = sandboxes_pb2_grpc.SandboxesStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ListSandboxes(sandboxes_pb2.ListSandboxesRequest(), timeout=5)


async def test_a_call_without_a_deadline_gets_one(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await plane.client()
    plane.parts.gate.unary_deadline_s = 0.05

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(plane.parts.records, "get", never)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.GetSandbox(sandboxes_pb2.GetSandboxRequest(name="box"))
    failure = parse_error(caught.value)
    assert (failure.condition, failure.reason) == (Condition.DEADLINE, "DeadlineExceeded")


async def test_a_bug_is_told_as_one_and_harms_no_other_call(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await plane.client()

    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(plane.parts.records, "get", broken)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.get("box")
        failure = parse_error(caught.value)
        assert (failure.condition, failure.reason) == (Condition.INTERNAL, "InternalError")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.get("box")
    assert parse_error(caught.value).condition is Condition.NOT_FOUND


async def test_a_call_that_grpc_cut_off_beneath_is_told_and_does_not_hang(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await plane.client()

    async def cut(*_: object) -> None:
        raise asyncio.CancelledError  # as grpc.aio does in a task that nobody cancelled

    monkeypatch.setattr(plane.parts.records, "get", cut)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.GetSandbox(sandboxes_pb2.GetSandboxRequest(name="box"), timeout=60)
    failure = parse_error(caught.value)
    assert (failure.condition, failure.reason) == (Condition.UNAVAILABLE, "CutOff")


@pytest.mark.parametrize("method", ["/sandloom.v1.Sandboxes/FoldSandbox", "/sandloom.v9.Sandboxes/GetSandbox"])
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_stream"])
async def test_a_method_that_is_not_there_is_refused_with_details(plane: Plane, method: str, kind: str) -> None:
    call: Any = getattr((await plane.client()).channel, kind)(method)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if kind == "unary_unary":
            await call(b"", timeout=60)
        else:
            request = iter([b""]) if kind == "stream_stream" else b""
            async for _ in call(request, timeout=60):
                pass
    failure = parse_error(caught.value)
    assert (failure.condition, failure.reason) == (Condition.UNIMPLEMENTED, "MethodUnknown")
    assert failure.detail("method") == method


async def test_a_request_that_is_no_message_is_refused_with_details(plane: Plane) -> None:
    channel = (await plane.client()).channel
    calls: list[tuple[Any, str, bool]] = [
        (channel.unary_unary, "GetSandbox", False),
        (channel.unary_stream, "WatchSandboxes", False),
        (channel.stream_stream, "AttachSandbox", True),
    ]
    for make, name, streams in calls:
        call = make(f"/sandloom.v1.Sandboxes/{name}")
        garbage = b"\xff\xff\xff"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            answer = call(iter([garbage]) if streams else garbage, timeout=10)
            await (answer if make == channel.unary_unary else anext(aiter(answer)))
        failure = parse_error(caught.value)
        assert (failure.condition, failure.reason) == (Condition.INVALID, "InvalidArgument"), name
