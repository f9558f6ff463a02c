"""Which records the view mirrors, and what is in them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from controlplane import codec, keys
from controlplane.errors import BadState
from controlplane.membership import Member
from controlplane.model import Host, Image, Pool, Residency, Sandbox
from controlplane.store.contract import Record
from controlplane.tenancy import Tenant
from controlplane.usage import Use

log = logging.getLogger("sandloom.controlplane.view")

KINDS: tuple[tuple[str, type], ...] = (
    (keys.SANDBOXES, Sandbox), (keys.HOSTS, Host), (keys.IMAGES, Image), (keys.POOLS, Pool), (keys.MEMBERS, Member),
    (keys.TENANTS, Tenant), (keys.RESIDENCY, Residency), (keys.USES, Use),
)  # fmt: skip
MIRRORED = (*(prefix for prefix, _ in KINDS), keys.ALIVE, keys.QUOTAS)
"""These two have no value: that they are there, and since which revision, is all."""


def parsed(key: str, value: bytes, revision: int) -> object:
    """The value in a mirrored record; None for one that has none. BadState."""
    for prefix, kind in KINDS:
        if key.startswith(prefix):
            return codec.decode(kind, value, key, revision=revision if kind is not Residency else None)
    return None


def parsed_all(records: Iterable[Record]) -> Iterator[tuple[str, object, int]]:
    """(key, value, revision) of each; one bad record is logged, and does not blind the control plane to the others."""
    for record in records:
        try:
            yield record.key, parsed(record.key, record.value, record.mod_revision), record.mod_revision
        except BadState as error:
            log.error("%s", error)
