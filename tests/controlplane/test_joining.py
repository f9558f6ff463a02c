"""Hosts join by one-time tokens: the key stays on the host, and the token is good once, for a while, for a name."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane import jointokens
from controlplane.api.channel import TlsFiles
from controlplane.api.identity import CONTROLPLANE_SERVER_NAME, Role, serial_of_certificate
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc, sandboxes_pb2, sandboxes_pb2_grpc
from controlplane.ca import Authority, new_request
from controlplane.errors import Denied, Invalid
from controlplane.jointokens import JoinRecord, Ticket, hash_of
from controlplane.server import running
from tests.controlplane.conftest import Certificates, Client, Configured, Plane, planed
from tests.controlplane.fakehost import fake_host

pb = hosts_pb2


def test_a_token_says_what_it_was_made_of_and_nothing_else_is_one() -> None:
    ticket = Ticket("10.0.0.1:7", "ab", "s3cret", "-----BEGIN CERTIFICATE-----\n")
    word = jointokens.encode(ticket)
    assert jointokens.decode(f" {word}\n") == ticket
    for bad in ("", "x", word[:-9], word.removeprefix("sandloom-"), jointokens.PREFIX + "W10"):
        with pytest.raises(Invalid):
            jointokens.decode(bad)


def test_every_reason_to_refuse_a_token_sounds_the_same() -> None:
    record = JoinRecord("ab", hash_of("right"), 100.0, host="h2")
    assert jointokens.require_good(record, "right", "h2", 99.0) is record
    said = set()
    for kept, secret, name, now_s in (
        (None, "right", "h2", 99.0), (record, "wrong", "h2", 99.0),
        (record, "right", "h3", 99.0), (record, "right", "h2", 100.0),
    ):  # fmt: skip
        with pytest.raises(Denied) as caught:
            jointokens.require_good(kept, secret, name, now_s)
        said.add(str(caught.value))
    assert len(said) == 1


@pytest.fixture
async def plane(configured: Configured, certificates: Certificates) -> AsyncIterator[Plane]:
    """A control plane that signs hosts' keys."""
    config = configured(ca_dir=certificates.folder / "ca", join_listen="127.0.0.1:0")
    async with planed(config, certificates) as plane:
        yield plane


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def token(client: Client, **asked: Any) -> Ticket:
    made = await client.hosts.CreateJoinToken(pb.CreateJoinTokenRequest(**asked))
    return jointokens.decode(made.token)


@asynccontextmanager
async def joining(ticket: Ticket) -> AsyncIterator[grpc.aio.Channel]:
    """A channel as a host has it that knows nothing but its token."""
    credentials = grpc.ssl_channel_credentials(root_certificates=ticket.ca_pem.encode())
    options = [("grpc.ssl_target_name_override", CONTROLPLANE_SERVER_NAME)]
    async with grpc.aio.secure_channel(ticket.address, credentials, options=options) as channel:
        yield channel


async def join(ticket: Ticket, name: str, csr_pem: bytes = b"") -> tuple[pb.JoinHostResponse, bytes]:
    """What it gets, and its key."""
    made = new_request(name)
    request = pb.JoinHostRequest(id=ticket.id, secret=ticket.secret, name=name, csr_pem=csr_pem or made.csr_pem)
    async with joining(ticket) as channel:
        return await hosts_pb2_grpc.HostJoinStub(channel).JoinHost(request, timeout=60), made.key_pem


def files(folder: Path, answer: pb.JoinHostResponse, key_pem: bytes) -> TlsFiles:
    folder.mkdir(exist_ok=True)
    tls = TlsFiles(folder / "ca.crt", folder / "host.crt", folder / "host.key")
    for path, content in ((tls.ca, answer.ca_pem), (tls.cert, answer.cert_pem), (tls.key, key_pem)):
        path.write_bytes(content)
    return tls


async def test_a_host_joins_and_serves_with_what_it_got(plane: Plane, tmp_path: Path) -> None:
    client = await plane.client()
    answer, key = await join(await token(client), "h2")
    assert answer.controlplane == plane.address
    async with fake_host("h2", answer.controlplane, files(tmp_path / "h2", answer, key)):
        (host,) = (await client.hosts.ListHosts(pb.ListHostsRequest())).hosts
        assert (host.name, host.state) == ("h2", pb.READY)
    record = json.dumps([r.value.decode() for r in (await plane.parts.store.page("")).records])
    assert "BEGIN" not in record and key.decode().splitlines()[1] not in record


async def test_a_token_is_good_once(plane: Plane) -> None:
    ticket = await token(await plane.client())
    kept = await plane.parts.store.get(f"joins/{ticket.id}")
    assert kept is not None and ticket.secret.encode() not in kept.value
    await join(ticket, "h2")
    assert (await refused(join(ticket, "h3"))).reason == "TokenRefused"
    assert await plane.parts.store.get(f"joins/{ticket.id}") is None


async def test_a_bad_request_does_not_spend_the_token(plane: Plane) -> None:
    ticket = await token(await plane.client())
    assert (await refused(join(ticket, "h2", b"-----BEGIN NONSENSE"))).condition is Condition.INVALID
    assert (await refused(join(ticket, "Not A Name"))).condition is Condition.INVALID
    await join(ticket, "h2")


async def test_a_name_that_is_taken_takes_a_token_of_its_own(plane: Plane, tmp_path: Path) -> None:
    """Then the former certificate counts no more."""
    client = await plane.client()
    first = await join(await token(client), "h2")
    assert (await refused(join(await token(client), "h2"))).condition is Condition.ALREADY_EXISTS
    await plane.host("h1")  # its certificate came by hand
    assert (await refused(join(await token(client), "h1"))).condition is Condition.ALREADY_EXISTS
    again = await join(await token(client, host="h2"), "h2")
    assert (await refused(join(await token(client, host="h9"), "h8"))).reason == "TokenRefused"
    with pytest.raises(grpc.aio.AioRpcError, match="joined anew"):
        async with fake_host("h2", plane.address, files(tmp_path / "old", *first)):
            pass
    async with fake_host("h2", plane.address, files(tmp_path / "new", *again)):
        pass


async def test_a_removed_host_comes_back_by_a_new_token_only(plane: Plane, tmp_path: Path) -> None:
    client = await plane.client()
    first = await join(await token(client), "h2")
    async with fake_host("h2", plane.address, files(tmp_path / "old", *first)) as host:
        await client.hosts.RemoveHost(pb.RemoveHostRequest(name="h2"))
        assert (await refused(host.report())).reason == "HostRemoved"
        again = await join(await token(client), "h2")
        assert (await refused(host.report())).reason == "HostRemoved"
    async with fake_host("h2", plane.address, files(tmp_path / "new", *again)):
        (back,) = (await client.hosts.ListHosts(pb.ListHostsRequest())).hosts
        assert back.state == pb.READY


async def test_nothing_else_is_served_where_hosts_join(plane: Plane) -> None:
    async with joining(await token(await plane.client())) as channel:
        call = sandboxes_pb2_grpc.SandboxesStub(channel).ListSandboxes(sandboxes_pb2.ListSandboxesRequest(), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_without_a_ca_nobody_joins(configured: Configured, certificates: Certificates) -> None:
    async with planed(configured(), certificates) as plane:
        asked = (await plane.client()).hosts.CreateJoinToken(pb.CreateJoinTokenRequest())
        assert (await refused(asked)).reason == "NoAuthority"


async def test_expired_tokens_are_forgotten(plane: Plane) -> None:
    client = await plane.client()
    old, new = await token(client, lifetime_s=1), await token(client)
    plane.parts.joining._now_s = lambda: 4e9
    await plane.parts.joining.drop_expired()
    assert await plane.parts.store.get(f"joins/{old.id}") is None is await plane.parts.store.get(f"joins/{new.id}")
    assert (await refused(client.hosts.CreateJoinToken(pb.CreateJoinTokenRequest(lifetime_s=700_000)))).fields


def test_a_ca_signs_the_key_and_nothing_that_the_request_claims(tmp_path: Path) -> None:
    from controlplane.api.identity import Identity, identity_of_certificate

    authority = Authority.create(tmp_path / "ca")
    signed = authority.sign(new_request("operator admin").csr_pem, Identity(Role.HOST, "h2"))
    assert identity_of_certificate(signed.cert_pem) == Identity(Role.HOST, "h2")
    assert serial_of_certificate(signed.cert_pem) == signed.serial


async def test_a_configuration_with_a_listener_and_no_ca_is_refused(configured: Configured) -> None:
    with pytest.raises(Exception, match="ca_dir"):
        async with running(configured(join_listen="127.0.0.1:0")):
            pass
