"""What an image archive says it is: found, read and checked, but nothing converted yet.

Promise: every JSON document but the outermost was hashed before it was believed; every layer's uncompressed
digest is known before its bytes are read, except a plain root filesystem's.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from sharedcache import ociformat
from sharedcache.archive import clean_name
from sharedcache.errors import BadArchive
from sharedcache.images import ImageConfig
from sharedcache.ociformat import MAX_JSON_BYTES, Descriptor
from sharedcache.sources import Source

_MAX_NESTING = 4
_DIGEST_IN_NAME = re.compile(r"(?:blobs/sha256/|sha256:)?([0-9a-f]{64})(?:\.json)?")
_INDEX = "index.json"
_LAYOUT = "oci-layout"
_DOCKER = "manifest.json"


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to be: the member `name` (perhaps compressed), its digest if the archive has it, its diff_id.

    `diff_id` is "" only for a plain root filesystem, whose `name` is "" too: the archive itself.
    """

    name: str
    size_bytes: int
    blob_digest: str = ""
    diff_id: str = ""


@dataclass(frozen=True)
class ImagePlan:
    """An image to be: `format` is one of images.FORMATS, layers lowest first."""

    format: str
    layers: tuple[PlannedLayer, ...]
    config: ImageConfig


def read(source: Source) -> ImagePlan | None:
    """The plan of the image in `source`; None when it holds none: perhaps a root filesystem. BadArchive."""
    if source.has(_LAYOUT) and source.has(_INDEX):
        return _read_oci(source)
    if source.has(_DOCKER):
        return _read_docker(source)
    return None


def _read_oci(source: Source) -> ImagePlan:
    layout = _document(source, _LAYOUT)
    if not isinstance(layout, dict) or layout.get("imageLayoutVersion") != "1.0.0":
        raise BadArchive("is not version 1.0.0 of the OCI image layout", where=_LAYOUT)
    pointer, where = ociformat.choose(_document(source, _INDEX), _INDEX), _INDEX
    for _ in range(_MAX_NESTING):
        if not pointer.is_index:
            break
        where = pointer.name
        pointer = ociformat.choose(_blob_document(source, pointer), where)
    else:
        raise BadArchive(f"indexes are nested more than {_MAX_NESTING} deep", where=where)
    manifest = ociformat.parse_manifest(_blob_document(source, pointer), pointer.name)
    parsed = ociformat.parse_config(_blob_document(source, manifest.config), manifest.config.name)
    layers = manifest.layers
    _require_same_count(len(layers), parsed.diff_ids, manifest.config.name)
    for layer in layers:
        _require_size(source, layer)
    return ImagePlan(
        "oci",
        tuple(
            PlannedLayer(layer.name, layer.size_bytes, layer.digest, diff_id)
            for layer, diff_id in zip(layers, parsed.diff_ids, strict=True)
        ),
        parsed.config,
    )


def _read_docker(source: Source) -> ImagePlan:
    manifest = ociformat.parse_docker_manifest(_document(source, _DOCKER), _DOCKER)
    config_name, *names = (_member(name) for name in (manifest.config, *manifest.layers))
    data = _bytes(source, config_name)
    claimed = _DIGEST_IN_NAME.fullmatch(config_name)
    if claimed and hashlib.sha256(data).hexdigest() != claimed[1]:
        raise BadArchive("its bytes do not have the digest that is its name", where=config_name)
    parsed = ociformat.parse_config(ociformat.parse_json(data, config_name), config_name)
    _require_same_count(len(names), parsed.diff_ids, config_name)
    layers = tuple(
        PlannedLayer(name, source.size_bytes(name), "", diff_id)
        for name, diff_id in zip(names, parsed.diff_ids, strict=True)
    )
    return ImagePlan("docker", layers, parsed.config)


def _member(name: str) -> str:
    clean = clean_name(name)
    if not clean:
        raise BadArchive(f"points at {name!r}, which is no name inside an archive", where=_DOCKER)
    return clean


def _document(source: Source, name: str) -> dict[str, Any] | list[Any]:
    return ociformat.parse_json(_bytes(source, name), name)


def _blob_document(source: Source, pointer: Descriptor) -> dict[str, Any] | list[Any]:
    _require_size(source, pointer)
    data = _bytes(source, pointer.name)
    found = hashlib.sha256(data).hexdigest()
    if f"sha256:{found}" != pointer.digest:
        raise BadArchive(f"its bytes have the digest sha256:{found}, not the one in its name", where=pointer.name)
    return ociformat.parse_json(data, pointer.name)


def _bytes(source: Source, name: str) -> bytes:
    size_bytes = source.size_bytes(name)
    if size_bytes > MAX_JSON_BYTES:
        raise BadArchive(f"is a JSON text of {size_bytes} bytes; {MAX_JSON_BYTES} are allowed", where=name)
    with source.open(name) as file:
        return file.read(MAX_JSON_BYTES)


def _require_size(source: Source, pointer: Descriptor) -> None:
    size_bytes = source.size_bytes(pointer.name)
    if size_bytes != pointer.size_bytes:
        raise BadArchive(f"has {size_bytes} bytes, its descriptor says {pointer.size_bytes}", where=pointer.name)


def _require_same_count(n_layers: int, diff_ids: tuple[str, ...], where: str) -> None:
    if n_layers != len(diff_ids):
        raise BadArchive(f"rootfs has {len(diff_ids)} diff_ids for {n_layers} layers", where=where)
