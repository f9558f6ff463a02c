"""Values and small builders that the store's tests share."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sharedcache.domains import Domain
from sharedcache.layer import LayerMeta
from sharedcache.objects import FileMeta, ObjectKind, StoredObject
from sharedcache.store import Store

ACME = Domain.tenant("acme")
GLOBEX = Domain.tenant("globex")


class Clock:
    """Time that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


def publish(store: Store, data: bytes, domain: Domain = ACME) -> StoredObject:
    """`data` as a kernel: the store does not look inside."""
    return store.publish_bytes(data, domain=domain, kind=ObjectKind.KERNEL, meta=FileMeta("k", "1"))


def publish_layer(store: Store, data: bytes, domain: Domain = ACME) -> StoredObject:
    return store.publish_bytes(data, domain=domain, kind=ObjectKind.LAYER, meta=layer_meta(data))


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer_meta(data: bytes) -> LayerMeta:
    """The meta of a layer whose blob is `data`."""
    return LayerMeta(digest_of(b"tar of " + data), b"u" * 16, len(data), 1, 1, 0, 0, 0, 5)


def tree(folder: Path) -> list[str]:
    """Every path below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
