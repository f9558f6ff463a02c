"""Sharing domains: who may share physical pages with whom.

Promise: an object belongs to exactly one domain, and its key is HMAC-SHA256(domain secret, content digest).
Equal bytes in two domains therefore have unrelated keys, hence two inodes, hence no shared page; and nobody
who lacks a domain's secret can tell from a key which content it names.

Owns `DIR/<kind>@<id>.json`, mode 0600, one for each domain that was ever used:

    {"version": 1, "domain": "tenant/acme", "secret": "<64 hex>", "gid": 900003}

Records are never removed and gids never given again: a blob's group outlives its last object.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sharedcache import durable
from sharedcache.errors import CacheError, NotAllowed

FIRST_GID = 900_000
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SECRET_BYTES = 32


class DomainKind(StrEnum):
    """How far an object may be shared."""

    PRIVATE = "private"
    TENANT = "tenant"
    TRUST_GROUP = "trust-group"
    PUBLIC = "public"


@dataclass(frozen=True, order=True)
class Domain:
    """A sharing domain. `id` is the tenant, sandbox uid or group; it is empty for the one public domain.

    Raises ValueError for an id that is not 1 to 128 of `[A-Za-z0-9._-]`, the first a letter or digit.
    """

    kind: DomainKind
    id: str = ""

    def __post_init__(self) -> None:
        if self.kind is DomainKind.PUBLIC:
            if self.id:
                raise ValueError(f"the public domain has no id, got {self.id!r}")
        elif not _ID.fullmatch(self.id):
            raise ValueError(f"{self.id!r} is no {self.kind} id: use 1 to 128 of A-Z a-z 0-9 . _ -")

    @classmethod
    def parse(cls, text: str) -> Domain:
        """`tenant/acme`, `private/<uid>`, `trust-group/x` or `public`. ValueError for anything else."""
        kind, _, name = text.partition("/")
        if kind not in set(DomainKind) or (kind == DomainKind.PUBLIC and text != kind):
            raise ValueError(f"{text!r} is no sharing domain: use private/ID, tenant/ID, trust-group/ID or public")
        return cls(DomainKind(kind), name)

    @classmethod
    def public(cls) -> Domain:
        """The domain that everybody shares; only what the operator signed goes there."""
        return cls(DomainKind.PUBLIC)

    @classmethod
    def tenant(cls, name: str) -> Domain:
        """The default domain of a tenant's images."""
        return cls(DomainKind.TENANT, name)

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}" if self.id else str(self.kind)


@dataclass(frozen=True)
class DomainRecord:
    """What the host knows of a domain. `secret` never leaves it; `gid` is the group of the domain's blobs."""

    domain: Domain
    secret: bytes
    gid: int

    def __repr__(self) -> str:  # the secret must not reach a log by accident
        return f"DomainRecord({self.domain}, gid={self.gid})"

    def key(self, digest: str) -> str:
        """The key (64 hex) of content `digest` (`sha256:<64 hex>`) in this domain."""
        return hmac.new(self.secret, digest.encode("ascii"), hashlib.sha256).hexdigest()


def next_gid(taken: frozenset[int]) -> int:
    """The gid of the next new domain: one above all that were ever given."""
    return max(taken, default=FIRST_GID - 1) + 1


def require_operator(domain: Domain, operator_signed: bool) -> None:
    """NotAllowed when something unsigned would enter the public domain."""
    if domain.kind is DomainKind.PUBLIC and not operator_signed:
        raise NotAllowed("the public domain takes only what the operator signed; use the tenant's own domain")


class DomainBook:
    """The records of one store. Not thread safe: the store calls it under its lock."""

    def __init__(self, folder: Path) -> None:
        """Reads all records. CacheError when one is damaged: without its secret its objects have no names."""
        self._folder = folder
        self._records: dict[Domain, DomainRecord] = {}
        durable.sweep_parts(folder)
        for path in sorted(folder.glob("*.json")):
            record = _decode(durable.read_json(path), path)
            self._records[record.domain] = record

    def find(self, domain: Domain) -> DomainRecord | None:
        """The record of `domain`, or None when nothing was ever stored in it."""
        return self._records.get(domain)

    def ensure(self, domain: Domain) -> DomainRecord:
        """The record of `domain`; a new one (random secret, next gid) is on disk before it is returned."""
        known = self._records.get(domain)
        if known is not None:
            return known
        gid = next_gid(frozenset(record.gid for record in self._records.values()))
        record = DomainRecord(domain, secrets.token_bytes(_SECRET_BYTES), gid)
        body = {"version": 1, "domain": str(domain), "secret": record.secret.hex(), "gid": gid}
        durable.write_json(self._folder / f"{str(domain).replace('/', '@')}.json", body)
        self._records[domain] = record
        return record


def _decode(body: object, path: Path) -> DomainRecord:
    try:
        match body:
            case {"version": 1, "domain": str(name), "secret": str(secret), "gid": int(gid), **rest} if not rest:
                record = DomainRecord(Domain.parse(name), bytes.fromhex(secret), gid)
                if len(record.secret) == _SECRET_BYTES and gid >= FIRST_GID:
                    return record
    except ValueError:
        pass  # the same answer as for any other damage
    raise CacheError(f"{path}: the domain record is damaged; restore it, or remove the store and import again")
