"""What the store holds: an object is a blob and the record beside it.

`meta.json` (0600) beside each blob:

    {"version": 1, "key", "digest": "sha256:…", "domain", "kind", "size_bytes", "created_at_s",
     "meta": {"type": "layer", …LayerMeta…} | {"type": "file", "name", "release"}}

bytes are hex. Unknown or missing fields make a record damaged, never half understood.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sharedcache.domains import Domain
from sharedcache.layer import LayerMeta

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ObjectKind(StrEnum):
    """What a blob is. A layer is an EROFS image, the others are files for the VMM."""

    LAYER = "layer"
    KERNEL = "kernel"
    INITRAMFS = "initramfs"
    TEMPLATE = "template"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class FileMeta:
    """What there is to know of a kernel, initramfs, template or checkpoint.

    A name and a release for people and lookups.
    """

    name: str = ""
    release: str = ""


ObjectMeta = LayerMeta | FileMeta


@dataclass(frozen=True)
class StoredObject:
    """One published object. `path` is the blob: root:<domain's gid> 0440, immutable, `size_bytes` long."""

    key: str
    digest: str
    kind: ObjectKind
    domain: Domain
    path: Path
    size_bytes: int
    created_at_s: float
    meta: ObjectMeta

    @property
    def layer(self) -> LayerMeta:
        """The layer's own facts. TypeError for another kind of object."""
        if isinstance(self.meta, LayerMeta):
            return self.meta
        raise TypeError(f"object {self.digest} is a {self.kind}, not a layer")


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:` and 64 lowercase hex digits: the one digest form used here."""
    return _DIGEST.fullmatch(text) is not None


def encode(item: StoredObject) -> dict[str, Any]:
    """The JSON form of `item` (without its path)."""
    return {
        "version": 1,
        "key": item.key,
        "digest": item.digest,
        "domain": str(item.domain),
        "kind": str(item.kind),
        "size_bytes": item.size_bytes,
        "created_at_s": item.created_at_s,
        "meta": _encode_meta(item.meta),
    }


def decode(body: object, path: Path) -> StoredObject:
    """The object whose record is `body` and whose blob is `path`. ValueError when the record is damaged."""
    match body:
        case {
            "version": 1,
            "key": str(key),
            "digest": str(digest),
            "domain": str(domain),
            "kind": str(kind),
            "size_bytes": int(size_bytes),
            "created_at_s": int() | float() as created_at_s,
            "meta": dict(meta),
            **rest,
        } if not rest and is_digest(digest) and size_bytes >= 0:
            return StoredObject(
                key,
                digest,
                ObjectKind(kind),
                Domain.parse(domain),
                path,
                size_bytes,
                float(created_at_s),
                _decode_meta(meta),
            )
    raise ValueError("the object's record is damaged")


def _encode_meta(meta: ObjectMeta) -> dict[str, Any]:
    values: dict[str, Any] = {"type": "layer" if isinstance(meta, LayerMeta) else "file"}
    for field in dataclasses.fields(meta):
        value = getattr(meta, field.name)
        values[field.name] = value.hex() if isinstance(value, bytes) else value
    return values


def _decode_meta(values: Mapping[str, Any]) -> ObjectMeta:
    match values.get("type"):
        case "layer":
            return LayerMeta(**_fields(LayerMeta, values))
        case "file":
            return FileMeta(**_fields(FileMeta, values))
    raise ValueError("the object's record has an unknown type of meta")


def _fields(of: type[LayerMeta] | type[FileMeta], values: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: exactly the fields of `of`, each of its type."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(of)}
    if values.keys() - {"type"} != fields.keys():
        raise ValueError("the object's record lacks a field of its meta, or has one too many")
    parsed: dict[str, Any] = {}
    for name, kind in fields.items():
        value = values[name]
        match kind, value:
            case ("str", str()) | ("bool", bool()):
                parsed[name] = value
            case "int", int() if not isinstance(value, bool):
                parsed[name] = value
            case "bytes", str():
                parsed[name] = bytes.fromhex(value)
            case _:
                raise ValueError(f"the object's record has {name} = {value!r}, which is no {kind}")
    return parsed
