from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharedcache.errors import CorruptObject, NotFound
from sharedcache.objects import StoredObject
from sharedcache.residency import blob_residency
from sharedcache.store import Store
from tests.sharedcache.storekit import ACME, GLOBEX, Clock, publish, tree


def damage(item: StoredObject) -> None:
    """Flips a byte and puts size and mtime back, as a disk would."""
    before = item.path.stat()
    data = bytearray(item.path.read_bytes())
    data[len(data) // 2] ^= 1
    item.path.write_bytes(data)
    os.utime(item.path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("reopen", [False, True])
def test_a_corrupt_blob_is_quarantined_never_served(root: Path, clock: Clock, reopen: bool) -> None:
    store = Store.open(root, clock=clock, min_free_bytes=0)
    item = publish(store, b"y" * 5000)
    if reopen:
        store.close()
        damage(item)
        store = Store.open(root, clock=clock, min_free_bytes=0)
    else:
        damage(item)
    with store:
        with pytest.raises(CorruptObject, match=item.digest):
            store.get(ACME, item.digest)
        with pytest.raises(NotFound):
            store.get(ACME, item.digest)
        assert not item.path.exists()
        assert [name for name in tree(root / "quarantine") if name.endswith("/blob")]
        again = publish(store, b"y" * 5000)  # fetched again, under the same key
        assert again.key == item.key
        assert store.get(ACME, item.digest).path.read_bytes() == b"y" * 5000


def test_publishing_over_a_corrupt_copy_replaces_it(root: Path) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        item = publish(store, b"z" * 5000)
    damage(item)
    with Store.open(root, min_free_bytes=0) as store:
        assert publish(store, b"z" * 5000).path.read_bytes() == b"z" * 5000
        assert len(tree(root / "quarantine")) == 3


def test_scrub_finds_what_get_would_not_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, gone, link = (publish(store, bytes([n]) * 4096) for n in range(4))
    damage(bad)
    gone.path.unlink()
    link.path.unlink()
    link.path.symlink_to(good.path)
    assert sorted(store.scrub()) == sorted([bad.key, gone.key, link.key])
    assert store.objects() == [good]
    assert store.scrub() == []


def test_a_scrub_leaves_nothing_of_what_it_read_in_the_page_cache(store: Store) -> None:
    item = publish(store, os.urandom(1 << 20))
    with item.path.open("rb") as file:
        os.fsync(file.fileno())  # dirty pages cannot be let go of
    assert item.path.read_bytes()
    assert store.scrub() == []
    assert blob_residency(item).cached_bytes == 0


def test_a_get_hashes_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sharedcache import blobs

    with Store.open(root, min_free_bytes=0) as store:
        item = publish(store, b"w" * 5000)
    measured: list[Path] = []
    real = blobs.measure

    def counted(path: Path, gid: int, *, in_passing: bool = False) -> blobs.Measured:
        measured.append(path)
        return real(path, gid, in_passing=in_passing)

    monkeypatch.setattr(blobs, "measure", counted)
    with Store.open(root, min_free_bytes=0) as store:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: store.get(ACME, item.digest), range(8)))
        assert measured == [item.path]


def test_wrong_owner_or_mode_is_put_right_on_adoption(root: Path) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        item = publish(store, b"v" * 5000)
        gid = store.domain_gid(ACME)
    item.path.chmod(0o666)
    os.chown(item.path, 1, 1)
    with Store.open(root, min_free_bytes=0) as store:
        status = store.get(ACME, item.digest).path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o440, 0, gid)


@pytest.mark.parametrize("text", ["", "{}", '{"version":2}', "[]"])
def test_a_damaged_record_is_quarantined_at_open(root: Path, text: str) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        bad, good = publish(store, b"bad"), publish(store, b"good")
    bad.path.with_name("meta.json").write_text(text)
    with Store.open(root, min_free_bytes=0) as store:
        assert [item.key for item in store.objects()] == [good.key]


def test_an_object_under_a_foreign_key_is_quarantined(root: Path) -> None:
    """A tenant's object moved to another's place would be served as theirs; the key binds it to its domain."""
    with Store.open(root, min_free_bytes=0) as store:
        mine, theirs = publish(store, b"mine", ACME), publish(store, b"theirs", GLOBEX)
    mine.path.with_name("meta.json").write_bytes(theirs.path.with_name("meta.json").read_bytes())
    with Store.open(root, min_free_bytes=0) as store:
        assert [item.key for item in store.objects()] == [theirs.key]
