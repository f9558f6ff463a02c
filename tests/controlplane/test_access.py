"""The table of RPC and roles, held against every method that is served, over the wire with every role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pool, symbol_database

from controlplane import access
from controlplane.api.channel import connect
from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.server import SERVICES
from controlplane.tenancy import Tenant
from tests.controlplane.conftest import Plane

ROLES = (Role.OPERATOR, Role.TENANT, Role.HOST, Role.CONTROLPLANE)


def methods() -> Iterator[Any]:
    """The descriptor of every method that a control plane serves."""
    pool = descriptor_pool.Default()
    for service in SERVICES:
        yield from pool.FindServiceByName(service).methods


def path_of(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def test_the_table_has_every_method_and_no_other() -> None:
    assert sorted(access.TABLE) == sorted(path_of(method) for method in methods())
    assert all(access.TABLE.values())
    assert access.roles_of("/sandloom.v1.Sandboxes/MakeCoffee") == frozenset()


async def outcome(channel: grpc.aio.Channel, method: Any) -> Failure | None:
    """What an empty request gets: its failure, or None when it is answered."""
    request_class: Any = method.input_type._concrete_class
    response_class: Any = method.output_type._concrete_class
    serialize, parse = request_class.SerializeToString, response_class.FromString

    async def one() -> AsyncIterator[Any]:
        yield request_class()

    client_streams, server_streams = method.client_streaming, method.server_streaming
    assert server_streams or not client_streams, "the table of kinds below lacks one"
    call: Any
    try:
        if not server_streams:
            call = channel.unary_unary(path_of(method), serialize, parse)
            await call(request_class(), timeout=60)
        else:
            if client_streams:
                call = channel.stream_stream(path_of(method), serialize, parse)(one(), timeout=60)
            else:
                call = channel.unary_stream(path_of(method), serialize, parse)(request_class(), timeout=60)
            async for _ in call:
                break
            call.cancel()
    except grpc.aio.AioRpcError as error:
        return parse_error(error)
    return None


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.value)
async def test_each_method_serves_the_roles_of_the_table_and_no_other(plane: Plane, role: Role) -> None:
    symbol_database.Default()
    await plane.parts.tenants.create(Tenant("acme"))
    name = {Role.TENANT: "acme", Role.HOST: "h1"}.get(role, "x")
    wrong: list[str] = []
    async with connect(plane.address, plane.certificates.of(role, name)) as channel:
        for method in methods():
            failure = await outcome(channel, method)
            refused = failure is not None and failure.reason == "WrongRole"
            if refused:
                assert failure is not None and failure.condition is Condition.DENIED
            if refused is (role in access.roles_of(path_of(method))):
                wrong.append(f"{path_of(method)}: {failure}")
            assert failure is None or failure.condition is not Condition.INTERNAL, (path_of(method), failure)
    assert wrong == []
