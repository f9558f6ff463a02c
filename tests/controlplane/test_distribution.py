"""How an image gets to the host that was chosen: who may ask for it, and who is asked to give it."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest

from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import hosts_pb2, images_pb2
from controlplane.edge.hosts import parse_registry_reference
from controlplane.errors import Invalid
from tests.controlplane.conftest import Plane
from tests.controlplane.fakehost import DIGEST

pb = hosts_pb2


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def test_a_host_without_the_image_is_chosen_and_gets_it_from_one_that_has_it(plane: Plane) -> None:
    client, one = await plane.client(), await plane.host("h1")
    await client.import_image()
    two = await plane.host("h2")
    two.images = []
    await two.report()
    await client.hosts.CordonHost(pb.CordonHostRequest(name="h1"))
    box = await client.create("box")
    assert box.assignment.host == "h2"
    asked = pb.LocateImageRequest(host="h2", tenant="default", digest=DIGEST)
    (source,) = (await two.sync.LocateImage(asked, timeout=60)).sources
    assert (source.host, source.address, source.ticket) == ("h1", one.address, "ticket of h1")
    (offer,) = one.offers
    assert (offer.tenant, offer.digest, offer.host) == ("default", DIGEST, "h2")
    report = pb.ReportImageRequest(host="h2", tenant="default", digest=DIGEST)
    for _ in range(2):
        await two.sync.ReportImage(report, timeout=60)
    image = await client.images.GetImage(images_pb2.GetImageRequest(name="base"))
    assert list(image.hosts) == ["h1", "h2"]


async def test_a_host_gets_only_what_is_needed_for_what_it_was_assigned(plane: Plane) -> None:
    client, _, two = await plane.client(), await plane.host("h1"), await plane.host("h2")
    acme = await plane.client(Role.TENANT, "acme")
    await client.import_image()
    asked = pb.LocateImageRequest(host="h2", tenant="default", digest=DIGEST)
    unneeded = await refused(two.sync.LocateImage(asked, timeout=60))
    asked.digest = "sha256:" + "0" * 64
    unknown = await refused(two.sync.LocateImage(asked, timeout=60))
    assert unneeded.condition is unknown.condition is Condition.NOT_FOUND
    assert unneeded.message.replace(DIGEST, "X") == unknown.message.replace(asked.digest, "X")
    report = pb.ReportImageRequest(host="h2", tenant="acme", digest=DIGEST)
    assert (await refused(two.sync.ReportImage(report, timeout=60))).condition is Condition.NOT_FOUND
    other = pb.LocateImageRequest(host="h1", tenant="default", digest=DIGEST)
    assert (await refused(two.sync.LocateImage(other, timeout=60))).reason == "WrongHost"
    assert (await refused(acme.create("box"))).reason == "ImageNotFound"


async def test_an_image_that_no_living_host_has_is_nowhere_to_be_fetched(plane: Plane) -> None:
    client, _, two = await plane.client(), await plane.host("h1"), await plane.host("h2")
    start = images_pb2.ImportImageRequest.Start(name="base", host="h1")
    messages = [images_pb2.ImportImageRequest(start=start), images_pb2.ImportImageRequest(chunk=b"x")]
    async for _answer in client.images.ImportImage(iter(messages), timeout=60):
        pass
    record = await plane.parts.store.get("alive/h1")
    assert record is not None
    await plane.parts.store.revoke_lease(record.lease)
    await two.report()
    box = await client.create("box")
    assert (box.assignment.host, box.status.reason) == ("", "NoHost"), "it waits for h1, which may come back"


async def test_a_pull_goes_to_a_host_and_is_bound_like_an_upload(plane: Plane) -> None:
    host, acme = await plane.host(), await plane.client(Role.TENANT, "acme")
    request = images_pb2.PullImageRequest(reference="r.example:5000/team/app:1.2", name="app", tenant="mallory")
    call: Any = acme.images.PullImage(request, timeout=60)
    answers = [answer async for answer in call]
    assert (answers[-1].image.name, answers[-1].image.tenant) == ("app", "acme")
    (pulled,) = host.pulls
    assert (pulled.reference, pulled.tenant, pulled.host) == ("r.example:5000/team/app:1.2", "acme", "h1")
    assert (await acme.create("box", image="app")).assignment.host == "h1"


@pytest.mark.parametrize(
    "text",
    [
        "app",
        "app:1.2",
        "docker://r.example/app",
        "--help.x/app",
        "r.example/app@sha256:1",
        "r.example/App",
        "r.example/",
    ],
)
def test_what_is_no_reference_to_a_registry_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        parse_registry_reference(text)


def test_references_name_their_registry() -> None:
    for text in ("r.example/app", "127.0.0.1:5000/a/b-c:1.2", "localhost:5000/a", f"r.example/a:1@sha256:{'0' * 64}"):
        assert parse_registry_reference(text) == text
