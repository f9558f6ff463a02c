from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcache.domains import FIRST_GID, Domain, DomainBook, DomainKind, next_gid
from sharedcache.errors import CacheError, NotAllowed, NotFound
from sharedcache.objects import FileMeta, ObjectKind
from sharedcache.store import Store
from tests.sharedcache.storekit import ACME, GLOBEX, Clock, publish

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)


@given(st.sampled_from(sorted(set(DomainKind) - {DomainKind.PUBLIC})), IDS)
def test_text_and_value_agree(kind: DomainKind, name: str) -> None:
    domain = Domain(kind, name)
    assert Domain.parse(str(domain)) == domain


def test_the_public_domain_has_no_id() -> None:
    assert Domain.parse("public") == Domain.public()
    assert str(Domain.public()) == "public"


@pytest.mark.parametrize(
    "text",
    ["", "tenant", "tenant/", "tenant/a/b", "tenant/..", "tenant/.", "tenant/a b", "tenant/a\n", "public/",
     "public/x", "Tenant/a", "tenant/" + "a" * 129, "trust_group/a", "tenant/a\0"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Domain.parse(text)


def test_secret_and_gid_outlive_the_process(tmp_path: Path) -> None:
    first = DomainBook(tmp_path).ensure(ACME)
    book = DomainBook(tmp_path)
    assert book.find(ACME) == first
    assert book.ensure(ACME) == first
    assert book.find(GLOBEX) is None
    second = book.ensure(GLOBEX)
    assert (first.gid, second.gid) == (FIRST_GID, FIRST_GID + 1)
    assert first.secret != second.secret
    assert first.secret.hex() not in repr(first)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_gids_are_never_given_twice() -> None:
    assert next_gid(frozenset()) == FIRST_GID
    assert next_gid(frozenset({FIRST_GID, FIRST_GID + 7})) == FIRST_GID + 8


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version":1}', b"\xff", b"[" * 100_000])
def test_a_damaged_record_stops_the_store(root: Path, damage: bytes) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        publish(store, b"kernel")
    (root / "domains" / "tenant@acme.json").write_bytes(damage)
    with pytest.raises(CacheError, match="tenant@acme"):
        Store.open(root, min_free_bytes=0)
    # and it did not keep the lock
    (root / "domains" / "tenant@acme.json").unlink()
    Store.open(root, min_free_bytes=0).close()


def test_a_short_secret_is_damage(tmp_path: Path) -> None:
    DomainBook(tmp_path).ensure(ACME)
    path = tmp_path / "tenant@acme.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"secret": "00"}))
    with pytest.raises(CacheError):
        DomainBook(tmp_path)


def test_two_domains_never_share_an_inode(store: Store) -> None:
    data = os.urandom(10_000)
    first, second = publish(store, data, ACME), publish(store, data, GLOBEX)
    assert first.digest == second.digest
    assert first.key != second.key
    assert first.path.stat().st_ino != second.path.stat().st_ino
    assert first.path.stat().st_nlink == second.path.stat().st_nlink == 1
    assert first.path.stat().st_gid != second.path.stat().st_gid


def test_a_domain_cannot_ask_for_what_another_holds(store: Store) -> None:
    item = publish(store, b"secret sauce", ACME)
    with pytest.raises(NotFound):
        store.get(GLOBEX, item.digest)
    assert item.digest[7:] not in str(item.path)


def test_the_key_needs_the_secret(root: Path, tmp_path: Path) -> None:
    keys = set()
    for name in ("one", "two"):
        with Store.open(tmp_path / name, min_free_bytes=0) as store:
            keys.add(publish(store, b"same bytes, same tenant").key)
    assert len(keys) == 2


def test_public_takes_only_what_the_operator_signed(store: Store) -> None:
    with pytest.raises(NotAllowed):
        publish(store, b"kernel", Domain.public())
    assert store.objects() == []
    meta = FileMeta("linux", "6.1")
    item = store.publish_bytes(
        b"kernel", domain=Domain.public(), kind=ObjectKind.KERNEL, meta=meta, operator_signed=True
    )
    assert store.get(Domain.public(), item.digest).meta == meta


def test_the_gate_has_the_last_word(root: Path, clock: Clock) -> None:
    asked: list[tuple[ObjectKind, str]] = []

    def gate(kind: ObjectKind, digest: str) -> bool:
        asked.append((kind, digest))
        return len(asked) > 1

    with Store.open(root, clock=clock, min_free_bytes=0, public_gate=gate) as store:
        publish(store, b"a tenant's own is not asked about")
        assert asked == []
        for refused in (True, False):
            if refused:
                with pytest.raises(NotAllowed, match="sha256:"):
                    _signed(store)
            else:
                _signed(store)
        assert len({digest for _, digest in asked}) == 1
        assert len(store.objects()) == 2


def _signed(store: Store) -> None:
    store.publish_bytes(b"k", domain=Domain.public(), kind=ObjectKind.KERNEL, meta=FileMeta(), operator_signed=True)
