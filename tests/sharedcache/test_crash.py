"""kill -9 at every step that changes the disk, and disks that are full at every step: whole, or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sharedcache.errors import OutOfSpace, StoreBusy
from sharedcache.oci import import_archive
from sharedcache.store import Store
from tests.sharedcache.ocikit import OciLayout, layer
from tests.sharedcache.storekit import ACME, Clock, publish, tree
from tests.sharedcache.test_shelf import damage

# Raised by CPython before the call is made: dying at one is dying after the call before it.
CHANGES = frozenset(
    ("os.mkdir", "os.rename", "os.chmod", "os.chown", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
)


def dies_at(step: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a process of its own that is killed at its `step`-th change. False: it ended before."""
    child = os.fork()
    if child == 0:
        try:
            arm(step)
            action()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def arm(step: int) -> None:
    """Kill this process at its `step`-th change, and around every fsync."""
    left = step
    real_fsync = os.fsync

    def change() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            change()

    def fsync(fd: Any) -> None:
        change()
        real_fsync(fd)

    os.fsync = fsync
    sys.addaudithook(watch)


def check(store: Store, root: Path) -> None:
    """The store is whole: what it shows can be had, what images need is there, and nothing lies about."""
    assert tree(root / "staging") == []
    assert not [name for name in tree(root) if name.endswith(".part")]
    for item in store.objects():
        assert store.get(item.domain, item.digest).path.stat().st_size == item.size_bytes
    on_disk = {path.name for path in (root / "objects").glob("??/*")}
    assert on_disk == {item.key for item in store.objects()}
    for image in store.images():
        assert all(store.get(image.domain, stored.digest) for stored in image.layers)


def steps(root: Path, clock: Clock, prepare: Callable[[], None], action: Callable[[Store], object]) -> Iterator[Store]:
    """The store as reopened after a kill at step 0, 1, 2 … of `action`, and at last after all of it."""

    def whole() -> None:
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            action(store)

    step, killed = 0, True
    while killed:
        prepare()
        killed = dies_at(step, whole)
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            check(store, root)
            yield store
        step += 1
    assert step > 3, "the kill was never injected"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    layout = OciLayout()
    return layout.index(layout.image([layer("a", "b"), layer("c", content=b"c" * 9000)])).to_tar(tmp_path / "image.tar")


@pytest.mark.slow
def test_an_import_killed_at_any_step(root: Path, clock: Clock, tmp_path: Path, image: Path) -> None:
    with Store.open(tmp_path / "other", min_free_bytes=0) as other:
        expected = import_archive(other, image, domain=ACME).digest
    states = set()

    def prepare() -> None:
        subprocess.run(["rm", "-rf", str(root)], check=True, timeout=30)

    for store in steps(root, clock, prepare, lambda store: import_archive(store, image, domain=ACME)):
        states.add((len(store.objects()), len(store.images())))
        if not store.images():  # what was published for nothing is garbage, once it is old
            clock.now_s += 100_000
            store.collect()
            assert store.objects() == []
        assert import_archive(store, image, domain=ACME).digest == expected
        check(store, root)
    assert states == {(0, 0), (1, 0), (2, 0), (2, 1)}


@pytest.mark.slow
def test_a_removal_killed_at_any_step(root: Path, clock: Clock, image: Path) -> None:
    states = set()

    def prepare() -> None:
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            import_archive(store, image, domain=ACME)
            clock.now_s += 100_000

    def remove(store: Store) -> None:
        store.forget_image(ACME, store.images()[0].digest)
        clock.now_s += 100_000  # the child's own
        store.collect()

    for store in steps(root, clock, prepare, remove):
        states.add((len(store.objects()), len(store.images())))
    assert states == {(2, 1), (2, 0), (1, 0), (0, 0)}


def test_pins_killed_at_any_step(root: Path, clock: Clock) -> None:
    keys: list[str] = []
    states = set()

    def prepare() -> None:
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            keys[:] = [publish(store, b"%d" % number).key for number in range(2)]
            store.unpin("sandbox/1")
            store.pin("sandbox/1", keys[:1])

    def change(store: Store) -> None:
        store.pin("sandbox/1", keys)
        store.unpin("sandbox/1")

    for store in steps(root, clock, prepare, change):
        states.add(frozenset(store.pins().get("sandbox/1", ())))
    assert states == {frozenset(keys[:1]), frozenset(keys), frozenset()}


def test_a_quarantine_killed_at_any_step(root: Path, clock: Clock) -> None:
    """A kill between finding and moving a bad object leaves it to be found again; it is never served."""
    data = os.urandom(5000)

    def prepare() -> None:
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            damage(publish(store, data))

    def whole() -> None:
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            store.scrub()

    step, killed = 0, True
    while killed:
        prepare()
        killed = dies_at(step, whole)
        with Store.open(root, clock=clock, min_free_bytes=0) as store:
            store.scrub()
            assert store.objects() == []
        step += 1
    assert step > 1


def test_two_processes(root: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with Store.open(root, min_free_bytes=0):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    assert os.read(ready[0], 1) == b"x"
    with pytest.raises(StoreBusy, match=rf"process {child} has this store open; stop it or wait"):
        Store.open(root, min_free_bytes=0)
    os.kill(child, signal.SIGKILL)  # and a lock does not outlive its holder
    os.waitpid(child, 0)
    Store.open(root, min_free_bytes=0).close()
    for fd in (*ready, *done):
        os.close(fd)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty tmpfs with the options given, in place of the one before."""
    at = tmp_path / "disk"
    at.mkdir()
    mounted: list[Path] = []

    def again(options: str) -> Path:
        if mounted:
            subprocess.run(["umount", str(at)], check=True, timeout=30)
            mounted.clear()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], check=True, timeout=30)
        mounted.append(at)
        return at

    yield again
    if mounted:
        subprocess.run(["umount", str(at)], check=True, timeout=30)


@pytest.mark.parametrize("scarce", ["nr_inodes", "nr_blocks"])
def test_a_disk_that_is_full_at_any_step(
    mount: Callable[[str], Path], image: Path, scarce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every creation and every page written fails once, with nobody having looked how much is free."""
    monkeypatch.setattr(Store, "require_space", lambda self, need_bytes: None)
    failed = imported = 0
    for amount in range(2, 60):
        root = mount(f"{scarce}={amount}") / "store"
        try:
            store = Store.open(root, min_free_bytes=0)
        except OutOfSpace:
            continue
        with store:
            try:
                import_archive(store, image, domain=ACME)
                imported += 1
            except OutOfSpace as error:
                assert "free" in str(error) and "retry" in str(error)
                failed += 1
                assert store.images() == []
            check(store, root)
        with Store.open(root, min_free_bytes=0) as store:
            check(store, root)
        if imported == 3:
            break
    assert failed > 3 and imported == 3
