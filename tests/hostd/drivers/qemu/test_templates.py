"""The book of templates on a real store, with made-up guests: one making a key, back-off, idling, forgetting."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from hostd.drivers.qemu import templateblob
from hostd.drivers.qemu.template import HOT_STARTS, IDLE_S
from hostd.drivers.qemu.templateblob import FrozenGuest, TemplateMemory
from hostd.drivers.qemu.templates import RETRY_S, Templates
from hostd.errors import StartFailed, TemplateUnusable
from hostd.images import domain_of
from sharedcache.objects import ObjectKind
from sharedcache.store import Store
from tests.hostd.hostkit import open_store

RAM_BYTES = 1 << 20
STATE = b"state of devices"
DOMAIN = domain_of("acme")


@dataclass
class Book:
    """Templates whose makings are counted, and may be held up or fail."""

    templates: Templates
    store: Store
    now_s: list[float]
    told: list[tuple[str, str]]
    made: int = 0
    at_once: int = 0
    most_at_once: int = 0
    fails: bool = False
    refuses: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def make(self) -> FrozenGuest:
        self.made += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await self.gate.wait()
        self.at_once -= 1
        if self.fails:
            raise StartFailed("no guest today")
        ram_fd = templateblob.new_ram(RAM_BYTES)
        os.pwrite(ram_fd, b"memory", 8192)
        return FrozenGuest(ram_fd, RAM_BYTES, STATE)

    async def verify(self, memory: TemplateMemory) -> None:
        assert templateblob.is_sealed(memory.ram_fd)
        if self.refuses:
            raise StartFailed("the clone is dumb")

    def want(self, key: str = "k") -> None:
        self.templates.want(key, DOMAIN, "generic", self.make, self.verify)

    async def have(self, key: str = "k") -> None:
        """Wanted and made."""
        self.gate.set()
        self.want(key)
        await self.templates.settle()

    @property
    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.told]


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """No memory file of a template is open afterwards that was not before."""
    before = memory_files()
    yield
    assert memory_files() - before == set()


def memory_files() -> set[str]:
    found: set[str] = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "sandloom-template" in (target := str(entry.readlink())):
                found.add(f"{entry.name} {target}")
    return found


@pytest_asyncio.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    now_s, told = [0.0], list[tuple[str, str]]()
    with no_descriptor_left(), open_store(tmp_path) as store:
        templates = Templates(store, lambda reason, message: told.append((reason, message)), clock=lambda: now_s[0])
        async with templates:
            yield Book(templates, store, now_s, told)


async def test_a_herd_makes_one_template(book: Book) -> None:
    for _ in range(20):
        book.want()
    assert book.templates.ready() == {"k": False}
    waiting = [asyncio.create_task(book.templates.until_made("k")) for _ in range(20)]
    book.gate.set()
    await asyncio.gather(*waiting)
    assert (book.made, book.reasons) == (1, ["TemplateReady"])
    assert book.templates.ready() == {"k": True}
    book.want()
    await book.templates.settle()
    assert book.made == 1


async def test_templates_are_made_one_after_the_other(book: Book) -> None:
    for key in ("a", "b", "c"):
        book.want(key)
    book.gate.set()
    await book.templates.settle()
    assert (book.made, book.most_at_once) == (3, 1)


@pytest.mark.parametrize("part", ["making", "verifying"])
async def test_what_failed_is_tried_again_after_a_while(book: Book, part: str) -> None:
    book.fails, book.refuses = part == "making", part == "verifying"
    await book.have()
    assert book.templates.ready() == {}
    assert book.reasons == ["TemplateFailed"]
    assert "boot cold" in book.told[0][1]
    with pytest.raises(TemplateUnusable):
        await book.templates.take("k")
    book.now_s[0] = RETRY_S - 1
    await book.have()
    assert book.made == 1
    book.fails = book.refuses = False
    book.now_s[0] = RETRY_S
    await book.have()
    assert (book.made, book.templates.ready()) == (2, {"k": True})


async def test_what_is_taken_is_sealed_and_outlives_being_forgotten(book: Book) -> None:
    await book.have()
    with await book.templates.take("k") as mine:
        book.templates.forget("k")  # another clone did not work
        assert os.pread(mine.ram_fd, 6, 8192) == b"memory"
        with pytest.raises(OSError) as refused:
            os.pwrite(mine.ram_fd, b"x", 0)
        assert refused.value.errno == errno.EPERM
        with mine.state_reader() as state_fd:
            assert os.read(state_fd, 100) == STATE


async def test_a_forgotten_template_is_made_anew_after_a_while(book: Book) -> None:
    await book.have()
    book.templates.forget("k")
    assert book.templates.ready() == {}
    await book.have()
    assert book.made == 1
    book.now_s[0] = RETRY_S
    await book.have()
    assert book.made == 2
    book.templates.forget("unknown")


async def test_only_memory_that_nobody_needs_is_dropped_and_it_comes_back(book: Book) -> None:
    await book.have()
    inode = await taken(book)
    book.now_s[0] = IDLE_S * 2
    assert book.templates.drop_idle(pressed=True) == []  # a clone lives
    book.templates.give("k")
    assert book.templates.drop_idle() == []  # it went this moment
    book.now_s[0] += IDLE_S
    assert book.templates.drop_idle() == ["k"]
    assert memory_files() == set()
    assert await taken(book) != inode  # loaded from the store
    book.templates.give("k")
    assert book.templates.drop_idle(pressed=True) == ["k"]


async def taken(book: Book) -> int:
    """Takes it, as whole as it was made; the memory file's inode."""
    with await book.templates.take("k") as memory:
        assert os.pread(memory.ram_fd, 6, 8192) == b"memory"
        return os.fstat(memory.ram_fd).st_ino


async def test_the_next_hostd_finds_it_in_the_store(book: Book) -> None:
    await book.have()
    async with Templates(book.store, lambda *_: None) as next_one:
        assert next_one.ready() == {"k": True}
        with await next_one.take("k") as memory:
            assert os.pread(memory.ram_fd, 6, 8192) == b"memory"


async def test_a_damaged_blob_is_told_and_made_anew(book: Book) -> None:
    await book.have()
    book.templates.drop_idle(pressed=True)
    [stored] = [each for each in book.store.objects() if each.kind is ObjectKind.TEMPLATE]
    os.truncate(stored.path, stored.size_bytes - 1)
    with pytest.raises(TemplateUnusable, match="made anew"):
        await book.templates.take("k")
    assert book.templates.ready() == {}
    await book.have()
    assert book.made == 2
    await taken(book)


async def test_a_process_that_maps_no_template_is_not_adopted(book: Book) -> None:
    await book.have()
    book.templates.drop_idle(pressed=True)
    await book.templates.adopt("k", 1)
    await book.templates.adopt("unknown", os.getpid())
    assert memory_files() == set()
    await taken(book)  # from the store, then


async def test_the_end_in_the_middle_of_a_making_leaves_nothing(tmp_path: Path) -> None:
    with no_descriptor_left(), open_store(tmp_path) as store:
        async with Templates(store, lambda *_: None) as templates:
            book = Book(templates, store, [0.0], [])
            book.want("a")
            book.want("b")
            await asyncio.sleep(0)
        assert [each for each in store.objects() if each.kind is ObjectKind.TEMPLATE] == []


async def test_an_image_is_hot_once_it_was_started_often(book: Book) -> None:
    assert [book.templates.note_start("image") for _ in range(HOT_STARTS)] == [False] * (HOT_STARTS - 1) + [True]
    assert book.templates.note_start("other") is False
