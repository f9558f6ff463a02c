"""The JSON of OCI images and of docker archives: pure parsing into values, every field checked.

Sources: OCI Image Format Specification 1.1 (image-layout, index, manifest, config, descriptor) and the
"docker save" format (moby, image/spec v1.2). Unknown fields are allowed, as both say; unknown media types of
what is to be unpacked are not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sharedcache.errors import BadArchive
from sharedcache.images import ImageConfig
from sharedcache.objects import is_digest

MAX_JSON_BYTES = 4 << 20  # the specification's own bound for manifests
MAX_LAYERS = 127  # docker's
PLATFORM = ("linux", "amd64")

_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
_TAG = "org.opencontainers.image.ref.name"
_ATTESTATION = {"vnd.docker.reference.type": "attestation-manifest"}  # BuildKit's: says something of an image, is none
_ONE_ONLY = "export the one you want by itself (skopeo copy, docker save NAME:TAG)"
_FOREIGN = (
    "application/vnd.oci.image.layer.nondistributable.",
    "application/vnd.docker.image.rootfs.foreign.",
)


@dataclass(frozen=True)
class Descriptor:
    """Points at a blob. `platform` is (os, architecture, variant), None when the index does not say.

    `tag` is what an index calls it; `attests`: it is a document about another image.
    """

    media_type: str
    digest: str
    size_bytes: int
    platform: tuple[str, str, str] | None = None
    tag: str = ""
    attests: bool = False

    @property
    def name(self) -> str:
        """The blob's member name in an OCI layout."""
        return f"blobs/sha256/{self.digest.removeprefix('sha256:')}"

    @property
    def is_index(self) -> bool:
        """Whether it points at a further index."""
        return self.media_type in _INDEX_TYPES


@dataclass(frozen=True)
class Manifest:
    """An image's config and layers, lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True)
class DockerManifest:
    """The same in a docker archive: member names."""

    config: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ParsedConfig:
    """An image config: how to run it, and the digests of its uncompressed layers, lowest first."""

    config: ImageConfig
    diff_ids: tuple[str, ...]


def parse_json(data: bytes, where: str) -> dict[str, Any] | list[Any]:
    """The object or list in `data`.

    BadArchive for anything else, doubled keys and unbounded nesting included.
    """
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadArchive(f"is not the JSON it should be: {why[:200]}", where=where) from error
    if not isinstance(body, dict | list):
        raise BadArchive("is JSON, but no object", where=where)
    return body


def choose(body: object, where: str) -> Descriptor:
    """The one index or manifest in an index that fits PLATFORM, under however many tags.

    BadArchive when there is none, or several.
    """
    index = _object(body, where)
    entries = [_descriptor(item, where) for item in _list(index, "manifests", where)]
    known = [item for item in entries if item.media_type in _INDEX_TYPES + _MANIFEST_TYPES and not item.attests]
    exact = [item for item in known if item.platform is not None and item.platform[:2] == PLATFORM]
    plain = [item for item in exact if item.platform is not None and not item.platform[2]] or exact[:1]
    chosen = {item.digest: item for item in plain or [item for item in known if item.platform is None]}
    if not chosen:
        there = ", ".join(sorted({_platform_text(item) for item in entries})) or "nothing"
        raise BadArchive(f"has no image for {'/'.join(PLATFORM)}, only {there}", where=where)
    if len(chosen) > 1:
        raise BadArchive(_several(len(chosen), [item.tag for item in chosen.values()]), where=where, remedy=_ONE_ONLY)
    return next(iter(chosen.values()))


def parse_manifest(body: object, where: str) -> Manifest:
    """The image manifest in `body`. BadArchive."""
    manifest = _object(body, where)
    media_type = manifest.get("mediaType", _MANIFEST_TYPES[0])
    if media_type not in _MANIFEST_TYPES or "manifests" in manifest:  # CVE-2021-41190: one document, two readings
        raise BadArchive(f"says that it is {media_type!r}, not an image manifest", where=where)
    config = _descriptor(manifest.get("config"), where)
    if config.media_type not in _CONFIG_TYPES:
        raise BadArchive(f"is no container image: its config is {config.media_type!r}", where=where)
    layers = tuple(_descriptor(item, where) for item in _list(manifest, "layers", where))
    _require_count(len(layers), where)
    for layer in layers:
        if layer.media_type.startswith(_FOREIGN):
            remedy = "export the image with all its layers inside"
            raise BadArchive(f"layer {layer.digest} is foreign: its bytes are elsewhere", where=where, remedy=remedy)
        if layer.media_type not in _LAYER_TYPES:
            raise BadArchive(f"layer {layer.digest} is {layer.media_type!r}, which is no layer known here", where=where)
    return Manifest(config, layers)


def parse_docker_manifest(body: object, where: str) -> DockerManifest:
    """The one image in a docker archive's manifest.json, under however many tags. BadArchive; also for several."""
    if not isinstance(body, list) or not body:
        raise BadArchive("is no list of images", where=where)
    found: dict[DockerManifest, list[str]] = {}
    for item in body:
        image = _object(item, where)
        config = image.get("Config")
        layers = _list(image, "Layers", where)
        if not isinstance(config, str) or not all(isinstance(layer, str) for layer in layers):
            raise BadArchive("Config and Layers are not member names", where=where)
        _require_count(len(layers), where)
        tags = image.get("RepoTags")
        found.setdefault(DockerManifest(config, tuple(layers)), []).extend(tags if isinstance(tags, list) else [])
    if len(found) > 1:
        tags = [tag for named in found.values() for tag in named]
        raise BadArchive(_several(len(found), tags), where=where, remedy=_ONE_ONLY)
    return next(iter(found))


def parse_config(body: object, where: str) -> ParsedConfig:
    """The image config in `body`. BadArchive; its platform must be PLATFORM where it says one."""
    config = _object(body, where)
    platform = (config.get("os") or PLATFORM[0], config.get("architecture") or PLATFORM[1])
    if platform != PLATFORM:
        remedy = f"export the image for {'/'.join(PLATFORM)}"
        raise BadArchive(f"the image is for {platform[0]}/{platform[1]}", where=where, remedy=remedy)
    rootfs = _object(config.get("rootfs"), f"{where}: rootfs")
    diff_ids = _list(rootfs, "diff_ids", where)
    if not all(isinstance(item, str) and is_digest(item) for item in diff_ids):
        raise BadArchive("rootfs.diff_ids are not all sha256 digests", where=where)
    run = _object(config.get("config") or {}, f"{where}: config")
    workdir = _string(run, "WorkingDir", where)
    return ParsedConfig(
        ImageConfig(
            entrypoint=_strings(run, "Entrypoint", where),
            cmd=_strings(run, "Cmd", where),
            env=tuple(_env(item, where) for item in _strings(run, "Env", where)),
            workdir=str(PurePosixPath("/") / workdir) if workdir else "",
            user=_string(run, "User", where),
        ),
        tuple(diff_ids),
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("an object has the same key twice")
    return body


def _object(body: object, where: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadArchive("is no JSON object", where=where)
    return body


def _list(body: dict[str, Any], name: str, where: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        raise BadArchive(f"{name} is no list", where=where)
    return value


def _require_count(n_layers: int, where: str) -> None:
    if not 1 <= n_layers <= MAX_LAYERS:
        raise BadArchive(f"has {n_layers} layers; 1 to {MAX_LAYERS} can be joined", where=where)


def _descriptor(body: object, where: str) -> Descriptor:
    match body:
        case {"mediaType": str(media_type), "digest": str(digest), "size": int(size), **rest} if (
            is_digest(digest) and not isinstance(size, bool) and size >= 0
        ):
            notes = rest.get("annotations")
            notes = notes if isinstance(notes, dict) else {}
            attests = any(notes.get(key) == value for key, value in _ATTESTATION.items())
            tag = str(notes.get(_TAG) or "")
            return Descriptor(media_type, digest, size, _platform(rest.get("platform"), where), tag, attests)
    raise BadArchive("has a descriptor without mediaType, sha256 digest and size", where=where)


def _several(count: int, tags: list[Any]) -> str:
    named = ", ".join(sorted(str(tag) for tag in tags if tag)[:10])
    return f"has {count} images" + (f": {named}" if named else "")


def _platform(body: object, where: str) -> tuple[str, str, str] | None:
    match body:
        case None:
            return None
        case {"os": str(system), "architecture": str(architecture), **rest}:
            return system, architecture, str(rest.get("variant") or "")
    raise BadArchive("has a platform without os and architecture", where=where)


def _platform_text(item: Descriptor) -> str:
    return "/".join(item.platform[:2]) if item.platform else item.media_type


def _string(body: dict[str, Any], name: str, where: str) -> str:
    return _plain(body.get(name) or "", name, where)


def _strings(body: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = body.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadArchive(f"{name} is no list of strings", where=where)
    return tuple(_plain(item, name, where) for item in value)


def _plain(value: object, name: str, where: str) -> str:
    """Text that can be an argument of execve: no NUL, no lone surrogate."""
    if isinstance(value, str) and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    raise BadArchive(f"{name} is no plain text", where=where)


def _env(item: str, where: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not name or not equals:
        raise BadArchive(f"Env has {item[:80]!r}, which is not NAME=VALUE", where=where)
    return name, value
