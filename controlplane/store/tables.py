"""The SQLite engine's blocking half: one file, its tables and every statement. Used by one thread a connection.

    meta(name, value)          schema, revision (the newest), compacted
    history(key, revision, value, created, lease)
                               every kept version of every key; value NULL: removed in that revision
    leases(id, ttl_s)          granted leases; when they run out is kept in memory only (store/sqlite.py)

WAL with synchronous=FULL: a commit is on the disk before it is answered (sqlite.org/pragma.html#pragma_synchronous).
One process at a time: PATH.lock is held with flock while the store is open.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlplane.errors import Conflict, NotFound, OperationError, StoreError
from controlplane.store.contract import Batch, Change, Delete, Expect, Put, Record, Write

SCHEMA = 1
_CREATE = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history(
    key TEXT NOT NULL, revision INTEGER NOT NULL, value BLOB, created INTEGER NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(key, revision)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS history_by_revision ON history(revision);
CREATE INDEX IF NOT EXISTS history_by_lease ON history(lease) WHERE lease != 0;
CREATE TABLE IF NOT EXISTS leases(id INTEGER PRIMARY KEY, ttl_s INTEGER NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('schema', 1), ('revision', 1), ('compacted', 0);
"""
_NEWEST = """NOT EXISTS (SELECT 1 FROM history AS later WHERE later.key = history.key
    AND later.revision > history.revision AND later.revision <= :revision)"""
_LAST_KEY = "\x7f"


@dataclass(frozen=True)
class Transaction:
    """One commit as asked for, or the end of a lease (`revoke`): all its keys go, and it with them."""

    writes: tuple[Write, ...] = ()
    expect: tuple[Expect, ...] = ()
    revoke: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a Transaction: the store's revision afterwards, or why nothing happened."""

    revision: int
    changes: tuple[Change, ...] = ()
    error: OperationError | None = None


def acquire(path: Path) -> int:
    """Takes the store's lock; the descriptor holds it. StoreError when another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError("StoreUnusable", f"store {path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreError("StoreLocked", f"store {path} is in use by another control plane: stop that first") from error
    return descriptor


class Tables:
    """One connection. All methods block; sqlite3.Error passes through to store/sqlite.py, which translates it."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA busy_timeout=5000")
        self._db.executescript(_CREATE)
        schema = self._meta("schema")
        if schema != SCHEMA:
            self._db.close()
            raise StoreError("StoreTooNew", f"store {path} has schema {schema}, this version reads {SCHEMA}: upgrade")

    def close(self) -> None:
        """Closes the connection; the last one folds the WAL into the file."""
        self._db.close()

    def _meta(self, name: str) -> int:
        return int(self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0])

    def bounds(self) -> tuple[int, int]:
        """(newest revision, compacted revision)."""
        return self._meta("revision"), self._meta("compacted")

    def leases(self) -> dict[int, int]:
        """Every granted lease with its ttl."""
        return dict(self._db.execute("SELECT id, ttl_s FROM leases").fetchall())

    # Reads.

    def get(self, key: str) -> Record | None:
        """The key's present record."""
        row = self._db.execute(
            "SELECT key, value, created, revision, lease FROM history WHERE key = ? ORDER BY revision DESC LIMIT 1",
            (key,),
        ).fetchone()
        return None if row is None or row[1] is None else Record(*row)

    def list_at(self, prefix: str, after: str, limit: int, revision: int) -> tuple[list[Record], int, int]:
        """(records, revision they are of, compacted revision), all of one moment."""
        self._db.execute("BEGIN")
        try:
            newest, compacted = self.bounds()
            at = revision or newest
            start, sign = (after, ">") if after >= prefix else (prefix, ">=")
            rows = self._db.execute(
                f"SELECT key, value, created, revision, lease FROM history WHERE key {sign} :start AND key < :end"
                f" AND revision <= :revision AND value IS NOT NULL AND {_NEWEST} ORDER BY key LIMIT :limit",
                {"start": start, "end": prefix + _LAST_KEY, "revision": at, "limit": limit or -1},
            ).fetchall()
            return [Record(*row) for row in rows], at, compacted
        finally:
            self._db.execute("COMMIT")

    def changes(self, prefix: str, after: int, limit: int) -> tuple[list[Batch], int, int]:
        """(whole batches after revision `after`, up to where they reach, compacted revision), about `limit` changes."""
        self._db.execute("BEGIN")
        try:
            newest, compacted = self.bounds()
            rows = self._db.execute(
                "SELECT revision, key, value FROM history WHERE revision > ? AND key >= ? AND key < ?"
                " ORDER BY revision, key LIMIT ?",
                (after, prefix, prefix + _LAST_KEY, limit + 1),
            ).fetchall()
            if len(rows) > limit:  # the last revision may be cut: read it whole
                newest = rows[-1][0]
                rows = [row for row in rows if row[0] < newest]
                rows += self._db.execute(
                    "SELECT revision, key, value FROM history WHERE revision = ? AND key >= ? AND key < ? ORDER BY key",
                    (newest, prefix, prefix + _LAST_KEY),
                ).fetchall()
            return _batches(rows), newest, compacted
        finally:
            self._db.execute("COMMIT")

    # Writes.

    def apply(self, transactions: Sequence[Transaction]) -> list[Outcome]:
        """All of them in order, each with its own revision, in one durable step."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            revision = self._meta("revision")
            outcomes = []
            for transaction in transactions:
                outcome = self._apply_one(transaction, revision)
                revision = outcome.revision
                outcomes.append(outcome)
            self._db.execute("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return outcomes

    def _apply_one(self, transaction: Transaction, revision: int) -> Outcome:
        writes: Sequence[Write] = transaction.writes
        if transaction.revoke:
            writes = [Delete(key) for key in self._keys_under(transaction.revoke, revision)]
            self._db.execute("DELETE FROM leases WHERE id = ?", (transaction.revoke,))
        for expect in transaction.expect:
            found = self.get(expect.key)
            if (found.mod_revision if found else 0) != expect.mod_revision:
                text = f"{expect.key} has changed since it was read: read again and retry"
                return Outcome(revision, error=Conflict("Conflict", text, key=expect.key))
        for lease in {write.lease for write in writes if isinstance(write, Put) and write.lease}:
            if self._db.execute("SELECT 1 FROM leases WHERE id = ?", (lease,)).fetchone() is None:
                return Outcome(revision, error=lease_gone(lease))
        changes = []
        for write in writes:
            before = self.get(write.key)
            row: tuple[str, int, bytes | None, int, int]
            if isinstance(write, Put):
                created = before.create_revision if before else revision + 1
                row = (write.key, revision + 1, write.value, created, write.lease)
                changes.append(Change(write.key, write.value))
            elif before is not None:
                row = (write.key, revision + 1, None, before.create_revision, 0)
                changes.append(Change(write.key, None))
            else:
                continue
            self._db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?)", row)
        return Outcome(revision + 1 if changes else revision, tuple(changes))

    def compact(self, revision: int) -> int:
        """Drops versions that no revision from `revision` on needs; the compacted revision afterwards."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            newest, compacted = self.bounds()
            at = min(revision, newest)
            if at > compacted:
                arguments = {"revision": at}
                self._db.execute("UPDATE meta SET value = :revision WHERE name = 'compacted'", arguments)
                # First what is superseded, then tombstones: the other way round would bring the dead back.
                self._db.execute(f"DELETE FROM history WHERE revision <= :revision AND NOT {_NEWEST}", arguments)
                self._db.execute("DELETE FROM history WHERE revision <= :revision AND value IS NULL", arguments)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return max(at, compacted)

    def grant(self, lease: int, ttl_s: int) -> None:
        """Records a lease."""
        self._db.execute("INSERT INTO leases VALUES (?, ?)", (lease, ttl_s))

    def _keys_under(self, lease: int, revision: int) -> list[str]:
        rows = self._db.execute(
            f"SELECT key FROM history WHERE lease = :lease AND value IS NOT NULL AND {_NEWEST}",
            {"lease": lease, "revision": revision + 1},
        ).fetchall()
        return [key for (key,) in rows]


def lease_gone(lease: int) -> NotFound:
    """The error for a lease that has run out."""
    return NotFound("LeaseGone", f"lease {lease} has run out: grant a new one", lease=lease)


def _batches(rows: Iterable[tuple[int, str, bytes | None]]) -> list[Batch]:
    grouped: dict[int, list[Change]] = {}
    for revision, key, value in rows:
        grouped.setdefault(revision, []).append(Change(key, value))
    return [Batch(revision, tuple(changes)) for revision, changes in grouped.items()]
