"""Tenants: their records, their quotas, their trust, and that one learns nothing of another."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import hosts_pb2, images_pb2, sandboxes_pb2, tenants_pb2
from controlplane.errors import Exhausted
from controlplane.model import Checkpoint, Resources, Sandbox, SandboxSpec
from controlplane.quotas import Quota, require_checkpoint_within
from controlplane.tenancy import Tenant
from tests.controlplane.conftest import Client, Configured, Plane, planed
from tests.controlplane.fakehost import DIGEST

pb = tenants_pb2


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def create(client: Client, name: str, **quota: Any) -> pb.Tenant:
    return await client.tenants.CreateTenant(pb.CreateTenantRequest(name=name, quota=pb.Quota(**quota)))


async def test_a_tenant_is_created_changed_listed_and_removed(plane: Plane) -> None:
    client = await plane.client()
    made = await create(client, "acme", sandboxes=3)
    assert (made.name, made.quota.sandboxes, made.trusted) == ("acme", 3, False)
    assert (await refused(create(client, "acme"))).condition is Condition.ALREADY_EXISTS
    listed = await client.tenants.ListTenants(pb.ListTenantsRequest(page_size=1))
    assert [tenant.name for tenant in listed.tenants] == ["acme"]
    rest = await client.tenants.ListTenants(pb.ListTenantsRequest(page_token=listed.next_page_token))
    assert [(tenant.name, tenant.trusted) for tenant in rest.tenants] == [("default", True)]
    changed = await client.tenants.UpdateTenant(
        pb.UpdateTenantRequest(name="acme", quota=pb.Quota(images=2), trusted=True, etag=made.etag)
    )
    assert changed.trusted and changed.quota.images == 2 and not changed.quota.HasField("sandboxes")
    stale = pb.UpdateTenantRequest(name="acme", etag=made.etag)
    assert (await refused(client.tenants.UpdateTenant(stale))).condition is Condition.CONFLICT
    await client.tenants.DeleteTenant(pb.DeleteTenantRequest(name="acme"))
    gone = pb.DeleteTenantRequest(name="acme")
    assert (await refused(client.tenants.DeleteTenant(gone))).reason == "TenantNotFound"
    gone.allow_missing = True
    await client.tenants.DeleteTenant(gone)


async def test_a_certificate_counts_only_while_its_tenant_is_recorded(plane: Plane) -> None:
    operator, acme = await plane.client(), await plane.client(Role.TENANT, "acme")
    await acme.sandboxes.ListSandboxes(sandboxes_pb2.ListSandboxesRequest())
    await operator.tenants.DeleteTenant(pb.DeleteTenantRequest(name="acme"))
    failure = await refused(acme.sandboxes.ListSandboxes(sandboxes_pb2.ListSandboxesRequest()))
    assert (failure.condition, failure.reason) == (Condition.DENIED, "TenantUnknown")
    asked = operator.sandboxes.ListSandboxes(
        sandboxes_pb2.ListSandboxesRequest(), metadata=(("sandloom-tenant", "acme"),)
    )
    assert (await refused(asked)).reason == "TenantNotFound"


async def test_a_tenant_that_holds_something_stays(plane: Plane) -> None:
    await plane.host()
    operator, acme = await plane.client(), await plane.client(Role.TENANT, "acme")
    await acme.import_image()
    failure = await refused(operator.tenants.DeleteTenant(pb.DeleteTenantRequest(name="acme")))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "TenantHolds")
    assert "images base" in failure.message
    default = pb.DeleteTenantRequest(name="default", allow_missing=True)
    assert (await refused(operator.tenants.DeleteTenant(default))).reason == "TenantHolds"


async def test_a_tenant_sees_its_own_record_and_usage_only(plane: Plane) -> None:
    await plane.host()
    acme, other = await plane.client(Role.TENANT, "acme"), await plane.client(Role.TENANT, "other")
    await acme.import_image()
    await acme.create("one", memory_mib=64, max_mib=128)
    mine = await acme.tenants.GetTenant(pb.GetTenantRequest())
    assert (mine.name, mine.usage.sandboxes, mine.usage.memory_min_mib, mine.usage.memory_max_mib) == (
        "acme",
        1,
        64,
        128,
    )
    assert (mine.usage.images, mine.usage.image_mib) == (1, 64)
    existing = await refused(other.tenants.GetTenant(pb.GetTenantRequest(name="acme")))
    missing = await refused(other.tenants.GetTenant(pb.GetTenantRequest(name="nobody")))
    assert existing.condition is missing.condition is Condition.NOT_FOUND
    assert existing.message.replace("acme", "X") == missing.message.replace("nobody", "X")


async def test_what_is_another_tenants_looks_like_what_is_not_there(plane: Plane) -> None:
    """Every method that names a thing answers the same for another's thing, by name and by uid, as for none."""
    await plane.host()
    acme, other = await plane.client(Role.TENANT, "acme"), await plane.client(Role.TENANT, "other")
    image = await acme.import_image()
    box = await acme.create("box-7")
    nothing = "0" * len(box.uid)
    calls: list[tuple[Any, Any, str, str]] = [
        (other.sandboxes.GetSandbox, sandboxes_pb2.GetSandboxRequest, box.uid, nothing),
        (other.sandboxes.GetSandbox, sandboxes_pb2.GetSandboxRequest, "box-7", "nox-7"),
        (other.sandboxes.StopSandbox, sandboxes_pb2.StopSandboxRequest, box.uid, nothing),
        (other.sandboxes.DeleteSandbox, sandboxes_pb2.DeleteSandboxRequest, "box-7", "nox-7"),
        (other.images.GetImage, images_pb2.GetImageRequest, "base", "bass"),
        (other.images.GetImage, images_pb2.GetImageRequest, image.digest, "sha256:" + "f" * 64),
        (other.images.DeleteImage, images_pb2.DeleteImageRequest, "base", "bass"),
    ]
    for method, request, theirs, none in calls:
        one, two = await refused(method(request(name=theirs))), await refused(method(request(name=none)))
        assert one.condition is two.condition is Condition.NOT_FOUND, (method, one, two)
        assert one.message.replace(theirs, "X") == two.message.replace(none, "X")
        assert one.reason == two.reason
    host = sandboxes_pb2.GetSharingLedgerRequest(host="h1")
    assert (await refused(other.sandboxes.GetSharingLedger(host))).reason == "HostNotFound"
    await acme.sandboxes.GetSharingLedger(host)


async def test_only_an_operator_chooses_an_imports_host(plane: Plane) -> None:
    await plane.host()
    acme = await plane.client(Role.TENANT, "acme")
    start = images_pb2.ImportImageRequest.Start(name="base", host="h1")
    call: Any = acme.images.ImportImage(iter([images_pb2.ImportImageRequest(start=start)]), timeout=60)

    async def read() -> None:
        async for _ in call:
            pass

    assert (await refused(read())).reason == "OperatorOnly"


async def test_the_hosts_own_kernel_takes_trust(plane: Plane) -> None:
    host = await plane.host()
    description = host.description
    host.description = lambda: _with_class(description(), sandboxes_pb2.HOST_KERNEL)  # type: ignore[method-assign]
    await host.report()
    operator, acme = await plane.client(), await plane.client(Role.TENANT, "acme")
    for client in (operator, acme):
        await client.import_image()
    spec = sandboxes_pb2.SandboxSpec(image="base", resources=sandboxes_pb2.Resources(memory_min_mib=64))
    setattr(spec, "class", sandboxes_pb2.HOST_KERNEL)
    request = sandboxes_pb2.CreateSandboxRequest(name="bare", spec=spec)
    await operator.sandboxes.CreateSandbox(request)  # the operator's own tenant is trusted
    failure = await refused(acme.sandboxes.CreateSandbox(request))
    assert (failure.condition, failure.reason) == (Condition.DENIED, "TenantNotTrusted")
    await operator.tenants.UpdateTenant(pb.UpdateTenantRequest(name="acme", trusted=True))
    await acme.sandboxes.CreateSandbox(request)


def _with_class(host: hosts_pb2.Host, kind: sandboxes_pb2.SandboxClass.ValueType) -> hosts_pb2.Host:
    host.classes.append(kind)
    return host


async def test_images_are_bounded_by_name_and_by_size(configured: Configured, certificates: Any) -> None:
    config = configured(quotas=(("acme", Quota(images=1)), ("tiny", Quota(image_mib=63))))
    async with planed(config, certificates) as plane:
        host = await plane.host()
        acme, tiny = await plane.client(Role.TENANT, "acme"), await plane.client(Role.TENANT, "tiny")
        await acme.import_image("one")
        await acme.import_image("one")  # bound anew: no more than before
        failure = await refused(acme.import_image("two"))
        assert (failure.condition, failure.detail("quota")) == (Condition.EXHAUSTED, "images")
        assert len(host.imports) == 2, "the refused one was never sent to the host"
        assert (await refused(tiny.import_image())).detail("quota") == "image_mib"
        async with asyncio.timeout(60):
            await plane.parts.view.until(lambda: ("tiny", DIGEST) in host.forgotten or None)  # not kept either


async def test_ceilings_are_bounded(configured: Configured, certificates: Any) -> None:
    async with planed(configured(quotas=(("acme", Quota(memory_max_mib=200)),)), certificates) as plane:
        await plane.host()
        acme = await plane.client(Role.TENANT, "acme")
        await acme.import_image()
        await acme.create("one", memory_mib=64, max_mib=150)
        assert (await refused(acme.create("two", memory_mib=32, max_mib=64))).detail("quota") == "memory_max_mib"
        assert (await acme.create("two", memory_mib=32, max_mib=50)).name == "two"


async def test_a_record_replaces_what_the_configuration_implied(configured: Configured, certificates: Any) -> None:
    async with planed(configured(quotas=(("acme", Quota(sandboxes=1)),)), certificates) as plane:
        client = await plane.client()
        assert (await refused(create(client, "acme"))).condition is Condition.ALREADY_EXISTS
        await client.tenants.UpdateTenant(pb.UpdateTenantRequest(name="acme", quota=pb.Quota(sandboxes=2)))
        assert plane.parts.tenants.quota("acme") == Quota(sandboxes=2)
        await client.tenants.DeleteTenant(pb.DeleteTenantRequest(name="acme"))
        assert plane.parts.tenants.find("acme") == Tenant("acme", Quota(sandboxes=1))


def test_a_checkpoint_is_counted_at_its_sources_ceiling_before_it_is_taken() -> None:
    spec = SandboxSpec("i", Resources(64, 512, 64, 1000))
    source = Sandbox("s", "u", "acme", spec, 0.0, 1)
    kept = Checkpoint("c", "c", "acme", "h1", "s", "u", spec, (), 300 << 20, 0.1, 0.0)
    require_checkpoint_within(Quota(checkpoint_mib=812), [kept], source)
    require_checkpoint_within(Quota(), [kept], source)
    with pytest.raises(Exhausted, match="it has 300 and asks for 512 more"):
        require_checkpoint_within(Quota(checkpoint_mib=811), [kept], source)
