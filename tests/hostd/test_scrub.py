"""The store is walked again and again, and what rotted is told of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hostd.scrub import keep_scrubbing
from sharedcache.domains import Domain
from sharedcache.errors import CacheError
from sharedcache.objects import FileMeta, ObjectKind
from sharedcache.store import Store

TENANT = Domain.parse("tenant/acme")


class Rounds:
    """A clock that lets `count` walks happen, then stops them."""

    def __init__(self, count: int) -> None:
        self.left, self.slept = count, list[float]()

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.left -= 1
        if self.left < 0:
            raise asyncio.CancelledError


async def walk(store: object, rounds: Rounds) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    with pytest.raises(asyncio.CancelledError):
        await keep_scrubbing(store, 60.0, lambda *event: told.append(event), rounds)  # type: ignore[arg-type]
    return told


async def test_a_blob_that_rotted_is_told_of_once_and_served_no_more(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        whole = store.publish_bytes(b"whole", domain=TENANT, kind=ObjectKind.KERNEL, meta=FileMeta("whole"))
        rots = store.publish_bytes(b"rots!", domain=TENANT, kind=ObjectKind.KERNEL, meta=FileMeta("rots"))
        rots.path.write_bytes(b"rots?")
        told = await walk(store, Rounds(3))
        assert [reason for reason, _ in told] == ["CorruptObject"]
        assert rots.key[:12] in told[0][1]
        assert [item.key for item in store.objects()] == [whole.key]


async def test_a_walk_that_fails_is_tried_again() -> None:
    class Broken:
        def __init__(self) -> None:
            self.walks = 0

        def scrub(self) -> list[str]:
            self.walks += 1
            if self.walks == 1:
                raise CacheError("the disk is away")
            return ["0" * 64]

    store, rounds = Broken(), Rounds(2)
    assert len(await walk(store, rounds)) == 1
    assert (store.walks, rounds.slept) == (2, [60.0, 60.0, 60.0])
