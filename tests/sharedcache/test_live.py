from __future__ import annotations

from pathlib import Path

import pytest

from sharedcache.errors import CacheError, NotFound
from sharedcache.images import ImageConfig, ImageRecord, StoredLayer, image_digest
from sharedcache.objects import FileMeta, ObjectKind, StoredObject
from sharedcache.store import Store
from tests.sharedcache.storekit import (
    ACME,
    GLOBEX,
    Clock,
    publish,
    publish_layer,
    tree,
)


def image_of(*items: StoredObject) -> ImageRecord:
    config = ImageConfig(("/bin/sh",), ("-c", "true"), (("PATH", "/bin"), ("A", "=b")), "/srv", "1000:0")
    layers = tuple(StoredLayer.of(item) for item in items)
    digest = image_digest(tuple(layer.digest for layer in layers), config)
    return ImageRecord(digest, items[0].domain, layers, config, "oci", 1_700_000_000.5)


def test_one_object_is_removed_at_once_unless_somebody_needs_it(store: Store) -> None:
    pinned, young = publish(store, b"pinned"), publish(store, b"young")
    store.pin("sandbox/1", [pinned.key])
    assert (store.remove(pinned.key), store.remove(young.key), store.remove(young.key)) == (False, True, False)
    assert pinned.path.exists() and not young.path.parent.exists()
    with pytest.raises(NotFound):
        store.get(ACME, young.digest)


def test_gc_takes_only_old_and_unneeded(store: Store, clock: Clock, root: Path) -> None:
    pinned, in_image, garbage = (publish_layer(store, bytes([n]) * 4096) for n in range(3))
    store.pin("sandbox/1", [pinned.key])
    store.put_image(image_of(in_image, in_image))
    assert store.collect() == []  # all are young
    clock.now_s += 4000
    young = publish(store, b"young")
    used = publish(store, b"used")
    clock.now_s += 4000
    store.get(ACME, used.digest)
    publish_layer(store, b"\x02" * 4096)  # published again: somebody is about to use it
    assert store.collect() == [young.key]
    clock.now_s += 4000
    assert sorted(store.collect()) == sorted([garbage.key, used.key])
    assert not garbage.path.exists()
    assert tree(root / "staging") == []
    store.unpin("sandbox/1")
    store.forget_image(ACME, image_of(in_image, in_image).digest)
    assert sorted(store.collect()) == sorted([pinned.key, in_image.key])
    assert list((root / "objects").glob("*/*")) == []


def test_a_hold_keeps_what_an_import_has_published(store: Store, clock: Clock) -> None:
    with store.hold() as hold, store.stage() as staging:
        staging.file.write(b"long import")
        meta = FileMeta()
        item = store.publish(staging, domain=ACME, kind=ObjectKind.KERNEL, meta=meta, hold=hold)
        clock.now_s += 100_000
        assert store.collect() == []
        assert store.pins()[hold] == {item.key}
    assert store.collect() == [item.key]


def test_pins_are_durable_and_add_up(root: Path, clock: Clock) -> None:
    with Store.open(root, clock=clock, min_free_bytes=0) as store:
        one, two = publish(store, b"1"), publish(store, b"2")
        store.pin("sandbox/a", [one.key])
        store.pin("sandbox/a", [two.key])
        store.pin("sandbox/a", [])
        store.pin("sandbox/b:x", [one.key])
        with pytest.raises(NotFound):
            store.pin("sandbox/c", [one.key, "0" * 64])
        for owner in ("", "sandbox", "image/x", "hold/x", "sandbox/../x y", "a/" + "b" * 200):
            with pytest.raises(ValueError):
                store.pin(owner, [one.key])
        expected = {"sandbox/a": {one.key, two.key}, "sandbox/b:x": {one.key}}
        assert store.pins() == expected
    (root / "pins" / "sandbox%2Fq.json.part").write_text("torn")
    with Store.open(root, clock=clock, min_free_bytes=0) as store:
        assert store.pins() == expected
        store.unpin("sandbox/a")
        store.unpin("sandbox/a")
        assert list(store.pins()) == ["sandbox/b:x"]
    assert tree(root / "pins") == ["sandbox%2Fb%3Ax.json"]
    (root / "pins" / "sandbox%2Fb%3Ax.json").write_text("torn")
    with pytest.raises(CacheError, match="pin record"):
        Store.open(root, clock=clock, min_free_bytes=0)


def test_images_are_kept_per_domain_and_pin_their_layers(root: Path) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        mine, theirs = (image_of(publish_layer(store, b"l" * 4096, domain)) for domain in (ACME, GLOBEX))
        assert mine.digest == theirs.digest
        with pytest.raises(NotFound):
            store.put_image(image_of(publish_layer(store, b"m" * 4096), publish_layer(store, b"n", GLOBEX)))
        store.put_image(mine)
        store.put_image(mine)
        with pytest.raises(NotFound):
            store.get_image(GLOBEX, mine.digest)
        store.put_image(theirs)
        store.forget_image(GLOBEX, mine.digest)
        store.forget_image(GLOBEX, mine.digest)
    with Store.open(root, min_free_bytes=0) as store:
        assert store.images() == [mine]
        assert store.get_image(ACME, mine.digest) == mine
        assert store.pins() == {f"image/tenant/acme/{mine.digest}": mine.keys}
        assert mine.size_bytes == 4096
    record = next((root / "images").iterdir())
    record.write_bytes(record.read_bytes().replace(b"/srv", b"/etc"))
    with pytest.raises(CacheError, match="image"):
        Store.open(root, min_free_bytes=0)


def test_quarantine_is_kept_a_week(store: Store, clock: Clock, root: Path) -> None:
    item = publish(store, b"q" * 4096)
    item.path.write_bytes(b"?")
    assert store.scrub() == [item.key]
    clock.now_s += 6 * 86_400
    store.collect()
    assert len(tree(root / "quarantine")) == 3
    clock.now_s += 2 * 86_400
    store.collect()
    assert tree(root / "quarantine") == []
