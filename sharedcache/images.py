"""Images: an ordered list of layers and how to run them. Values and their JSON form; the store keeps them.

`images/<key>.json`, key = the image digest's key in its domain, so that two domains keep two records:

    {"version": 1, "digest", "domain", "format", "created_at_s",
     "layers": [{"digest", "key", "size_bytes", "source_digest", "volume_uuid"}, …lowest first],
     "config": {"entrypoint": […], "cmd": […], "env": [["K", "V"], …], "workdir", "user"}}
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sharedcache import durable
from sharedcache.domains import Domain
from sharedcache.objects import StoredObject, is_digest

FORMATS = ("oci", "docker", "rootfs")


@dataclass(frozen=True)
class ImageConfig:
    """How an image is run when the user says nothing else. `env` keeps the image's order."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = ""
    user: str = ""


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an image: `digest` and `key` of the blob, `source_digest` of the uncompressed tar."""

    digest: str
    key: str
    size_bytes: int
    source_digest: str
    volume_uuid: bytes

    @classmethod
    def of(cls, item: StoredObject) -> StoredLayer:
        """The layer that `item` is. TypeError when it is no layer."""
        meta = item.layer
        return cls(item.digest, item.key, item.size_bytes, meta.source_digest, meta.volume_uuid)


@dataclass(frozen=True)
class ImageRecord:
    """An image in one domain.

    `layers` lowest first; the same layer may come twice. `format` is one of FORMATS.
    """

    digest: str
    domain: Domain
    layers: tuple[StoredLayer, ...]
    config: ImageConfig
    format: str
    created_at_s: float

    @property
    def size_bytes(self) -> int:
        """Bytes in the store, each distinct blob once."""
        return sum({layer.key: layer.size_bytes for layer in self.layers}.values())

    @property
    def owner(self) -> str:
        """The name under which the image holds its layers in `Store.pins()`."""
        return f"image/{self.domain}/{self.digest}"

    @property
    def keys(self) -> frozenset[str]:
        """The objects that the image needs."""
        return frozenset(layer.key for layer in self.layers)


def image_digest(layer_digests: tuple[str, ...], config: ImageConfig) -> str:
    """`sha256:…` over the canonical JSON of the blobs' digests and the config: equal images, equal digest."""
    body = {"layers": list(layer_digests), "config": _encode_config(config)}
    return "sha256:" + hashlib.sha256(durable.encode(body)).hexdigest()


def encode(image: ImageRecord) -> dict[str, Any]:
    """The JSON form of `image`."""
    return {
        "version": 1,
        "digest": image.digest,
        "domain": str(image.domain),
        "format": image.format,
        "created_at_s": image.created_at_s,
        "layers": [
            {
                "digest": layer.digest,
                "key": layer.key,
                "size_bytes": layer.size_bytes,
                "source_digest": layer.source_digest,
                "volume_uuid": layer.volume_uuid.hex(),
            }
            for layer in image.layers
        ],
        "config": _encode_config(image.config),
    }


def decode(body: object) -> ImageRecord:
    """The image in `body`.

    ValueError when the record is damaged, or its digest is not that of its content.
    """
    match body:
        case {
            "version": 1,
            "digest": str(digest),
            "domain": str(domain),
            "format": str(form),
            "created_at_s": int() | float() as created_at_s,
            "layers": list(layers),
            "config": dict(config),
            **rest,
        } if not rest and form in FORMATS:
            record = ImageRecord(
                digest,
                Domain.parse(domain),
                tuple(_decode_layer(layer) for layer in layers),
                _decode_config(config),
                form,
                float(created_at_s),
            )
            if image_digest(tuple(layer.digest for layer in record.layers), record.config) == digest:
                return record
    raise ValueError("the image's record is damaged")


def _encode_config(config: ImageConfig) -> dict[str, Any]:
    return {
        "entrypoint": list(config.entrypoint),
        "cmd": list(config.cmd),
        "env": [[name, value] for name, value in config.env],
        "workdir": config.workdir,
        "user": config.user,
    }


def _decode_layer(body: object) -> StoredLayer:
    match body:
        case {
            "digest": str(digest),
            "key": str(key),
            "size_bytes": int(size_bytes),
            "source_digest": str(source_digest),
            "volume_uuid": str(volume_uuid),
        } if is_digest(digest):
            return StoredLayer(digest, key, size_bytes, source_digest, bytes.fromhex(volume_uuid))
    raise ValueError("the image's record is damaged: layers")


def _decode_config(body: object) -> ImageConfig:
    match body:
        case {
            "entrypoint": list(entrypoint),
            "cmd": list(cmd),
            "env": list(env),
            "workdir": str(workdir),
            "user": str(user),
        }:
            return ImageConfig(_texts(entrypoint), _texts(cmd), tuple(_pair(p) for p in env), workdir, user)
    raise ValueError("the image's record is damaged: config")


def _texts(values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError("the image's record is damaged: a list of strings")
    return tuple(values)


def _pair(value: object) -> tuple[str, str]:
    match value:
        case [str(name), str(text)]:
            return name, text
    raise ValueError("the image's record is damaged: env")
