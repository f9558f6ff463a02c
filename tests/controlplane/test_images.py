"""Images through the API: import by way of a host, names per tenant, who holds what, and letting go."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from controlplane.api.calls import keep_status
from controlplane.api.identity import Role
from controlplane.api.status import Condition, Failure, parse_error
from controlplane.api.v1 import images_pb2, sandboxes_pb2
from tests.controlplane.conftest import Client, Plane
from tests.controlplane.fakehost import DIGEST, FakeHost, image_of

pb = images_pb2
OTHER = "sha256:" + "c" * 64


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return parse_error(caught.value)


async def ready(plane: Plane) -> tuple[Client, FakeHost]:
    return await plane.client(), await plane.host()


async def told(host: FakeHost, plane: Plane, count: int) -> None:
    """Waits until the host was told to forget `count` images."""
    async with asyncio.timeout(10):
        while len(host.forgotten) < count:
            await plane.parts.view.moved.wait()


async def uploaded(client: Client, messages: list[pb.ImportImageRequest]) -> list[pb.ImportImageResponse]:
    call: Any = keep_status(client.images.ImportImage(iter(messages), timeout=10))
    return [answer async for answer in call]


def upload(name: str, *chunks: bytes, **start: Any) -> list[pb.ImportImageRequest]:
    return [
        pb.ImportImageRequest(start=pb.ImportImageRequest.Start(name=name, **start)),
        *(pb.ImportImageRequest(chunk=chunk) for chunk in chunks),
    ]


async def test_an_import_goes_to_a_host_and_binds_the_name(plane: Plane) -> None:
    client, host = await ready(plane)
    answers = await uploaded(
        client, upload("base", b"ab", b"c" * (1 << 20), total_bytes=5, cmd=["sh", "-l"], tenant="x")
    )
    assert answers[0].progress.step == "receive"
    image = answers[-1].image
    assert (image.name, image.digest, image.tenant, list(image.hosts)) == ("base", DIGEST, "default", ["h1"])
    ((start, size_bytes),) = host.imports
    assert (start.tenant, start.host, start.total_bytes, list(start.cmd)) == ("default", "h1", 5, ["sh", "-l"])
    assert size_bytes == 2 + (1 << 20)
    for name in ("base", DIGEST):
        assert await client.images.GetImage(pb.GetImageRequest(name=name)) == image
    assert list((await client.images.ListImages(pb.ListImagesRequest())).images) == [image]
    assert (await client.create("box", image=DIGEST)).spec.image_digest == DIGEST


async def test_an_import_that_fails_at_the_host_binds_nothing_and_says_why(plane: Plane) -> None:
    client, _ = await ready(plane)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await uploaded(client, upload("base"))
    failure = parse_error(caught.value)
    assert (failure.condition, failure.message) == (Condition.INVALID, "the archive is empty")
    failure = await refused(client.images.GetImage(pb.GetImageRequest(name="base")))
    assert (failure.condition, failure.reason) == (Condition.NOT_FOUND, "ImageNotFound")
    assert "import" in failure.message


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "start"),
        ([pb.ImportImageRequest(chunk=b"x")], "start"),
        (upload(""), "start.name"),
        (upload("Not Allowed"), "start.name"),
        (upload("sha256:abc"), "start.name"),
        (upload("base", bytes((1 << 20) + 1)), "chunk"),
        ([*upload("base"), *upload("base")], "chunk"),
    ],
)
async def test_an_import_that_is_wrong_is_told_with_its_field(
    plane: Plane, messages: list[pb.ImportImageRequest], field: str
) -> None:
    client, _ = await ready(plane)
    failure = await refused(uploaded(client, messages))
    assert failure.condition is Condition.INVALID
    assert [problem.field for problem in failure.fields] == [field]


async def test_without_a_host_an_import_is_told_to_come_again(plane: Plane) -> None:
    client = await plane.client()
    failure = await refused(uploaded(client, upload("base", b"x")))
    assert (failure.condition, failure.reason) == (Condition.UNAVAILABLE, "NoHost"), failure
    assert failure.retry_after_s
    failure = await refused(uploaded(client, upload("base", b"x", host="h9")))
    assert failure.condition is Condition.NOT_FOUND


async def test_an_image_in_use_is_not_removed_and_an_unused_one_is_forgotten_by_its_host(plane: Plane) -> None:
    client, host = await ready(plane)
    await client.import_image()
    box = await client.create("box")
    delete = pb.DeleteImageRequest(name="base")
    failure = await refused(client.images.DeleteImage(delete))
    assert (failure.condition, failure.reason) == (Condition.PRECONDITION, "ImageInUse")
    assert "box" in failure.message
    assert failure.detail("sandboxes") == "box"
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, sandboxes_pb2.EXITED, exit_code=0)
    await client.images.DeleteImage(delete)
    await told(host, plane, 1)
    assert host.forgotten == [("default", DIGEST)]
    assert (await refused(client.images.DeleteImage(delete))).condition is Condition.NOT_FOUND
    await client.images.DeleteImage(pb.DeleteImageRequest(name="base", allow_missing=True))
    assert (await refused(client.create("next"))).reason == "ImageNotFound"


async def test_another_name_of_the_same_digest_keeps_it(plane: Plane) -> None:
    client, host = await ready(plane)
    await client.import_image("one")
    await client.import_image("two")
    await client.create("box", image="one")
    await client.images.DeleteImage(pb.DeleteImageRequest(name="one"))  # `two` still stands for it
    assert (await client.images.GetImage(pb.GetImageRequest(name=DIGEST))).name == "two"
    assert host.forgotten == []


async def test_a_name_bound_anew_leaves_the_old_image_to_its_users_then_lets_it_go(plane: Plane) -> None:
    client, host = await ready(plane)
    await client.import_image()
    box = await client.create("box")
    host.images.append(image_of(OTHER))
    assert (await client.import_image()).digest == OTHER
    assert (await client.create("new")).spec.image_digest == OTHER
    assert host.forgotten == []
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, sandboxes_pb2.EXITED, exit_code=0)
    await told(host, plane, 1)
    assert host.forgotten == [("default", DIGEST)]


async def test_of_equal_images_a_tenant_sees_only_its_own(plane: Plane) -> None:
    client, _ = await ready(plane)
    acme = await plane.client(Role.TENANT, "acme")
    await client.import_image()
    for name in ("base", DIGEST):
        assert (await refused(acme.images.GetImage(pb.GetImageRequest(name=name)))).condition is Condition.NOT_FOUND
    other = await plane.host("h2")
    as_acme = (("sandloom-tenant", "acme"),)  # an operator may choose the host
    call: Any = client.images.ImportImage(iter(upload("base", b"x", host="h2")), timeout=10, metadata=as_acme)
    image = [answer async for answer in call][-1].image
    assert (image.digest, list(image.hosts)) == (DIGEST, ["h2"])  # h1 holds the bytes, but not in acme's domain
    assert other.imports[0][0].tenant == "acme"
    assert (await acme.create("box")).assignment.host == "h2"


async def test_what_a_host_has_lost_is_taken_back(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client, host = await ready(plane)
    await client.import_image()
    await host.report()
    assert list((await client.images.GetImage(pb.GetImageRequest(name="base"))).hosts) == ["h1"]
    kept, host.images = host.images, []
    await host.report()  # written before the import, perhaps: not believed yet
    assert list((await client.images.GetImage(pb.GetImageRequest(name="base"))).hosts) == ["h1"]
    monkeypatch.setattr("controlplane.images.SETTLE_S", -1.0)
    await host.report()
    assert list((await client.images.GetImage(pb.GetImageRequest(name="base"))).hosts) == []
    failure = await refused(client.create("box"))
    assert (failure.condition, failure.detail("hosts_ImageNotResident")) == (Condition.EXHAUSTED, "1")
    host.images = kept


async def test_images_are_listed_in_pages(plane: Plane) -> None:
    client, _ = await ready(plane)
    for name in ("c", "a", "b"):
        await client.import_image(name)
    page = await client.images.ListImages(pb.ListImagesRequest(page_size=2))
    assert [image.name for image in page.images] == ["a", "b"]
    page = await client.images.ListImages(pb.ListImagesRequest(page_size=2, page_token=page.next_page_token))
    assert [image.name for image in page.images] == ["c"]
