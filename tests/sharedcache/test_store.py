from __future__ import annotations

import os
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharedcache.errors import CacheError, OutOfSpace, StoreBusy
from sharedcache.objects import FileMeta, ObjectKind, StoredObject
from sharedcache.store import Store
from tests.sharedcache.storekit import (
    ACME,
    GLOBEX,
    Clock,
    digest_of,
    layer_meta,
    publish,
    publish_layer,
    tree,
)


def test_published_is_found_again_and_after_reopening(root: Path, clock: Clock) -> None:
    data = os.urandom(3 << 20)
    with Store.open(root, clock=clock, min_free_bytes=0) as store:
        item = publish_layer(store, data)
        assert item.digest == digest_of(data)
        assert item.path.read_bytes() == data
        assert store.get(ACME, item.digest) == item
        gid = store.domain_gid(ACME)
    with Store.open(root, clock=clock, min_free_bytes=0) as store:
        assert store.get(ACME, item.digest) == item
        assert store.objects() == [item]
        assert store.domain_gid(ACME) == gid


def test_modes_let_a_vm_uid_reach_one_blob_and_list_nothing(store: Store, root: Path) -> None:
    previous = os.umask(0o077)  # the store's modes must not depend on it
    try:
        mine, other = publish(store, b"mine", ACME), publish(store, b"other", GLOBEX)
    finally:
        os.umask(previous)
    status = mine.path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o440, 0, store.domain_gid(ACME))
    for folder in [*mine.path.parents][:3]:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o711, folder
    for name in ("domains", "staging", "quarantine", "pins", "images"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o700, name
    for parent in root.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)

    def as_vm(command: str, path: Path) -> int:
        privileges = ["--reuid=899999", f"--regid={status.st_gid}", "--clear-groups"]
        return subprocess.run(["setpriv", *privileges, command, str(path)], capture_output=True).returncode

    assert as_vm("cat", mine.path) == 0
    assert as_vm("cat", other.path) != 0
    assert as_vm("cat", mine.path.with_name("meta.json")) != 0
    assert as_vm("ls", mine.path.parent) != 0
    assert as_vm("ls", root / "objects") != 0


def test_the_same_bytes_are_published_once(store: Store, root: Path) -> None:
    first = publish(store, b"x" * 100)
    inode = first.path.stat().st_ino
    assert publish(store, b"x" * 100) == first
    assert first.path.stat().st_ino == inode
    assert len(store.objects()) == 1
    assert tree(root / "staging") == []


def test_many_threads_publish_the_same_and_different_bytes(store: Store, root: Path) -> None:
    blobs = [os.urandom(200_000) for _ in range(4)]
    gate = threading.Barrier(8)

    def work(n: int) -> StoredObject:
        gate.wait(30)
        return publish(store, blobs[n % 4])

    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(work, range(8)))
    assert len({item.key for item in items}) == 4 == len(store.objects())
    assert items[0] is items[4] or items[0] == items[4]
    assert tree(root / "staging") == []


def test_an_unpublished_blob_leaves_nothing(store: Store, root: Path) -> None:
    with pytest.raises(RuntimeError), store.stage() as staging:
        staging.file.write(b"half")
        raise RuntimeError
    assert tree(root / "staging") == tree(root / "objects") == []


def test_meta_must_fit_the_kind(store: Store) -> None:
    with pytest.raises(ValueError):
        store.publish_bytes(b"x", domain=ACME, kind=ObjectKind.LAYER, meta=FileMeta())
    with pytest.raises(ValueError):
        store.publish_bytes(b"x", domain=ACME, kind=ObjectKind.KERNEL, meta=layer_meta(b"x"))
    with pytest.raises(ValueError, match="bytes"):
        store.publish_bytes(b"xy", domain=ACME, kind=ObjectKind.LAYER, meta=layer_meta(b"x"))
    publish(store, b"kernel")
    with pytest.raises(ValueError, match="kernel"):
        store.publish_bytes(b"kernel", domain=ACME, kind=ObjectKind.INITRAMFS, meta=FileMeta())
    assert len(store.objects()) == 1


def test_a_file_is_copied_in(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "vmlinuz"
    source.write_bytes(os.urandom(5_000_000))
    meta = FileMeta("vmlinuz", "6.1.0-1-cloud-amd64")
    item = store.publish_file(source, domain=ACME, kind=ObjectKind.KERNEL, meta=meta)
    assert item.path.read_bytes() == source.read_bytes()
    assert item.meta == meta
    with pytest.raises(TypeError):
        _ = item.layer


def test_one_store_a_root(store: Store, root: Path) -> None:
    with pytest.raises(StoreBusy, match=f"process {os.getpid()} "):
        Store.open(root)
    store.close()
    store.close()
    with pytest.raises(CacheError, match="closed"):
        publish(store, b"x")
    Store.open(root).close()


def test_import_is_refused_when_it_would_fill_the_disk(root: Path) -> None:
    with (
        Store.open(root, min_free_bytes=1 << 60) as store,
        pytest.raises(OutOfSpace, match=r"\d+ MiB are free, 0 MiB are needed and 1099511627776 MiB must"),
    ):
        publish(store, b"x")
    assert tree(root / "objects") == tree(root / "staging") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def test_a_disk_that_fills_up_while_writing(small_disk: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", small_disk], check=True)
    try:
        for floor_bytes, said in ((8 << 20, "must stay free"), (0, "disk is full|must stay free")):
            with Store.open(small_disk / "store", min_free_bytes=floor_bytes) as store:
                with pytest.raises(OutOfSpace, match=said), store.stage() as staging:
                    for _ in range(64):
                        staging.file.write(bytes(1 << 20))
                assert tree(small_disk / "store" / "staging") == []
                assert publish(store, b"small").size_bytes == 5
    finally:
        subprocess.run(["umount", small_disk], check=True)


def test_garbage_makes_room(small_disk: Path, clock: Clock) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", small_disk], check=True)
    try:
        with Store.open(small_disk / "store", clock=clock, min_free_bytes=1 << 20) as store:
            old = publish(store, b"o" * (16 << 20))
            clock.now_s += 5000
            new = publish(store, b"n" * (20 << 20))
            assert store.objects() == [new]
            assert not old.path.exists()
    finally:
        subprocess.run(["umount", small_disk], check=True)
