"""What only the SQLite engine promises: one process, one file, and nothing acknowledged is lost when it is killed."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.errors import StoreError
from controlplane.store.contract import Put
from controlplane.store.sqlite import open_sqlite

WRITER = """
import asyncio, sys
from pathlib import Path
from controlplane.store.contract import Delete, Put
from controlplane.store.sqlite import open_sqlite

async def write(store, writer):
    i = 0
    while True:
        pair = [Put(f"pair/{writer}/a", str(i).encode()), Put(f"pair/{writer}/b", str(i).encode())]
        revision = await store.commit([*pair, Put(f"all/{writer}/{i:06}", b"")])
        print(writer, i, revision, flush=True)
        i += 1

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        async with asyncio.TaskGroup() as group:
            for writer in range(3):
                group.create_task(write(store, writer))

asyncio.run(main())
"""


def written_until_killed(path: Path, lines: int) -> list[str]:
    """What a writer said that was killed after it had said `lines` lines."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        return told + process.stdout.readlines()


@pytest.mark.parametrize("lines", [1, 20, 101])
async def test_nothing_acknowledged_is_lost_and_nothing_is_half_there_after_kill_9(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "store.db"
    told = await asyncio.to_thread(written_until_killed, path, lines)
    acknowledged = [tuple(int(word) for word in line.split()) for line in told if line.endswith("\n")]
    assert len(acknowledged) >= lines
    async with open_sqlite(path) as store:
        page = await store.page("")
        assert page.revision >= max(revision for _, _, revision in acknowledged)
        there = {record.key: record for record in page.records}
        for writer, i, revision in acknowledged:
            assert there[f"all/{writer}/{i:06}"].mod_revision == revision
        for writer in {writer for writer, _, _ in acknowledged}:
            last = max(int(key.rpartition("/")[2]) for key in there if key.startswith(f"all/{writer}/"))
            values = {there[f"pair/{writer}/{part}"].value for part in "ab"}
            assert values == {str(last).encode()}  # a commit is there whole
        await store.commit([Put("after", b"")])


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with open_sqlite(path):
        code = "import sys; sys.argv = ['', sys.argv[1]]\n" + WRITER
        second = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=30
        )
        assert second.returncode != 0
        assert "in use by another control plane" in second.stderr
        with pytest.raises(StoreError, match="in use"):
            async with open_sqlite(path):
                pass
    async with open_sqlite(path):
        pass


async def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"certainly not a database" * 100)
    with pytest.raises(StoreError, match=r"store\.db"):
        async with open_sqlite(path):
            pass
    assert path.read_bytes() == b"certainly not a database" * 100


async def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with open_sqlite(path):
        pass
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = 99 WHERE name = 'schema'")
    database.close()
    with pytest.raises(StoreError, match="upgrade"):
        async with open_sqlite(path):
            pass


async def test_commits_that_meet_share_one_flush(tmp_path: Path) -> None:
    """Many at once must not take many times as long as one: they go to the disk together."""
    async with open_sqlite(tmp_path / "store.db") as store:
        applied: list[int] = []
        apply = store._apply

        async def counted(transactions):  # type: ignore[no-untyped-def]
            applied.append(len(transactions))
            return await apply(transactions)

        store._apply = counted  # type: ignore[method-assign]
        revisions = await asyncio.gather(*(store.commit([Put(f"k/{i}", b"")]) for i in range(200)))
        assert len(set(revisions)) == 200
        assert len(applied) <= 4, applied


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "store.db") as store:
        pass
    with pytest.raises(StoreError, match="closed"):
        await store.commit([Put("a", b"")])


async def test_a_full_disk_fails_the_commit_and_not_the_store(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "store.db") as store:
        before = await store.commit([Put("a", b"1")])
        database = store._writes._db
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match="full"):
            await store.commit([Put("big", bytes(500_000)), Put("a", b"2")])
        record = await store.get("a")
        assert record is not None and record.mod_revision == before  # nothing of it is there
        database.execute("PRAGMA max_page_count = 1000000")
        assert await store.commit([Put("a", b"2")]) == before + 1
